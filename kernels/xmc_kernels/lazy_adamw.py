"""AdamW on the rows of a table that a batch touched, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels._reference import lazy_adamw as reference


def lazy_adamw_(
    param: Tensor,  # [N, D]
    exp_avg: Tensor,  # [N, D]
    exp_avg_sq: Tensor,  # [N, D]
    rows: Tensor,  # [R] int64, sorted, distinct
    grad: Tensor,  # [R, D]
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One AdamW step on `param[rows]` and its moments; other rows are neither read nor written.

    `step` counts from 1 and corrects the bias of the moments; the decay is decoupled. Cost: one
    pass over R rows of the four matrices. On the CPU float32 runs compiled.

    Raises ValueError or TypeError on shapes and dtypes that do not fit, or rows that are not
    sorted, distinct and in range.
    """
    _check(param, exp_avg, exp_avg_sq, rows, grad, step)
    if rows.shape[0]:
        _lazy_adamw_(param, exp_avg, exp_avg_sq, rows, grad, lr, *betas, eps, weight_decay, step)


@torch.library.custom_op("xmc::lazy_adamw_", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def _lazy_adamw_(
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
    reference.lazy_adamw_(
        param, exp_avg, exp_avg_sq, rows, grad, lr, beta1, beta2, eps, weight_decay, step
    )


@_lazy_adamw_.register_kernel("cpu")
def _(
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
    tensors = (param, exp_avg, exp_avg_sq)
    compiled = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    if not compiled:
        reference.lazy_adamw_(
            param, exp_avg, exp_avg_sq, rows, grad, lr, beta1, beta2, eps, weight_decay, step
        )
        return
    from xmc_kernels._cpu import lazy_adamw as cpu

    cpu.lazy_adamw_(
        param, exp_avg, exp_avg_sq, rows, grad, lr, beta1, beta2, eps, weight_decay, step
    )


def _check(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, grad: Tensor, step: int
) -> None:
    if param.dim() != 2:
        raise ValueError(f"expected param [N, D], got {list(param.shape)}")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != param.shape or moment.dtype != param.dtype:
            raise ValueError(
                f"expected {name} {param.dtype} {list(param.shape)} to match param, "
                f"got {moment.dtype} {list(moment.shape)}"
            )
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise TypeError(f"expected rows [R] int64, got {rows.dtype} {list(rows.shape)}")
    expected = (rows.shape[0], param.shape[1])
    if grad.shape != expected or grad.dtype != param.dtype:
        raise ValueError(
            f"expected grad {param.dtype} {list(expected)} to match param and rows, "
            f"got {grad.dtype} {list(grad.shape)}"
        )
    if step < 1:
        raise ValueError(f"expected step of at least 1, got {step}")
    if rows.shape[0] == 0:
        return
    if not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError("expected sorted, distinct rows")
    low, high = int(rows[0]), int(rows[-1])
    if low < 0 or high >= param.shape[0]:
        raise ValueError(f"expected rows in [0, {param.shape[0]}), got {low} to {high}")
