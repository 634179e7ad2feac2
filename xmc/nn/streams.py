"""Random numbers as a hash of what they are for: the same whatever is computed before or beside.

splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): the
golden-ratio increment keeps streams apart, the two multipliers are its finalizer, David Stafford's
mix 13. Numbers are int64 because torch's 64-bit integers are signed; products wrap alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_DRAW_BITS = 36
MAX_BOUND = 2 ** (63 - _DRAW_BITS)  # a draw times a bound below this stays inside 63 bits
_UNIT_BITS = 24  # a float32 holds them exactly


def stream(seed: int, step: int, device: torch.device, purpose: int = 0) -> Tensor:
    """The key [] int64 of one step; purposes of the same step have unrelated keys."""
    wrapped = (seed + 2**63) % 2**64 - 2**63
    key = mix(torch.tensor(wrapped, dtype=torch.int64, device=device) + _GOLDEN)
    for number in (step, purpose) if purpose else (step,):
        key = mix(key + (number + 1) * torch.tensor(_GOLDEN, device=device)) + _GOLDEN
    return key


def substreams(key: Tensor, numbers: Tensor) -> Tensor:
    """One key per number, under each key (broadcast)."""
    return mix(key + numbers * _GOLDEN)


def below(bound: int | Tensor, keys: Tensor, counter: int) -> Tensor:
    """The counter-th draw of each stream, in [0, bound); bias at most bound / 2^36."""
    bits = mix(keys + (counter + 1) * torch.tensor(_GOLDEN, device=keys.device))
    return (_shift(bits, 64 - _DRAW_BITS) * bound) >> _DRAW_BITS


def symmetric_uniform(keys: Tensor) -> Tensor:
    """One float32 in (-1, 1) per key: the midpoint of one of 2^24 equal intervals."""
    bits = _shift(mix(keys + _GOLDEN), 64 - _UNIT_BITS)
    return ((2 * bits + 1 - 2**_UNIT_BITS).double() / 2**_UNIT_BITS).float()


def distinct_below(high: int, counts: Tensor, keys: Tensor) -> Tensor:
    """For each row r, counts[r] distinct numbers below `high`, every subset equally likely.

    Returns [R, max(counts)] int64; what stands beyond a row's count means nothing. Floyd's
    algorithm (Bentley, CACM 30(9), 1987): the j-th draw is from one number more than the draw
    before, and a repeated draw is replaced by that new number.
    """
    most = int(counts.max())
    chosen = torch.empty(most, keys.shape[0], dtype=torch.int64, device=keys.device)
    for j in range(most):
        newest = high - counts + j
        draw = below(newest + 1, keys, j)
        taken = (chosen[:j] == draw).any(0)
        chosen[j] = torch.where(taken, newest, draw)
    return chosen.t().contiguous()


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finalizer, elementwise on int64 taken as unsigned."""
    for shift, factor in _MIX:
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
