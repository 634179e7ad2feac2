"""Definition of the AdamW step on some rows of a table, in plain torch."""

from __future__ import annotations

import math

from torch import Tensor


def lazy_adamw_(
    param: Tensor,  # [N, D]
    exp_avg: Tensor,  # [N, D]
    exp_avg_sq: Tensor,  # [N, D]
    rows: Tensor,  # [R] int64
    grad: Tensor,  # [R, D]
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Loshchilov & Hutter (arXiv 1711.05101), algorithm 2, for the given rows only."""
    m = exp_avg[rows].lerp_(grad, 1 - beta1)
    v = exp_avg_sq[rows].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    exp_avg[rows], exp_avg_sq[rows] = m, v
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    decayed = param[rows].mul_(1 - lr * weight_decay)
    param[rows] = decayed.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
