"""The field's metrics from streamed top-k predictions, in memory that does not grow with rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmc.evaluation.bootstrap import PoissonBootstrap
from xmc.evaluation.frequency import BINS, frequency_bins
from xmc.evaluation.propensity import Propensity
from xmc.evaluation.ranking import (
    Array,
    Bools,
    Ints,
    bin_columns,
    denominator,
    largest_per_row,
    membership,
    propensity_columns,
    ranking_columns,
)
from xmc.types import Batch, SparseLabels, TopK

LEVEL = 0.95
_ROWS = 4096  # rows scored at a time, whatever the size of an update


@dataclass(frozen=True)
class Scores:
    """Metrics as fractions (0.5 is 50%), with what is needed to read them."""

    values: dict[str, float]
    """By name, such as "P@1" or "R@5/tail"; nan where no row defines the metric."""
    intervals: dict[str, tuple[float, float]]
    """95% bootstrap intervals; none for coverage and macro-F1, which are no sums over rows."""
    counts: dict[str, int]
    """rows, empty_rows (of them without labels), scored_rows, short_rows (fewer predictions than
    the largest k), labels, test_labels (on at least one row)."""
    ks: tuple[int, ...]
    empty_rows: str
    """"kept" (they count as 0) or "dropped"."""
    propensity: Propensity | None
    """What weighs the PS metrics, where its constants are known."""
    bins: dict[str, int]
    """Number of labels in each frequency bin."""
    threshold: float | None
    """Least score of a label that F1 counts as predicted."""
    replicates: int
    seed: int


class MetricAccumulator:
    """Streaming metrics of top-k predictions.

    At each k of `ks`, over N rows with true labels y:
      P@k            hits / k, whatever the number of true labels or of predictions
      nDCG@k         DCG with 1/log2(rank + 1), over that of min(k, |y|) hits on top
      R@k            hits / |y|
      RP@k           hits / min(k, |y|)
      abandonment@k  share of rows without a hit
      coverage@k     share of the labels on at least one row that are hit at least once
      PSP@k, PSnDCG@k, PSR@k   with `inv_propensity`: hits weighted by it, divided by the same mean
                     for the best ranking there is (a ratio of means, not a mean of ratios)
      R@k/head, /torso, /tail  with `frequencies` (of the training rows): recall of the labels of
                     one bin, over the rows that carry one (`frequency_bins` says how they are cut)
      micro-F1, macro-F1       with `threshold`: a label is predicted if it is in the top-k given
                     and its score is at least the threshold; macro-F1 is over the labels that
                     occur or are predicted, no other has an F1

    Rows without labels count as 0 (1 in abandonment), or are left out with `drop_empty`. Padding
    (label -1) is never relevant; ties are in the order of the TopK, the lower label first.
    `bootstrap` is the number of replicates for 95% intervals (1000 is usual), 0 for none.

    Keeps sums and a few arrays of length L.
    """

    def __init__(
        self,
        ks: Iterable[int] = (1, 3, 5, 10),
        *,
        inv_propensity: Tensor | Propensity | None = None,  # [L]
        frequencies: Tensor | None = None,  # [L]
        threshold: float | None = None,
        drop_empty: bool = False,
        bootstrap: int = 0,
        seed: int = 0,
    ) -> None:
        self.ks = tuple(sorted(set(ks)))
        if not self.ks or self.ks[0] < 1:
            raise ValueError(f"expected ks of at least 1, got {list(self.ks)}")
        if bootstrap < 0:
            raise ValueError(f"expected bootstrap of at least 0 replicates, got {bootstrap}")
        self.propensity = inv_propensity if isinstance(inv_propensity, Propensity) else None
        if isinstance(inv_propensity, Propensity):
            inv_propensity = inv_propensity.inverse
        self._inverse = None if inv_propensity is None else _gains(inv_propensity)
        self._bins = None
        if frequencies is not None:
            self._bins = frequency_bins(frequencies.cpu().numpy().astype(np.int64))
        self.threshold = threshold
        self.drop_empty = drop_empty
        self.seed = seed
        self._bootstrap = PoissonBootstrap(bootstrap, seed) if bootstrap else None
        self._names: list[str] = []  # of the columns
        self._sums: Array | None = None
        self._rows = self._empty = self._short = 0
        self._labels: _LabelCounts | None = None

    def update(self, topk: TopK, labels: SparseLabels) -> None:
        """Add the predictions for some rows and their true labels, in the same order."""
        topk = TopK(topk.scores.detach().float().cpu(), topk.labels.long().cpu())
        labels = labels.to("cpu")
        self._check(topk, labels)
        if self._labels is None:
            self._labels = _LabelCounts(labels.num_labels)
        for start in range(0, len(labels), _ROWS):
            stop = min(start + _ROWS, len(labels))
            part = TopK(topk.scores[start:stop], topk.labels[start:stop])
            self._add(part, labels.slice(start, stop))

    def compute(self) -> Scores:
        """The metrics of all rows so far; raises ValueError if there is no row to score."""
        if self._labels is None or self._sums is None:
            dropped = f" ({self._empty} without labels were dropped)" if self._empty else ""
            raise ValueError(f"expected at least one row to score, got none{dropped}")
        position = {name: number for number, name in enumerate(self._names)}
        divisors = {denominator(name) for name in self._names}
        values, intervals = {}, {}
        for name in self._names:
            if name in divisors:
                continue
            pair = position[name], position[denominator(name)]
            values[name] = _ratio(self._sums[pair[0]], self._sums[pair[1]])
            if self._bootstrap is not None:
                intervals[name] = self._bootstrap.interval(*pair, LEVEL)
        for k in self.ks:
            values[f"coverage@{k}"] = self._labels.coverage(k)
        if self.threshold is not None:
            values["macro-F1"] = self._labels.macro_f1()
        bins = () if self._bins is None else np.bincount(self._bins, minlength=len(BINS)).tolist()
        return Scores(
            values=values,
            intervals=intervals,
            counts={
                "rows": self._rows,
                "empty_rows": self._empty,
                "scored_rows": self._rows - (self._empty if self.drop_empty else 0),
                "short_rows": self._short,
                "labels": len(self._labels.true),
                "test_labels": int((self._labels.true > 0).sum()),
            },
            ks=self.ks,
            empty_rows="dropped" if self.drop_empty else "kept",
            propensity=self.propensity,
            bins=dict(zip(BINS, bins, strict=False)),
            threshold=self.threshold,
            replicates=0 if self._bootstrap is None else self._bootstrap.num_replicates,
            seed=self.seed,
        )

    def _add(self, topk: TopK, labels: SparseLabels) -> None:
        counts = labels.counts()
        self._rows += len(labels)
        self._empty += int((counts == 0).sum())
        if self.drop_empty:
            kept = counts.nonzero()[:, 0]
            topk = TopK(topk.scores[kept], topk.labels[kept])
            labels = labels.rows(kept)
        if not len(labels):
            return
        assert self._labels is not None
        predicted, scores = topk.labels.numpy(), topk.scores.numpy()
        indptr, indices = labels.indptr.numpy(), labels.indices.numpy().astype(np.int64)
        hits = membership(predicted, indptr, indices, labels.num_labels)
        counted: dict[str, Array] = {}
        chosen = predicted >= 0
        if self.threshold is not None:
            chosen &= scores >= self.threshold
            counted["micro-F1"] = 2.0 * (hits & chosen).sum(1)
            counted["predicted + true"] = chosen.sum(1) + np.diff(indptr).astype(np.float64)
        self._labels.add(predicted, hits, chosen, indices)

        width = self.ks[-1]
        predicted, hits = _resize(predicted, width, -1), _resize(hits, width, False)
        self._short += int((predicted < 0).any(1).sum())
        columns = self._columns(predicted, hits, indptr, indices) | counted
        self._names = list(columns)
        block = np.stack(list(columns.values()), axis=1)
        self._sums = block.sum(0) + (0.0 if self._sums is None else self._sums)
        if self._bootstrap is not None:
            self._bootstrap.add(block)

    def _columns(
        self, predicted: Ints, hits: Bools, indptr: Ints, indices: Ints
    ) -> dict[str, Array]:
        counts = np.diff(indptr)
        columns = ranking_columns(hits, counts, self.ks)
        if self._inverse is not None:
            gains = hits * self._inverse[predicted]
            best = largest_per_row(self._inverse[indices], indptr, self.ks[-1])
            columns |= propensity_columns(gains, best, counts, self.ks)
        if self._bins is not None:
            columns |= bin_columns(
                hits, self._bins[predicted], self._bins[indices], indptr, self.ks
            )
        return columns

    def _check(self, topk: TopK, labels: SparseLabels) -> None:
        shape, num_labels = topk.labels.shape, labels.num_labels
        if len(shape) != 2 or topk.scores.shape != shape or shape[0] != len(labels):
            raise ValueError(
                f"expected scores and labels of shape [{len(labels)}, K] to match the true labels, "
                f"got {list(topk.scores.shape)} and {list(shape)}"
            )
        labels.validate()
        if self._labels is not None and len(self._labels.true) != num_labels:
            raise ValueError(
                f"expected {len(self._labels.true)} labels as in earlier updates, got {num_labels}"
            )
        for name, table in (("inv_propensity", self._inverse), ("frequencies", self._bins)):
            if table is not None and table.shape != (num_labels,):
                raise ValueError(
                    f"expected {name} of shape [{num_labels}], one for each label, "
                    f"got {list(table.shape)}"
                )
        outside = (topk.labels < -1) | (topk.labels >= num_labels)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"expected predicted labels in [0, {num_labels}) or -1 for padding, "
                f"row {row} has {int(topk.labels[row, column])}"
            )
        nan = topk.scores.isnan().any(1)
        if bool(nan.any()):
            raise ValueError(
                f"expected scores that are numbers, row {int(nan.nonzero()[0])} has NaN"
            )
        falling = topk.scores[:, 1:] <= topk.scores[:, :-1]
        if not bool(falling.all()):
            row = int((~falling).nonzero()[0, 0])
            raise ValueError(f"expected scores in descending order, row {row} has not")
        in_order = topk.labels.sort(1).values
        repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
        if bool(repeated.any()):
            row, column = repeated.nonzero()[0].tolist()
            raise ValueError(
                f"expected distinct predicted labels in a row, row {row} repeats "
                f"{int(in_order[row, column])}"
            )


def evaluate(
    topk_of: Callable[[Batch], TopK],
    batches: Iterable[Batch],
    accumulator: MetricAccumulator,
    *,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Score every batch and compute the metrics; `progress` is told the rows of each batch.

    Filtered labels are the business of `topk_of`: they have to go before the top-k is taken.
    """
    with torch.no_grad():
        for batch in batches:
            accumulator.update(topk_of(batch), batch.labels)
            if progress is not None:
                progress(len(batch))
    return accumulator.compute()


