"""Loss values and gradients of a vector of scores in registers, all of them negative entries."""

from __future__ import annotations

import numpy as np
from numba import njit

from xmc_kernels._cpu.vector import (
    add,
    div,
    fill,
    fma,
    greater,
    horner,
    inverse_power,
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
_LN2 = np.float32(0.6931471805599453)
_LARGE = np.float32(2**60)
_ZERO, _ONE = np.float32(0), np.float32(1)


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
def log1p(x):
    """`log(1 + x)` for 0 <= x < 2^127 with relative error below 3e-7."""
    one = fill(x, _ONE)
    inverse, exponent = inverse_power(add(x, one))
    mantissa = fma(x, inverse, sub(inverse, one))  # (1 + x) / 2^exponent - 1, x itself below 1
    return fma(exponent, fill(x, _LN2), mul(mantissa, horner(mantissa, _LOG1P)))


@njit(forceinline=True)
def bce(score, value):
    """`sigmoid(score)`, and `value` with `softplus(score) = max(score, 0) + log1p(exp(-|score|))`.

    A value (a, b) stands for `a + log1p(b)`: adding up logarithms takes one product each.
    """
    linear, product = value
    e = exp_nonpositive(negative_abs(score))
    larger = div(fill(e, _ONE), add(e, fill(e, _ONE)))  # sigmoid(|score|)
    sigmoid = select_negative(score, mul(e, larger), larger)
    linear = add(linear, maximum(score, fill(e, _ZERO)))
    return sigmoid, (linear, fma(product, e, add(product, e)))


@njit(forceinline=True)
def squared_hinge(score, value):
    """Gradient of `max(0, 1 + score)^2`, and `value` with that added."""
    linear, product = value
    margin = maximum(add(score, fill(score, _ONE)), fill(score, _ZERO))
    return add(margin, margin), (fma(margin, margin, linear), product)


@njit(forceinline=True)
def settled(value):
    """The same value before its product can overflow: to be called at least every 64 labels."""
    linear, product = value
    if greater(product, fill(product, _LARGE)) != 0:
        return add(linear, log1p(product)), fill(product, _ZERO)
    return linear, product


@njit(forceinline=True)
def sum_of_value(value):
    """What a value stands for, as one vector."""
    linear, product = value
    return add(linear, log1p(product))
