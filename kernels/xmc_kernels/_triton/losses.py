"""Losses of a score against 0 or 1 and their gradients, elementwise."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Objective(NamedTuple):
    """A loss and what its positives count, as kernels take them."""

    loss: str
    smoothing: float = 0.0
    positive_weight: Tensor | None = None  # [L] float32

    def arguments(self, start: int = 0) -> dict[str, Any]:
        """Of kernels that count labels from `start`."""
        weight = self.positive_weight
        return {
            "positive_weight_ptr": None if weight is None else weight[start:],
            "smoothing": float(self.smoothing),
        }

    def constants(self) -> dict[str, Any]:
        return {"LOSS": self.loss, "SMOOTH": self.smoothing > 0}


@triton.jit
def loss_and_gradient(
    score,
    target,  # 0 or 1
    positive_weight_ptr,  # [L] or None
    label,  # its mask and it broadcast with score
    mask_label,
    smoothing,
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Both as in `_reference/classifier.py`, stable for scores of any size."""
    wanted = target
    if SMOOTH:
        wanted = target * (1.0 - smoothing)
    if LOSS == "bce":
        small = tl.exp(-tl.abs(score))
        value = tl.maximum(score, 0.0) - score * wanted + log1p(small)
        grad = tl.where(score >= 0, 1.0, small) / (1.0 + small) - wanted
    elif SMOOTH:
        above, below = tl.maximum(1.0 + score, 0.0), tl.maximum(1.0 - score, 0.0)
        value = wanted * (below * below) + (1.0 - wanted) * (above * above)
        grad = 2.0 * ((1.0 - wanted) * above - wanted * below)
    else:
        sign = 2.0 * target - 1.0
        margin = tl.maximum(1.0 - sign * score, 0.0)
        value = margin * margin
        grad = -2.0 * sign * margin
    if positive_weight_ptr is not None:
        weight = tl.load(positive_weight_ptr + label, mask=mask_label, other=1.0)
        factor = tl.where(wanted > 0, weight, 1.0)
        value *= factor
        grad *= factor
    return value, grad


@triton.jit
def log1p(x):
    """For x in [0, 1]: `2 * atanh(x / (2 + x))`, its series to z^13 (relative error 2e-8).

    The hardware's logarithm is exact to an absolute 2^-22 only, more than most losses here.
    """
    z = x / (2.0 + x)
    s = z * z
    odd = 1.0 / 11 + s * (1.0 / 13)
    odd = 1.0 / 7 + s * (1.0 / 9 + s * odd)
    return 2.0 * z * (1.0 + s * (1.0 / 3 + s * (1.0 / 5 + s * odd)))
