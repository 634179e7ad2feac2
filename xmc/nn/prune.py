"""Which slots of a label lose their input: those of the smallest weights."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:  # [R, G, F] -> [R, F]
    """Sum of |w| over the G labels of a group, in float32 at least."""
    # Added one label after another, so that the sum does not depend on the size of the tile.
    score = weight[:, 0].abs().to(torch.promote_types(weight.dtype, torch.float32))
    for member in range(1, weight.shape[1]):
        score += weight[:, member].abs()
    return score


def lost_slots(
    score: Tensor,  # [R, F]
    *,
    most: int,
    below: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:  # [R, F] bool
    """The `most` slots of the lowest score in each row, ties by the lower slot.

    Of these only the ones with a score under `below`, where it is given. With a pattern, n of
    every m inputs, a block of n slots loses at most the m - n for which it has other inputs.
    """
    n, m = pattern or (0, 0)
    if 2 * n <= m:  # a block has another input for each of its slots
        lost = _lowest(score, most)
    else:
        replaceable = _lowest(score.view(-1, n), m - n).view_as(score)
        # Infinite scores of real weights sort among the masked ones: hence the second test.
        lost = _lowest(score.masked_fill(~replaceable, torch.inf), most) & replaceable
    if below is not None:
        lost &= score < below
    return lost


def most_lost(fan_in: int, in_features: int, pattern: tuple[int, int] | None = None) -> int:
    """Slots that a row can lose at once: each needs another input, and one slot always stays."""
    if pattern is None:
        spare = in_features - fan_in
    else:
        n, m = pattern
        spare = fan_in // n * min(n, m - n)
    return min(spare, fan_in - 1)


def _lowest(score: Tensor, count: int) -> Tensor:
    order = score.sort(dim=1, stable=True).indices[:, :count]
    chosen = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    return chosen.scatter_(1, order, True)
