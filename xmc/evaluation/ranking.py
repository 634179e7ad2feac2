"""What each row of a top-k contributes to each metric, without a loop over rows.

Definitions follow the field's reference library (pyxclib, `xc_metrics`). A metric is the ratio of
two sums over rows: that of a numerator column and that of a denominator column, "rows" (ones)
where the metric is a plain mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xmc.evaluation.frequency import BINS

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def membership(
    predicted: Ints,  # [B, K], -1 for padding
    indptr: Ints,  # [B+1]
    indices: Ints,  # [nnz], sorted within a row
    num_labels: int,
) -> Bools:  # [B, K]
    """Whether each prediction is a true label of its row."""
    offset = np.arange(len(predicted), dtype=np.int64)[:, None] * num_labels
    truth = np.repeat(offset[:, 0], np.diff(indptr)) + indices  # increasing
    if not len(truth):
        return np.zeros(predicted.shape, dtype=np.bool_)
    keys = predicted + offset
    found = truth[np.minimum(np.searchsorted(truth, keys), len(truth) - 1)] == keys
    return found & (predicted >= 0)


def largest_per_row(
    values: Array,  # [nnz]
    indptr: Ints,  # [B+1]
    k: int,
) -> Array:  # [B, k]
    """The k largest values of each row of a CSR, descending, padded with 0."""
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    order = np.lexsort((-values, rows))
    position = np.arange(len(values)) - indptr[rows]
    best = np.zeros((len(indptr) - 1, k))
    inside = position < k
    best[rows[inside], position[inside]] = values[order][inside]
    return best


def ranking_columns(
    hits: Bools,  # [B, K], K at least the largest of ks
    counts: Ints,  # [B], true labels of each row
    ks: tuple[int, ...],
) -> dict[str, Array]:
    """P, nDCG, R, RP and abandonment at each k, and "rows". A row without labels scores 0."""
    positive = np.maximum(counts, 1)
    found, discounted = hits.cumsum(1), (hits * _discount(hits.shape[1])).cumsum(1)
    ideal = _discount(hits.shape[1]).cumsum()
    columns = {"rows": np.ones(len(hits))}
    for k in ks:
        at_k, reachable = found[:, k - 1], np.minimum(positive, k)
        columns[f"P@{k}"] = at_k / k
        columns[f"nDCG@{k}"] = discounted[:, k - 1] / ideal[reachable - 1]
        columns[f"R@{k}"] = at_k / positive
        columns[f"RP@{k}"] = at_k / reachable
        columns[f"abandonment@{k}"] = (at_k == 0).astype(np.float64)
    return columns


def propensity_columns(
    gains: Array,  # [B, K], inverse propensity of each prediction that is a true label, else 0
    best: Array,  # [B, K], the largest inverse propensities among the true labels, descending
    counts: Ints,  # [B]
    ks: tuple[int, ...],
) -> dict[str, Array]:
    """Numerators "PSP@k", "PSnDCG@k", "PSR@k" and their ideals, "ideal PSP@k" and so on."""
    positive = np.maximum(counts, 1)
    discount = _discount(gains.shape[1])
    ideal = discount.cumsum()
    columns = {}
    for prefix, values in (("", gains), ("ideal ", best)):
        total, discounted = values.cumsum(1), (values * discount).cumsum(1)
        for k in ks:
            norm = ideal[np.minimum(positive, k) - 1]
            columns[f"{prefix}PSP@{k}"] = total[:, k - 1] / k
            columns[f"{prefix}PSnDCG@{k}"] = discounted[:, k - 1] / norm
            columns[f"{prefix}PSR@{k}"] = total[:, k - 1] / positive
    return columns


def bin_columns(
    hits: Bools,  # [B, K]
    predicted_bins: npt.NDArray[np.int8],  # [B, K]
    true_bins: npt.NDArray[np.int8],  # [nnz]
    indptr: Ints,  # [B+1]
    ks: tuple[int, ...],
) -> dict[str, Array]:
    """Numerators "R@k/head" and so on: recall of the labels of one frequency bin.

    The mean is over the rows that carry a label of the bin, column "rows/head".
    """
    rows = np.repeat(np.arange(len(hits)), np.diff(indptr))
    columns = {}
    for number, name in enumerate(BINS):
        count = np.bincount(rows[true_bins == number], minlength=len(hits))
        found = (hits & (predicted_bins == number)).cumsum(1)
        columns[f"rows/{name}"] = (count > 0).astype(np.float64)
        for k in ks:
            columns[f"R@{k}/{name}"] = found[:, k - 1] / np.maximum(count, 1)
    return columns


def denominator(metric: str) -> str:
    """The column whose sum divides that of `metric`."""
    if metric == "micro-F1":
        return "predicted + true"
    if metric.startswith("PS"):
        return f"ideal {metric}"
    return f"rows/{metric.partition('/')[2]}" if "/" in metric else "rows"


def _discount(k: int) -> Array:
    return 1.0 / np.log2(np.arange(2, k + 2))
