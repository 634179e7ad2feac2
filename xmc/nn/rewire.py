"""Rewiring of a fixed fan-in matrix: prune the smallest weights of a label, regrow elsewhere.

Sources: SET, Mocanu et al., arXiv 1707.04383; RigL, Evci et al., arXiv 1911.11134; N:M patterns,
SRigL, arXiv 2305.02299; at extreme numbers of labels arXiv 2411.03171, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from xmc.distributed.collectives import World, counts_of, gather_rows, sum_
from xmc.nn.prune import lost_slots, magnitude, most_lost
from xmc.nn.regrow import grow_at_random, grow_by_score
from xmc.nn.slot_age import AgeReport, SlotAges
from xmc.nn.streams import MAX_BOUND, stream, substreams, symmetric_uniform
from xmc_kernels.checks import validate_index
from xmc_kernels.float8 import DTYPE, LARGEST, dequantize, quantize
from xmc_kernels.packing import check_pattern, pack_index, unpack_index

Growth = Callable[[int, int], Tensor]
"""`growth(start, stop)`: score [stop - start, D] of every input for index rows start..stop."""

_TILE_SLOTS = 2**18  # weights rewired at a time, so that a tile's work stays in cache
_TILE_SCORES = 2**20  # numbers of [G, D] per index row at a time, where there is a growth
_INIT = 1  # purpose of the streams that new weights are drawn from; inputs have purpose 0


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
    ages: AgeReport | None = None
    """How long inputs have stayed, where ages were given."""

    def of_all(self, world: World, *, first_label: int, num_slots: int) -> RewireReport:
        """Of all ranks' shards, from that of one whose labels begin at `first_label`.

        `num_slots` are those of all. Sends a few numbers and the dead labels.
        """
        pruned = int(sum_(torch.tensor(self.pruned), world))
        counts = counts_of(len(self.dead_labels), world)
        dead = gather_rows(self.dead_labels + first_label, counts, world)
        return replace(self, pruned=pruned, churn=pruned / num_slots, dead_labels=dead)

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers for a log; labels as their count."""
        return {
            "pruned": self.pruned,
            "churn": self.churn,
            "dead_labels": self.dead_labels.shape[0],
            **({} if self.ages is None else self.ages.to_dict()),
        }


