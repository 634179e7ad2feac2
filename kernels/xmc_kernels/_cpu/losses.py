"""Loss values and gradients of a vector of scores, in registers."""

from __future__ import annotations

import numpy as np
from numba import njit

from xmc_kernels._cpu.vector import (
    add,
    div,
    fill,
    fma,
    horner,
    maximum,
    mul,
    negative_abs,
    scale_by_power,
    select_negative,
    sub,
)

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 as a sum of two floats (Cody and Waite): n * _LN2_HIGH is exact for the n that occur.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds to the nearest integer
_LOWEST = np.float32(-86.0)  # exp of it is still a normal number
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


def _floats(*values):
    return tuple(np.float32(value) for value in values)


# Minimax fits (Lawson iterations): exp(r) on |r| <= ln(2) / 2 with error 2e-8,
# log1p(e) / e on [0, 1] with error 5e-8.
_EXP = _floats(1.0, 1.0, 0.5, 0.16666415, 0.04166608, 0.00837513, 0.00139561)
_LOG1P = _floats(
    1.0,
    -0.49999553,
    0.33320343,
    -0.24852942,
    0.19145098,
    -0.13746583,
    0.07921028,
    -0.03011068,
    0.00538399,
)


@njit(forceinline=True)
def exp_nonpositive(x):
    """`exp(x)` for x <= 0 with relative error below 3e-7; exp(-86) below -86."""
    x = maximum(x, fill(x, _LOWEST))
    shifted = fma(x, fill(x, _LOG2_E), fill(x, _ROUND))
    n = sub(shifted, fill(x, _ROUND))
    r = fma(n, fill(x, -_LN2_LOW), fma(n, fill(x, -_LN2_HIGH), x))
    return scale_by_power(horner(r, _EXP), shifted)


@njit(forceinline=True)
def bce(score, target):
    """Gradient `sigmoid(score) - target` and value `softplus(score) - score * target`."""
    e = exp_nonpositive(negative_abs(score))
    larger = div(fill(e, _ONE), add(e, fill(e, _ONE)))  # sigmoid(|score|)
    sigmoid = select_negative(score, mul(e, larger), larger)
    softplus = fma(e, horner(e, _LOG1P), maximum(score, fill(e, _ZERO)))
    return sub(sigmoid, target), sub(softplus, mul(score, target))


@njit(forceinline=True)
def squared_hinge(score, target):
    """Gradient and value of `max(0, 1 - y * score)^2` with y = 2 * target - 1."""
    y = fma(target, fill(score, _TWO), fill(score, -_ONE))
    margin = maximum(sub(fill(score, _ONE), mul(y, score)), fill(score, _ZERO))
    return mul(mul(y, margin), fill(score, -_TWO)), mul(margin, margin)
