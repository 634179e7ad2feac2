"""Representations beside the features of the bags they were made of, as a classifier reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xmc.distributed.collectives import World, counts_of, gather_rows
from xmc.types import Bag, BagReps


def join_bag(
    reps: Tensor,  # [B, D]
    bag: Bag,  # B rows
    scale: float,
    *,
    least: int = 0,
) -> BagReps:
    """`reps` with a column for every feature that occurs in `bag`, differentiable in `reps`.

    One column of zeros follows, or as many as make `least` columns. Bags count `scale` times, as
    vectors of length one. Raises ValueError where rows differ.
    """
    if len(reps) != len(bag):
        raise ValueError(f"expected {len(reps)} bags to match the representations, got {len(bag)}")
    active, columns = bag.ids.unique(return_inverse=True)
    rows = torch.arange(len(bag), device=bag.ids.device).repeat_interleave(bag.offsets.diff())
    squares = torch.zeros(len(bag), device=bag.ids.device)
    squares.index_add_(0, rows, bag.weights.float().square())
    width = max(len(active) + 1, least - reps.shape[1])
    values = torch.zeros(len(bag), width, device=reps.device, dtype=reps.dtype)
    lengths = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    values[rows, columns] = (scale * bag.weights.float() / lengths[rows]).to(reps.dtype)
    return BagReps(torch.cat([reps, values], 1), active)


def gather_bag_reps(
    reps: BagReps,  # B_r rows
    num_reps: int,  # D
    counts: Sequence[int],  # [N], rows of every rank
    world: World,
    *,
    least: int = 0,
) -> BagReps:
    """The rows of all ranks, in order of rank, with the features that occur in any of them.

    `least` as in `join_bag`. Sends the representations [B_r, D] to each other rank, and row,
    feature and weight of what is not 0 in the bags.
    """
    if world.size == 1:
        return reps
    dense = gather_rows(reps.values[:, :num_reps].contiguous(), counts, world)
    features = reps.values[:, num_reps : num_reps + len(reps.active)]
    rows, columns = features.nonzero(as_tuple=True)
    sizes = counts_of(len(rows), world)
    weights = gather_rows(features[rows, columns], sizes, world)
    ids = gather_rows(reps.active[columns], sizes, world)
    rows = gather_rows(rows + sum(counts[: world.rank]), sizes, world)
    active = gather_rows(reps.active, counts_of(len(reps.active), world), world).unique()
    values = dense.new_zeros(len(dense), max(len(active) + 1, least - num_reps))
    values[rows, torch.searchsorted(active, ids)] = weights
    return BagReps(torch.cat([dense, values], 1), active)
