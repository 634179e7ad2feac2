"""AdamW on some rows of a table on the CPU, one pass over memory."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from torch import Tensor

from xmc_kernels._cpu.threads import run, shares


def lazy_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """`reference.lazy_adamw_` for float32; the same bits for any number of threads."""
    scalars = [
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        eps,
    ]
    tables = [tensor.detach().numpy() for tensor in (param, exp_avg, exp_avg_sq)]
    given = [tensor.detach().contiguous().numpy() for tensor in (rows, grad)]
    arguments = (*tables, *given, *(np.float32(scalar) for scalar in scalars))
    run(_lazy_adamw, [(*arguments, *share) for share in shares(rows.shape[0])])


@njit(nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)
def _lazy_adamw(
    param, exp_avg, exp_avg_sq, rows, grad, keep1, beta2, keep2, decay, rate, root, eps, start, stop
):
    dim = param.shape[1]
    for r in range(start, stop):
        row = rows[r]
        w, m, v, g = param[row], exp_avg[row], exp_avg_sq[row], grad[r]
        for d in range(dim):
            first = m[d] + keep1 * (g[d] - m[d])
            second = beta2 * v[d] + keep2 * (g[d] * g[d])
            m[d] = first
            v[d] = second
            w[d] = decay * w[d] - rate * first / (np.sqrt(second) * root + eps)
