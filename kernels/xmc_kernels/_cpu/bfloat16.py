"""bfloat16 numbers as their bits: widened before use, rounded after an update.

All arrays are pointers; `bits` are those of float32 numbers (`vector.bits_of`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

_SIXTEEN = np.uint32(16)
_INFINITY = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_QUIET = np.uint32(0x00400000)  # set in a NaN, which may have nothing but low bits


@njit(error_model="numpy")
def widen(source, at, count, bits):
    """`bits[:count] = source[at : at + count]`, exactly."""
    for i in range(count):
        bits[i] = np.uint32(source[at + i]) << _SIXTEEN


@njit(error_model="numpy")
def narrow(bits, count, into, at):
    """`into[at : at + count] = bits[:count]`, rounded to nearest, ties to even."""
    for i in range(count):
        number = bits[i]
        half = np.uint32(0x7FFF) + ((number >> _SIXTEEN) & np.uint32(1))
        nan = (number & _MAGNITUDE) > _INFINITY
        into[at + i] = np.uint16(np.uint32(number | _QUIET if nan else number + half) >> _SIXTEEN)


@njit(forceinline=True)
def _mix(x):
    """`rounding.mix` in 32 bits."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(error_model="numpy")
def round_rows(bits, into, first, last, columns, key):
    """`into[first * columns : last * columns] = bits[:]`, rounded by `rounding.noise`.

    As `rounding.stochastic_round`, bit for bit; first and last are rows of the whole table.
    """
    for label in range(first, last):
        row = _mix(np.uint32(np.uint32(label) + np.uint32(key)))
        at, to = (label - first) * columns, label * columns
        for k in range(columns):
            number = bits[at + k]
            column = np.uint32(np.uint32(k) * np.uint32(0x9E3779B9))
            raised = np.uint32(number + (_mix(np.uint32(row ^ column)) >> _SIXTEEN))
            if (number & _MAGNITUDE) >= _INFINITY:
                raised = number if (number & _MAGNITUDE) == _INFINITY else number | _QUIET
            into[to + k] = np.uint16(np.uint32(raised) >> _SIXTEEN)
