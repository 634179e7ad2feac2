"""Losses of a score against 0 or 1 and their gradients, elementwise."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loss_and_gradient(score, target, LOSS: tl.constexpr):
    """Both as in `_reference/classifier.py`, stable for scores of any size."""
    if LOSS == "bce":
        small = tl.exp(-tl.abs(score))
        value = tl.maximum(score, 0.0) - score * target + _log1p(small)
        positive = tl.where(score >= 0, 1.0, small) / (1.0 + small)
        return value, positive - target
    else:
        sign = 2.0 * target - 1.0
        margin = tl.maximum(1.0 - sign * score, 0.0)
        return margin * margin, -2.0 * sign * margin


@triton.jit
def _log1p(x):
    """For x in [0, 1]: `2 * atanh(x / (2 + x))`, its series to z^13 (relative error 2e-8).

    The hardware's logarithm is exact to an absolute 2^-22 only, more than most losses here.
    """
    z = x / (2.0 + x)
    s = z * z
    odd = 1.0 / 11 + s * (1.0 / 13)
    odd = 1.0 / 7 + s * (1.0 / 9 + s * odd)
    return 2.0 * z * (1.0 + s * (1.0 / 3 + s * (1.0 / 5 + s * odd)))
