"""int8 and int4 weights of a few labels, spelt out as float32: see `quantized.py` for the format.

All arrays are pointers; labels begin at `start` of the whole layer.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(error_model="numpy")
def scale_bytes(weight, scale, start, count, fan_in, into):
    """`into[i * fan_in + k] = scale[start + i] * weight[start + i, k]` of int8 weights."""
    for i in range(count):
        factor, at, to = scale[start + i], (start + i) * fan_in, i * fan_in
        for k in range(fan_in):
            into[to + k] = factor * np.float32(weight[at + k])


@njit(error_model="numpy")
def scale_halves(weight, scale, start, count, fan_in, into):
    """The same of int4 weights, two a byte."""
    columns = (fan_in + 1) // 2
    for i in range(count):
        factor, at, to = scale[start + i], (start + i) * columns, i * fan_in
        for k in range(fan_in // 2):
            both = np.int32(weight[at + k])
            into[to + 2 * k] = factor * np.float32((both & 15) - 8)
            into[to + 2 * k + 1] = factor * np.float32((both >> 4) - 8)
        if fan_in % 2:
            last = np.int32(weight[at + columns - 1])
            into[to + fan_in - 1] = factor * np.float32((last & 15) - 8)
