"""Label frequency: the baseline that needs no model, and the bins of a long tail."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xmc.types import TopK

BINS = ("head", "torso", "tail")


def frequency_topk(
    frequencies: Tensor,  # [L], training rows that carry each label
    k: int,
    num_rows: int,
) -> TopK:
    """The k most frequent labels, the same for each of `num_rows` rows; the score is the count.

    Rows share storage, so the cost is O(L log L) whatever the number of rows. With fewer than k
    labels the rest is padding.
    """
    if frequencies.dim() != 1:
        raise ValueError(f"expected frequencies of shape [L], got {list(frequencies.shape)}")
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    scores = torch.full((k,), -torch.inf)
    labels = torch.full((k,), -1, dtype=torch.int64)
    best = frequencies.argsort(descending=True, stable=True)[:k].cpu()
    labels[: len(best)] = best
    scores[: len(best)] = frequencies.cpu()[best].float()
    return TopK(scores.expand(num_rows, k), labels.expand(num_rows, k))


def frequency_bins(
    frequencies: npt.NDArray[np.int64],  # [L], training rows that carry each label
) -> npt.NDArray[np.int8]:  # [L]: 0 head, 1 torso, 2 tail
    """Bins of equal volume, as the field's plots by label quantile use them.

    Labels are sorted by training frequency, ties by the lower id. The head is the fewest labels
    that cover a third of all training occurrences, head and torso the fewest that cover two
    thirds, the tail all others, labels never seen in training among them.
    """
    order = np.argsort(-frequencies, kind="stable")
    sorted_counts = frequencies[order]
    before = np.cumsum(sorted_counts) - sorted_counts
    # Integers, so that a share of exactly one third does not hang on rounding.
    total = int(sorted_counts.sum())
    bins = np.empty(len(frequencies), dtype=np.int8)
    bins[order] = (3 * before >= total).astype(np.int8) + (3 * before >= 2 * total)
    return bins
