"""Sparse evolutionary training (SET): prune the smallest weights of a label, regrow at random.

Source: Mocanu et al., arXiv 1707.04383; at extreme numbers of labels arXiv 2411.03171, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc_kernels.checks import validate_index

_TILE_SLOTS = 2**18  # weights rewired at a time, so that a tile's work stays in cache

# splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014):
# the golden-ratio increment keeps streams apart, the two multipliers are its finalizer, David
# Stafford's mix 13. Signed, because torch's 64-bit integers are; products wrap alike.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_DRAW_BITS = 36  # a draw times a bound below 2**27 stays inside 63 bits


@dataclass(frozen=True)
class RewireReport:
    """What one rewiring did."""

    pruned: int
    """Slots replaced, over all index rows."""
    churn: float
    """Share of all slots that was replaced."""
    dead_labels: Tensor
    """Labels [n] int64 whose surviving weights are all zero: they score nothing but their bias
    until a new input has learnt."""

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers for a log; labels as their count."""
        return {
            "pruned": self.pruned,
            "churn": self.churn,
            "dead_labels": self.dead_labels.shape[0],
        }


@torch.no_grad()
def set_rewire_(
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F] uint16 or int32, sorted, distinct
    in_features: int,  # D
    *,
    fraction: float,
    seed: int,
    step: int,
    moments: Sequence[Tensor] = (),  # optimizer state of weight's shape
    tile_slots: int = _TILE_SLOTS,
) -> RewireReport:
    """One SET step, in place: each index row loses `round(fraction * F)` inputs and gains as many.

    Pruned are the slots of smallest |w| (in groups: mean |w| over the G labels), ties by the lower
    slot. Regrown are inputs uniform among those the row did not read before, so fewer are pruned
    where fewer than that exist. Survivors keep weight and moments, new slots get zero for both,
    and rows stay sorted.

    Randomness is a hash of (seed, step, index row): the same after a resume and for any
    `tile_slots`, the number of weights handled at a time, which bounds the memory (about 60 bytes
    each; [L, D] never exists).

    Raises ValueError or TypeError on shapes that do not fit, a fraction outside [0, 1] or an
    invalid index.
    """
    _check(weight, index, in_features, fraction, moments)
    num_rows, fan_in = index.shape
    group_size = weight.shape[0] // num_rows
    num_pruned = min(round(fraction * fan_in), in_features - fan_in)
    stream = _stream(seed, step, weight.device)
    values = [tensor.view(num_rows, group_size, fan_in) for tensor in (weight, *moments)]
    dead = []
    step_rows = max(1, tile_slots // (fan_in * group_size))
    for start in range(0, num_rows, step_rows):
        stop = min(start + step_rows, num_rows)
        rows = torch.arange(start, stop, device=weight.device)
        tile = [value[start:stop] for value in values]
        lost = _lowest(tile[0], num_pruned)
        for value in tile:
            value.scatter_(2, lost.unsqueeze(1).expand(-1, group_size, -1), 0)
        dead.append(start * group_size + (tile[0] == 0).all(2).flatten().nonzero().flatten())
        if num_pruned:
            _regrow_(tile, index[start:stop], lost, in_features, _mix(stream + rows * _GOLDEN))
    return RewireReport(num_rows * num_pruned, num_pruned / fan_in, torch.cat(dead))


def _lowest(weight: Tensor, count: int) -> Tensor:
    """The `count` slots of least mean |w| of weight [R, G, F], as [R, count] int64."""
    # Added one label after another, so that the sum does not depend on the size of the tile.
    score = weight[:, 0].abs().to(torch.promote_types(weight.dtype, torch.float32))
    for member in range(1, weight.shape[1]):
        score += weight[:, member].abs()
    return score.sort(dim=1, stable=True).indices[:, :count]


def _regrow_(
    tile: Iterable[Tensor],  # weights and moments, each [R, G, F], zero in the lost slots
    index: Tensor,  # [R, F]
    lost: Tensor,  # [R, P] int64, slots
    in_features: int,
    keys: Tensor,  # [R] int64, one random stream per row
) -> None:
    """Put new inputs in the lost slots and sort each row by input again."""
    old = index.to(torch.int64)
    num_candidates = in_features - index.shape[1]
    ranks = _distinct_below(num_candidates, lost.shape[1], keys)
    # The r-th input missing from the sorted row a_0 < a_1 < ... is r plus the number of i with
    # a_i - i <= r, and a_i - i never falls.
    gaps = old - torch.arange(old.shape[1], device=old.device)
    new = ranks + torch.searchsorted(gaps, ranks, right=True)
    rewired, order = old.scatter_(1, lost, new).sort(dim=1)
    index.copy_(rewired)
    for value in tile:
        value.copy_(value.gather(2, order.unsqueeze(1).expand_as(value)))


def _distinct_below(high: int, count: int, keys: Tensor) -> Tensor:
    """[R, count] distinct numbers below `high` per row, every subset equally likely.

    Floyd's algorithm (Bentley, CACM 30(9), 1987): the j-th draw is from one number more than the
    draw before, and a repeated draw is replaced by that new number.
    """
    chosen = torch.empty(count, keys.shape[0], dtype=torch.int64, device=keys.device)
    for j in range(count):
        newest = high - count + j
        draw = _below(newest + 1, keys, j)
        taken = (chosen[:j] == draw).any(0)
        chosen[j] = torch.where(taken, newest, draw)
    return chosen.t().contiguous()


def _stream(seed: int, step: int, device: torch.device) -> Tensor:
    """The hash [] int64 of a rewiring, to which a row's number is added."""
    wrapped = (seed + 2**63) % 2**64 - 2**63
    key = _mix(torch.tensor(wrapped, dtype=torch.int64, device=device) + _GOLDEN)
    return _mix(key + (step + 1) * torch.tensor(_GOLDEN, device=device)) + _GOLDEN


def _below(bound: int, keys: Tensor, counter: int) -> Tensor:
    """The counter-th draw of each stream, in [0, bound); bias at most bound / 2^36."""
    bits = _mix(keys + (counter + 1) * torch.tensor(_GOLDEN, device=keys.device))
    return (_shift(bits, 64 - _DRAW_BITS) * bound) >> _DRAW_BITS


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finalizer, elementwise on int64 taken as unsigned."""
    for shift, factor in _MIX:
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _check(
    weight: Tensor, index: Tensor, in_features: int, fraction: float, moments: Sequence[Tensor]
) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected fraction in [0, 1], got {fraction}")
    if not 0 < in_features < 2 ** (63 - _DRAW_BITS):
        raise ValueError(f"expected in_features in [1, 2^27), got {in_features}")
    if weight.dim() != 2 or index.dim() != 2 or weight.shape[1] != index.shape[1]:
        raise ValueError(
            f"expected weight [L, F] and index [L/G, F], "
            f"got {list(weight.shape)} and {list(index.shape)}"
        )
    if index.shape[0] == 0 or weight.shape[0] % index.shape[0]:
        raise ValueError(
            f"expected a number of index rows that divides {weight.shape[0]} labels, "
            f"got {index.shape[0]}"
        )
    for position, moment in enumerate(moments):
        if moment.shape != weight.shape:
            raise ValueError(
                f"expected moments of shape {list(weight.shape)} to match weight, "
                f"got {list(moment.shape)} at position {position}"
            )
    validate_index(index, in_features)
