"""Several trained models of the same labels as one: a weighted mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xmc.model import XMCModel
from xmc.runs import check_same_labels
from xmc.types import Bag, SparseLabels, Tokens, TopK

CANDIDATES = 100  # of each member, for each row


class Ensemble:
    """Models that answer together, each with features of its own.

    For each row, the `candidates` best labels of every member are joined. Every member scores all
    of them exactly, its own or not, and turns scores into probabilities (`XMCModel.probabilities`);
    a label's score is the mean of these, by the members' weights, which are divided by their sum.
    Ties go to the lower label. A label that is among the best of no member is not found: with more
    candidates than labels the result is exact.

    Raises RunError where the members' labels differ, ValueError for weights that do not fit.
    """

    def __init__(
        self,
        members: Sequence[XMCModel],
        weights: Sequence[float] | None = None,  # one a member, above 0; None: all equal
        *,
        candidates: int = CANDIDATES,
    ) -> None:
        if not members:
            raise ValueError("expected at least one model to combine, got none")
        for number, member in enumerate(members[1:], start=2):
            check_same_labels(member.labels, members[0].labels, f"model {number}", "the first")
        if candidates < 1:
            raise ValueError(f"expected candidates of at least 1, got {candidates}")
        self.members = list(members)
        self.weights = _normalised(weights, len(members))
        self.candidates = candidates

    @property
    def labels(self) -> Sequence[str]:
        return self.members[0].labels

    def transform(self, texts: list[str]) -> list[Bag | Tokens]:
        """The texts as inputs of each member."""
        return [member.features.transform(texts) for member in self.members]

    @torch.inference_mode()
    def topk(
        self,
        inputs: Sequence[Bag | Tokens],  # of each member, the same B rows
        k: int,
        exclude: SparseLabels | None = None,  # labels never returned for a row
    ) -> TopK:
        """The k best labels of each row with their mean probabilities."""
        wanted = min(max(k, self.candidates), len(self.labels))
        reps = [member.reps(own) for member, own in zip(self.members, inputs, strict=True)]
        pairs = list(zip(self.members, reps, strict=True))
        labels = union([member.head.topk(own, wanted, exclude).labels for member, own in pairs])
        total = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        for (member, own), weight in zip(pairs, self.weights, strict=True):
            scores = member.head.candidate_scores(own, labels)
            total += weight * member.probabilities(scores).double()
        scores = total.float().masked_fill(labels < 0, -torch.inf)
        return TopK(scores, labels).ranked().resized(k)


def union(parts: Sequence[Tensor]) -> Tensor:  # [B, C] each -> [B, C'] int64
    """The distinct labels of each row of all parts, ascending, then -1 for padding."""
    last = torch.iinfo(torch.int64).max
    joined = torch.cat(list(parts), 1)
    labels = joined.masked_fill(joined < 0, last).sort(1).values
    repeated = torch.zeros_like(labels, dtype=torch.bool)
    repeated[:, 1:] = labels[:, 1:] == labels[:, :-1]
    labels = labels.masked_fill(repeated, last).sort(1).values
    width = int((labels < last).sum(1).max()) if len(labels) else 0
    labels = labels[:, :width]
    return labels.masked_fill(labels == last, -1)


def _normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"expected {count} weights, one a model, got {len(weights)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"expected finite weights above 0, got {list(weights)}")
    return [weight / sum(weights) for weight in weights]
