"""What the ranks of a training tell each other; each function says what it sends.

Every function takes the `World` of its ranks. Where there is one rank they return what they were
given and torch.distributed is not asked, so that one code path serves one process and many.
Rows of a batch may be unequal over ranks: `counts` holds those of every rank, in order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xmc.types import SparseLabels, TopK


@dataclass(frozen=True)
class World:
    """The ranks that train together, and which of them this process is."""

    rank: int
    size: int
    group: Any = None  # dist.ProcessGroup, None for torch's default one

    @classmethod
    def alone(cls) -> World:
        return cls(0, 1)

    @classmethod
    def current(cls, group: Any = None) -> World:
        """Of a group, or of torch's default one; a process without any is alone."""
        if not dist.is_available() or not dist.is_initialized():
            return cls.alone()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)


def share(rows: Tensor, world: World) -> Tensor:
    """This rank's consecutive part of rows [R, ...]; parts differ by at most one. Sends nothing."""
    return rows.tensor_split(world.size)[world.rank]


def counts_of(num_rows: int, world: World) -> list[int]:
    """The number of rows on every rank. Sends one integer a rank."""
    if world.size == 1:
        return [num_rows]
    counts = gather_rows(torch.tensor([num_rows]), [1] * world.size, world)
    return [int(count) for count in counts]


def gather_rows(
    x: Tensor,  # [B_r, ...]
    counts: Sequence[int],  # [N], B_r of every rank
    world: World,
) -> Tensor:  # [sum B_r, ...]
    """The rows of all ranks, in order of rank. Sends B_r rows to each other rank."""
    if world.size == 1:
        return x
    most = max(counts)
    padded = x.new_zeros((most, *x.shape[1:]))
    padded[: len(x)] = x
    gathered = x.new_empty((world.size * most, *x.shape[1:]))
    _all_gather(gathered, padded, group=world.group)
    if min(counts) == most:
        return gathered
    blocks = gathered.split(most)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def scatter_sum(
    x: Tensor,  # [sum B_r, ...], this rank's addends for the rows of all
    counts: Sequence[int],  # [N]
    world: World,
) -> Tensor:  # [B_r, ...]
    """The sum over ranks, of this rank's rows. Sends what it has for those of each other rank."""
    if world.size == 1:
        return x
    most = max(counts)
    mine = counts[world.rank]
    if min(counts) != most:
        padded = x.new_zeros((world.size * most, *x.shape[1:]))
        for block, rows in zip(padded.split(most), x.split(list(counts)), strict=True):
            block[: len(rows)] = rows
        x = padded
    summed = x.new_empty((most, *x.shape[1:]))
    _reduce_scatter(summed, x.contiguous(), group=world.group)
    return summed[:mine]


def sum_(x: Tensor, world: World) -> Tensor:
    """The sum over ranks, in place. Sends x."""
    if world.size > 1:
        dist.all_reduce(x, group=world.group)
    return x


def gather_labels(labels: SparseLabels, counts: Sequence[int], world: World) -> SparseLabels:
    """The positives of all ranks' rows, in order of rank. Sends the CSR of this rank's rows."""
    if world.size == 1:
        return labels
    per_row = gather_rows(labels.counts(), counts, world)
    indptr = torch.zeros(len(per_row) + 1, dtype=torch.int64, device=per_row.device)
    torch.cumsum(per_row, 0, out=indptr[1:])
    ends = torch.tensor(list(counts)).cumsum(0)
    sizes = torch.diff(indptr[ends], prepend=indptr[:1])
    indices = gather_rows(labels.indices, sizes.tolist(), world)
    return SparseLabels(indptr, indices, labels.num_labels)


def merge_topk(best: TopK, world: World) -> TopK:
    """The best K of all shards for the same rows [B, K] on every rank. Sends them to each rank.

    Labels are those of the whole, and no two shards have one in common.
    """
    if world.size == 1:
        return best
    rows = [len(best.labels)] * world.size
    scores = gather_rows(best.scores, rows, world).split(rows)
    labels = gather_rows(best.labels, rows, world).split(rows)
    merged = best if world.rank == 0 else TopK(scores[0], labels[0])
    for other in range(1, world.size):
        merged = merged.merge(TopK(scores[other], labels[other]))
    return merged


def agreed(value: Any, world: World) -> Any:
    """Rank 0's value, plain enough for JSON, on all ranks. Sends it once: for short ones."""
    if world.size == 1:
        return value
    text = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
    size = torch.tensor([len(text)])
    dist.broadcast(size, group_src=0, group=world.group)
    if world.rank != 0:
        text = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, group_src=0, group=world.group)
    return json.loads(bytes(text.tolist()))


def gather_values(value: Any, world: World) -> list[Any]:
    """Every rank's value, plain enough for JSON, in order of rank. Sends it to each other rank."""
    if world.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
    counts = counts_of(len(text), world)
    texts = gather_rows(text, counts, world).split(counts)
    return [json.loads(bytes(text.tolist())) for text in texts]


def agreed_tensor(x: Tensor | None, world: World) -> Tensor:
    """Rank 0's tensor of the CPU on all ranks; what the others give is not read. Sends it once."""
    if world.size == 1:
        assert x is not None
        return x
    shape, name = agreed(None if x is None else [list(x.shape), str(x.dtype)], world)
    if world.rank != 0:
        x = torch.empty(shape, dtype=getattr(torch, name.removeprefix("torch.")))
    assert x is not None
    dist.broadcast(x, group_src=0, group=world.group)
    return x


def _all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    # torch 2.13 gave it another name and warns at the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, x, group=group)
