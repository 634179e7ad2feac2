"""Optimizer steps on a chunk of a layer."""

from __future__ import annotations

import numpy as np
from numba import njit

from xmc_kernels.update import RULES, UpdateRule

_MOMENTUM, _ADAMW, _ADAGRAD = (RULES.index(rule) for rule in ("momentum", "adamw", "adagrad"))
CONSTANTS = "lr momentum beta1 rest1 beta2 rest2 eps mean_scale root_scale decay"


def constants(rule: UpdateRule, lr: float, step: int) -> dict[str, float]:
    """The fields CONSTANTS of a kernel's record: differences are taken before rounding."""
    beta1, beta2 = rule.betas
    return {
        "lr": lr,
        "momentum": rule.momentum,
        "beta1": beta1,
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "eps": rule.eps,
        "mean_scale": 1 / (1 - beta1**step),
        "root_scale": (1 - beta2**step) ** -0.5,
        "decay": rule.weight_decay,
    }


@njit(error_model="numpy")
def apply_or_keep(a, decay, param, grad, m, v, kept, has_kept, first, last):
    """Update param[first:last] by grad[: last - first] and what was kept, or keep the sum.

    All arrays are pointers; `a` is a kernel's record, with CONSTANTS, rule and apply.
    """
    count = last - first
    if has_kept:
        for i in range(count):
            grad[i] += kept[first + i]
    if not a.apply:
        for i in range(count):
            kept[first + i] = grad[i]
        return
    lr = a.lr
    if a.rule == _ADAMW:
        shrink, rate = np.float32(1) - lr * decay, lr * a.mean_scale
        beta1, rest1, beta2, rest2 = a.beta1, a.rest1, a.beta2, a.rest2
        root_scale, eps = a.root_scale, a.eps
        for i in range(count):
            at = first + i
            m[at] = beta1 * m[at] + rest1 * grad[i]
            v[at] = beta2 * v[at] + rest2 * (grad[i] * grad[i])
            param[at] = shrink * param[at] - rate * m[at] / (np.sqrt(v[at]) * root_scale + eps)
    elif a.rule == _ADAGRAD:
        eps = a.eps
        for i in range(count):
            at = first + i
            g = grad[i] + decay * param[at]
            v[at] += g * g
            param[at] -= lr * g / (np.sqrt(v[at]) + eps)
    elif a.rule == _MOMENTUM:
        momentum = a.momentum
        for i in range(count):
            at = first + i
            m[at] = momentum * m[at] + (grad[i] + decay * param[at])
            param[at] -= lr * m[at]
    else:
        for i in range(count):
            at = first + i
            param[at] -= lr * (grad[i] + decay * param[at])