class _LabelCounts:
    """What the metrics by label need: a few arrays [L]."""

    def __init__(self, num_labels: int) -> None:
        self.true = np.zeros(num_labels, dtype=np.int64)
        self.predicted = np.zeros(num_labels, dtype=np.int64)
        self.both = np.zeros(num_labels, dtype=np.int64)
        self.best_rank = np.full(num_labels, np.iinfo(np.int32).max, dtype=np.int32)

    def add(self, predicted: Ints, hits: Bools, chosen: Bools, indices: Ints) -> None:
        np.add.at(self.true, indices, 1)
        np.add.at(self.predicted, predicted[chosen], 1)
        np.add.at(self.both, predicted[chosen & hits], 1)
        rows, ranks = hits.nonzero()
        np.minimum.at(self.best_rank, predicted[rows, ranks], ranks.astype(np.int32))

    def coverage(self, k: int) -> float:
        return _ratio((self.best_rank < k).sum(), (self.true > 0).sum())

    def macro_f1(self) -> float:
        total = self.predicted + self.true
        seen = total > 0
        return _ratio((2 * self.both[seen] / total[seen]).sum(), seen.sum())


def _gains(inv_propensity: Tensor) -> Array:
    gains: Array = inv_propensity.detach().cpu().to(torch.float64).numpy()
    if not (np.isfinite(gains) & (gains > 0)).all():
        raise ValueError("expected finite, positive inverse propensities")
    return gains


def _resize(values: Any, width: int, fill: int) -> Any:
    """Columns cut or padded to `width`."""
    missing = max(width - values.shape[1], 0)
    return np.pad(values[:, :width], ((0, 0), (0, missing)), constant_values=fill)


def _ratio(numerator: float, below: float) -> float:
    return float(numerator / below) if below else math.nan
