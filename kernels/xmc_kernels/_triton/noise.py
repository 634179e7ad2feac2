"""The random bits of `rounding.py` in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise(key, rows, columns):
    """32 random bits (uint32) per pair of row and column, int32 that broadcast; use the highest."""
    row = _mix((rows + key).to(tl.uint32, bitcast=True))
    return _mix(row ^ (columns.to(tl.uint32, bitcast=True) * 0x9E3779B9))
