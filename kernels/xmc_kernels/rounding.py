"""Stochastic rounding of float32 to bfloat16: right on average, so small updates are not lost.

A bfloat16 weight has 8 significant bits: rounded to nearest, an update below 1/512 of the weight
changes nothing, ever. Rounded up with a probability of what is left over, it arrives on average.
The randomness is a function of (seed, step, tensor, row, column): every backend draws the same,
whatever its tiles, and a step can be repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
WEIGHT, BIAS, MEAN, ROOT = 0, 1, 2, 3
"""Streams of one step: weights, biases, and float8 moments of weights."""


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def mix(x: Tensor) -> Tensor:
    """`lowbias32` of C. Wellons' hash prospector on unsigned 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def stream_key(seed: int, step: int, stream: int, row_offset: int = 0) -> int:
    """What `noise` is keyed by, as a signed 32-bit integer (kernels take it as such).

    Row r under `row_offset` gets the noise of row r + row_offset: a table's parts get that of the
    whole.
    """
    key = _mix_int(_mix_int(_mix_int(seed & _MASK) ^ (step & _MASK)) ^ stream)
    key = (key + row_offset) & _MASK
    return key - 2**32 if key >= 2**31 else key


def noise(key: int, rows: Tensor, columns: Tensor, bits: int = 16) -> Tensor:
    """Random bits, int64 in [0, 2^bits), per broadcast pair of row and column."""
    row = mix((rows.long() + key) & _MASK)
    return mix((row ^ (columns.long() * 0x9E3779B9)) & _MASK) >> (32 - bits)


def stochastic_round(value: Tensor, bits: Tensor) -> Tensor:
    """float32 as bfloat16: up in magnitude with the probability of the 16 bits that do not fit.

    `bits` comes from `noise`. What is not finite keeps its value; bfloat16 numbers are unchanged.
    """
    raised = value.float().view(torch.int32) + bits.int()
    rounded = (raised & -65536).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value.float()).bfloat16()
