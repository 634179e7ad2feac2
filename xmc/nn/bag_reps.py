"""Representations beside the features of the bags they were made of, as a classifier reads them."""

from __future__ import annotations

import torch
from torch import Tensor

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
