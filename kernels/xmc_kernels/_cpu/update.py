"""Optimizer steps on a chunk of a layer."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from xmc_kernels._cpu.bfloat16 import round_rows, widen
from xmc_kernels._cpu.labels import UPDATED
from xmc_kernels._cpu.vector import advance, at_address, bits_of
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
def apply_or_keep(a, decay, param, grad, m, v, kept, has_kept, count):
    """Update `count` parameters by their gradients and what was kept, or keep the sum.

    All arrays are pointers; `a` is a kernel's record, with CONSTANTS, rule and apply.
    """
    if has_kept:
        for i in range(count):
            grad[i] += kept[i]
    if not a.apply:
        for i in range(count):
            kept[i] = grad[i]
        return
    lr = a.lr
    if a.rule == _ADAMW:
        shrink, rate = np.float32(1) - lr * decay, lr * a.mean_scale
        beta1, rest1, beta2, rest2 = a.beta1, a.rest1, a.beta2, a.rest2
        root_scale, eps = a.root_scale, a.eps
        for i in range(count):
            m[i] = beta1 * m[i] + rest1 * grad[i]
            v[i] = beta2 * v[i] + rest2 * (grad[i] * grad[i])
            param[i] = shrink * param[i] - rate * m[i] / (np.sqrt(v[i]) * root_scale + eps)
    elif a.rule == _ADAGRAD:
        eps = a.eps
        for i in range(count):
            g = grad[i] + decay * param[i]
            v[i] += g * g
            param[i] -= lr * g / (np.sqrt(v[i]) + eps)
    elif a.rule == _MOMENTUM:
        momentum = a.momentum
        for i in range(count):
            m[i] = momentum * m[i] + (grad[i] + decay * param[i])
            param[i] -= lr * m[i]
    else:
        for i in range(count):
            param[i] -= lr * (grad[i] + decay * param[i])


def update_weights(a, weight, share, grad, start, stop):
    """Update the weights of labels [start, stop), or keep their gradients."""
    raise NotImplementedError  # the kernels' is below


@overload(update_weights)
def _update_weights(a, weight, share, grad, start, stop):
    def float32(a, weight, share, grad, start, stop):
        at = start * a.fan_in
        apply_or_keep(
            *(a, a.decay, advance(weight, at), grad),
            advance(at_address(np.float32, a.weight_m), at),
            advance(at_address(np.float32, a.weight_v), at),
            advance(at_address(np.float32, a.grad_weight), at),
            *(a.grad_weight != 0, (stop - start) * a.fan_in),
        )

    def bfloat16(a, weight, share, grad, start, stop):
        wide = at_address(np.float32, a.widened + share * 4 * a.widened_size)
        labels = max(1, UPDATED // a.fan_in)
        for first in range(start, stop, labels):
            last, at = min(first + labels, stop), first * a.fan_in
            count = (last - first) * a.fan_in
            widen(weight, at, count, bits_of(wide))
            apply_or_keep(
                *(a, a.decay, wide, advance(grad, (first - start) * a.fan_in)),
                advance(at_address(np.float32, a.weight_m), at),
                advance(at_address(np.float32, a.weight_v), at),
                advance(at_address(np.float32, a.grad_weight), at),
                *(a.grad_weight != 0, count),
            )
            if a.apply:
                round_rows(bits_of(wide), weight, first, last, a.fan_in, a.weight_key)

    return bfloat16 if weight.dtype == types.uint16 else float32


@njit(error_model="numpy")
def update_biases(a, biases, grad, start, stop):
    """Update the biases of labels [start, stop), copied to `biases`, or keep their gradients."""
    apply_or_keep(
        *(a, np.float32(0), biases, grad),
        advance(at_address(np.float32, a.bias_m), start),
        advance(at_address(np.float32, a.bias_v), start),
        advance(at_address(np.float32, a.grad_bias), start),
        *(a.grad_bias != 0, stop - start),
    )
    if not a.apply:
        return
    if a.bias_bytes == 2:
        bias = at_address(np.uint16, a.bias)
        round_rows(bits_of(biases), bias, start, stop, 1, a.bias_key)
        return
    for i in range(stop - start):
        at_address(np.float32, a.bias)[start + i] = biases[i]
