"""AdamW on some rows of a table on the CPU, one pass over memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import carray, njit
from torch import Tensor

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.labels import share_range
from xmc_kernels._cpu.vector import at_address, next_share

ARGUMENTS = threads.record_type(
    addresses="param exp_avg exp_avg_sq rows grad",
    integers="dim",
    floats="keep1 beta2 keep2 decay rate root eps",
)


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
    rows, grad = rows.detach().contiguous(), grad.detach().contiguous()
    arguments = threads.record(
        ARGUMENTS,
        num_shares=threads.num_shares(rows.shape[0]),
        num_labels=rows.shape[0],
        param=param,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        rows=rows,
        grad=grad,
        dim=param.shape[1],
        keep1=1 - beta1,
        beta2=beta2,
        keep2=1 - beta2,
        decay=1 - lr * weight_decay,
        rate=lr / (1 - beta1**step),
        root=1 / math.sqrt(1 - beta2**step),
        eps=eps,
    )
    threads.launch(_kernel(), arguments)


@njit(fastmath={"contract"}, error_model="numpy")
def _step_row(a, w, m, v, g):
    for d in range(a.dim):
        first = m[d] + a.keep1 * (g[d] - m[d])
        second = a.beta2 * v[d] + a.keep2 * (g[d] * g[d])
        m[d] = first
        v[d] = second
        w[d] = a.decay * w[d] - a.rate * first / (np.sqrt(second) * a.root + a.eps)


@functools.cache
def _kernel() -> Any:
    @kernel(ARGUMENTS)
    def lazy_adamw_shares(arguments):
        a = carray(arguments, 1)[0]
        rows = at_address(np.int64, a.rows)
        row_bytes = 4 * a.dim
        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            for r in range(start, stop):
                at = rows[r] * row_bytes
                _step_row(
                    a,
                    carray(at_address(np.float32, a.param + at), a.dim),
                    carray(at_address(np.float32, a.exp_avg + at), a.dim),
                    carray(at_address(np.float32, a.exp_avg_sq + at), a.dim),
                    carray(at_address(np.float32, a.grad + r * row_bytes), a.dim),
                )
            share = next_share(arguments)

    return lazy_adamw_shares