@torch.no_grad()
def rewire_(
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F] uint16 or int32, sorted, distinct; [L/G, P] uint8 with a pattern
    in_features: int,  # D
    *,
    amount: float,
    seed: int,
    step: int,
    prune: Literal["fraction", "threshold"] = "fraction",
    growth: Growth | None = None,
    init: Literal["zero", "uniform"] = "zero",
    moments: Sequence[Tensor] = (),  # optimizer state of weight's shape, perhaps float8
    keep_moments: bool = False,
    pattern: tuple[int, int] | None = None,
    scale: Tensor | None = None,  # [L] float32, of float8 weights
    row_offset: int = 0,
    ages: SlotAges | None = None,
    tile_slots: int = _TILE_SLOTS,
) -> RewireReport:
    """One rewiring, in place: index rows lose inputs of small weights and gain as many others.

    Pruned are the slots of smallest |w| (in groups: mean |w| over the G labels), ties by the lower
    slot: `round(amount * F)` of each row ("fraction"), or all below `amount` ("threshold"). A row
    keeps at least one slot, and loses no more than there are inputs that it does not read.
    Regrown are inputs that the row did not read before: uniformly drawn (SET), or with `growth`
    those of the highest score, ties by the lower input (RigL: |dL/dW_dense|, in groups its mean).
    With a `pattern` (n, m) that happens within each block of m inputs, and index is packed.

    Survivors keep weight and moments; rows stay sorted. New weights are 0 or U(-1/sqrt F,
    1/sqrt F), cut to what a label's `scale` can hold where weights are float8 (they keep their
    scale, as float8 moments do); their moments are 0, or with `keep_moments` what the slot had
    before.

    Randomness is a hash of (seed, step, index row, label), rows counted from `row_offset` (the
    first row of a label shard): the same after a resume and for any `tile_slots`, the number of
    weights handled at a time, which bounds the memory (about 80 bytes each; with a growth also
    some blocks of 2^20 numbers; [L, D] never exists).

    Raises ValueError or TypeError on shapes that do not fit, options out of range, an invalid
    index, and growth scores that are not finite.
    """
    _check_options(amount, prune, init, row_offset)
    _check(weight, index, in_features, moments, pattern)
    _check_scale(weight, scale)
    num_rows, fan_in = index.shape[0], weight.shape[1]
    group_size = weight.shape[0] // num_rows
    most = most_lost(fan_in, in_features, pattern)
    below = None
    if prune == "fraction":
        most = min(most, round(amount * fan_in))
    else:
        below = amount * group_size  # of a sum over the group
    keys = stream(seed, step, weight.device)
    init_keys = stream(seed, step, weight.device, _INIT) if init == "uniform" else None
    stored = _as_bytes(weight)
    tensors = (stored, *map(_as_bytes, moments))
    values = [tensor.unflatten(0, (num_rows, group_size)) for tensor in tensors]
    pruned, dead = 0, []
    step_rows = max(1, tile_slots // (fan_in * group_size))
    if growth is not None:
        step_rows = min(step_rows, max(1, _TILE_SCORES // (in_features * group_size)))
    for start in range(0, num_rows, step_rows):
        stop = min(start + step_rows, num_rows)
        tile = [value[start:stop] for value in values]
        old = _inputs(index[start:stop], pattern, fan_in)
        labels = slice(start * group_size, stop * group_size)
        wide = weight[labels] if scale is None else dequantize(weight[labels], scale[labels])
        score = magnitude(wide.unflatten(0, (-1, group_size)))
        lost = lost_slots(score, most=most, below=below, pattern=pattern)
        num_lost = int(lost.sum())
        pruned += num_lost
        # Before anything is written: a growth may read the weights of these rows.
        growth_score = _scores(growth, start, stop, in_features) if growth and num_lost else None
        for value in tile[:1] if keep_moments else tile:
            value.masked_fill_(lost.unsqueeze(1), 0)
        zero = (weight[labels] == 0).all(1)
        dead.append(start * group_size + zero.nonzero().flatten())
        if not num_lost:
            order = torch.arange(fan_in, device=old.device).expand_as(old)
        else:
            rows = torch.arange(start, stop, device=old.device) + row_offset
            new = _new_inputs(old, lost, in_features, pattern, substreams(keys, rows), growth_score)
            if init_keys is not None:
                drawn = _draw_weights(lost, new, rows, init_keys, group_size)
                if scale is not None:
                    drawn = _quantized(drawn, scale[labels].view(-1, group_size), lost)
                tile[0].transpose(1, 2)[lost] = drawn.to(stored.dtype)
            rewired, order = old.masked_scatter(lost, new).sort(dim=1)
            index[start:stop] = _stored(rewired, pattern, index.dtype)
            for value in tile:
                value.copy_(value.gather(2, order.unsqueeze(1).expand_as(value)))
        if ages is not None:
            ages.move_(start, stop, lost, order)
    if ages is not None:
        ages.rewirings += 1
    report = None if ages is None else ages.report()
    return RewireReport(pruned, pruned / (num_rows * fan_in), torch.cat(dead), report)


def _new_inputs(
    old: Tensor,  # [R, F] int64
    lost: Tensor,  # [R, F] bool
    in_features: int,
    pattern: tuple[int, int] | None,
    keys: Tensor,  # [R] int64
    score: Tensor | None,  # [R, D]
) -> Tensor:  # [n] int64, one input per lost slot in order
    """Choose by score, or at random. A block of a pattern is a short row with m inputs."""
    base = torch.zeros((), dtype=torch.int64, device=old.device)
    if pattern is not None:
        n, m = pattern
        blocks = torch.arange(in_features // m, device=old.device)
        base = (blocks * m).repeat(len(old)).unsqueeze(1)
        old, lost = old.view(-1, n) - base, lost.view(-1, n)
        keys = substreams(keys.unsqueeze(1), blocks).flatten()
        score = None if score is None else score.reshape(-1, m)
        in_features = m
    counts = lost.sum(1)
    if score is None:
        chosen = grow_at_random(old, counts, in_features, keys)
    else:
        chosen = grow_by_score(old, counts, score)
    wanted = torch.arange(chosen.shape[1], device=old.device) < counts.unsqueeze(1)
    return (chosen + base)[wanted]


def _as_bytes(tensor: Tensor) -> Tensor:
    """float8 moves as bytes: torch can neither gather nor fill it."""
    return tensor.view(torch.uint8) if tensor.dtype == DTYPE else tensor


def _draw_weights(
    lost: Tensor,  # [R, F] bool
    new: Tensor,  # [n] int64, inputs of the lost slots
    rows: Tensor,  # [R] int64
    key: Tensor,
    group_size: int,
) -> Tensor:  # [n, G] float32
    """U(-1/sqrt F, 1/sqrt F) for each new input and label of its group."""
    labels = rows.unsqueeze(1) * group_size + torch.arange(group_size, device=rows.device)
    label_keys = substreams(key, labels)[lost.nonzero()[:, 0]]  # [n, G]
    drawn = symmetric_uniform(substreams(label_keys, new.unsqueeze(1)))
    return drawn / math.sqrt(lost.shape[1])


def _quantized(
    drawn: Tensor,  # [n, G]
    scale: Tensor,  # [R, G]
    lost: Tensor,  # [R, F] bool
) -> Tensor:  # [n, G] uint8
    """The bytes of float8 weights, under the scale that their label has."""
    scales = scale[lost.nonzero()[:, 0]]
    limit = LARGEST * scales
    value = drawn.clamp(-limit, limit).reshape(-1, 1)
    return quantize(value, scales.flatten()).view(torch.uint8).view_as(drawn)


def _scores(growth: Growth, start: int, stop: int, in_features: int) -> Tensor:
    score = growth(start, stop)
    if list(score.shape) != [stop - start, in_features]:
        raise ValueError(
            f"expected growth scores of shape {[stop - start, in_features]} "
            f"for index rows {start} to {stop}, got {list(score.shape)}"
        )
    return score


def _inputs(index: Tensor, pattern: tuple[int, int] | None, fan_in: int) -> Tensor:
    """Index rows as they are stored -> [R, F] int64."""
    wide = index if pattern is None else unpack_index(index, pattern, fan_in)
    return wide.to(torch.int64)


def _stored(inputs: Tensor, pattern: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if pattern is None else pack_index(inputs, pattern)


def _check_options(amount: float, prune: str, init: str, row_offset: int) -> None:
    if prune not in ("fraction", "threshold"):
        raise ValueError(f'expected prune of "fraction" or "threshold", got {prune!r}')
    if init not in ("zero", "uniform"):
        raise ValueError(f'expected init of "zero" or "uniform", got {init!r}')
    if prune == "fraction" and not 0 <= amount <= 1:
        raise ValueError(f"expected a fraction in [0, 1], got {amount}")
    if not 0 <= amount < math.inf:
        raise ValueError(f"expected a threshold of at least 0, got {amount}")
    if row_offset < 0:
        raise ValueError(f"expected row_offset of at least 0, got {row_offset}")


def _check_scale(weight: Tensor, scale: Tensor | None) -> None:
    if (scale is not None) != (weight.dtype == DTYPE):
        got = None if scale is None else scale.dtype
        raise TypeError(f"expected a scale with float8 weights only, got {weight.dtype} and {got}")
    if scale is not None and scale.shape != weight.shape[:1]:
        raise ValueError(
            f"expected scale of shape [{len(weight)}] to match weight, got {list(scale.shape)}"
        )


def _check(
    weight: Tensor,
    index: Tensor,
    in_features: int,
    moments: Sequence[Tensor],
    pattern: tuple[int, int] | None,
) -> None:
    if not 0 < in_features < MAX_BOUND:
        raise ValueError(f"expected in_features in [1, 2^27), got {in_features}")
    same = pattern is not None or weight.shape[-1] == index.shape[-1]
    if weight.dim() != 2 or index.dim() != 2 or not same:
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
    if pattern is None:
        validate_index(index, in_features)
    else:
        check_pattern(pattern, weight.shape[1], in_features)
        validate_index(index, in_features, pattern)
