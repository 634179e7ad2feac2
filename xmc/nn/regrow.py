"""Which inputs a label gains for those it lost: at random (SET) or by gradient (RigL).

Both functions choose among the inputs that a row does not read before the rewiring, so an input
that was just pruned does not come back at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmc.nn.streams import distinct_below


def grow_at_random(
    index: Tensor,  # [R, F] int64, sorted
    counts: Tensor,  # [R] int64, inputs wanted
    in_features: int,
    keys: Tensor,  # [R] int64, one random stream per row
) -> Tensor:  # [R, max(counts)] int64
    """For each row, counts[r] inputs that it does not read, every subset equally likely.

    What stands beyond a row's count means nothing.
    """
    ranks = distinct_below(in_features - index.shape[1], counts, keys)
    # The r-th input missing from the sorted row a_0 < a_1 < ... is r plus the number of i with
    # a_i - i <= r, and a_i - i never falls.
    gaps = index - torch.arange(index.shape[1], device=index.device)
    return ranks + torch.searchsorted(gaps, ranks, right=True)


def grow_by_score(
    index: Tensor,  # [R, F] int64
    counts: Tensor,  # [R] int64, inputs wanted
    score: Tensor,  # [R, D]
) -> Tensor:  # [R, max(counts)] int64
    """For each row, the counts[r] inputs of highest score that it does not read, ascending.

    Ties go to the lower input. What stands beyond a row's count means nothing.

    Raises ValueError where the best score of a row is not finite.
    """
    most, in_features = int(counts.max()), score.shape[1]
    score = score.scatter(1, index, -torch.inf)
    # One more than wanted shows whether the choice is unique: topk breaks ties as it likes.
    values, chosen = score.topk(min(most + 1, in_features), dim=1)
    finite = values[:, 0].isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"expected finite growth scores, got {float(values[row, 0])} in row {row} of a tile"
        )
    wanted = torch.arange(most, device=index.device) < counts.unsqueeze(1)
    chosen = chosen[:, :most].where(wanted, in_features).sort(dim=1).values
    last = values.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))
    beyond = values.gather(1, counts.clamp(max=values.shape[1] - 1).unsqueeze(1))
    tied = ((last == beyond).squeeze(1) & (counts > 0)).nonzero().flatten()
    if len(tied):
        chosen[tied] = _lower_of_ties(score[tied], last[tied], wanted[tied])
    return chosen


def _lower_of_ties(
    score: Tensor,  # [T, D]
    last: Tensor,  # [T, 1], score of the last one wanted
    wanted: Tensor,  # [T, P] bool
) -> Tensor:  # [T, P] int64
    """All inputs above `last`, and as many of those that equal it as are wanted, lowest first."""
    above = score > last
    room = wanted.sum(1) - above.sum(1)
    equal = score == last
    take = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room.unsqueeze(1)))
    chosen = torch.full(wanted.shape, score.shape[1], dtype=torch.int64, device=score.device)
    return chosen.masked_scatter_(wanted, take.nonzero()[:, 1])


def group_score(gradient: Tensor, group_size: int) -> Tensor:  # [R * G, D] -> [R, D]
    """Mean of |gradient| over the labels of each group; writes into `gradient`."""
    score = gradient.abs_()
    return score if group_size == 1 else score.unflatten(0, (-1, group_size)).mean(1)
