"""Features of a label: the sum of the features of the training rows that carry it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse
import torch

from xmc.data.batches import BagStore, Dataset, TokenStore
from xmc.data.progress import track
from xmc.nn.clusters import inverse_lengths

_CHUNK_ENTRIES = 1 << 22  # features gathered at a time, about 50 bytes each while they are summed


def label_features(
    data: Dataset,
    *,
    max_terms: int | None = 1000,
    chunk_entries: int = _CHUNK_ENTRIES,
) -> scipy.sparse.csr_matrix:  # [L, V] float32
    """`Y^T X` with rows of X and of the result of length one; labels without rows are empty.

    X are the data set's weighted bags. Token ids become bags with the weights that the
    vocabulary gives to words: (1 + ln frequency) * idf over the rows of `data`. Each label keeps
    its `max_terms` largest entries (None: all), ties by the lower feature.

    Goes label by label: besides the result, about `chunk_entries` features are held at a time,
    and where one label's rows alone have more, they are summed piece by piece.
    """
    if max_terms is not None and max_terms < 1:
        raise ValueError(f"expected max_terms of at least 1, got {max_terms}")
    if chunk_entries < 1:
        raise ValueError(f"expected chunk_entries of at least 1, got {chunk_entries}")
    rows, positives = data.labels.tile(0, data.num_labels)
    owners = rows[positives.argsort(stable=True)].numpy()  # the rows of label 0, of label 1, ...
    bounds = _cumulated(data.label_frequencies().numpy())
    # Number of features up to each pair of label and row.
    costs = _cumulated(_row_lengths(data.features)[owners])
    bags = _Bags(data.features, chunk_entries)
    tiles = list(_tiles(costs[bounds], chunk_entries))
    parts = []
    for start, stop in track(tiles, "Collecting label features", total=len(tiles)):
        total = scipy.sparse.csr_matrix((stop - start, bags.num_features))
        for first, last in _tiles(costs[bounds[start] : bounds[stop] + 1], chunk_entries):
            pairs = slice(bounds[start] + first, bounds[start] + last)
            within = np.clip(bounds[start : stop + 1], pairs.start, pairs.stop) - pairs.start
            total = total + _sums(bags, owners[pairs], within)
        parts.append(_unit_rows(_largest(total, max_terms)))
    data_, ids = (np.concatenate([part[field] for part in parts]) for field in (0, 1))
    indptr = _cumulated(np.concatenate([part[2] for part in parts]))
    return scipy.sparse.csr_matrix((data_, ids, indptr), shape=(data.num_labels, bags.num_features))


class _Bags:
    """Rows of a data set as weighted bags of length one."""

    def __init__(self, store: BagStore | TokenStore, chunk_entries: int) -> None:
        self._store = store
        self._idf: np.ndarray | None = None
        if isinstance(store, BagStore):
            self.num_features = store.num_features
        else:
            self._idf = _inverse_frequencies(store, chunk_entries)
            self.num_features = len(self._idf)

    def rows(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:  # [n, V] float64
        ids, values, indptr = _gather(self._store, rows)
        shape = (len(rows), self.num_features)
        bags = scipy.sparse.csr_matrix((values, ids, indptr), shape=shape)
        if self._idf is not None:
            bags.sum_duplicates()
            bags.data = (1 + np.log(bags.data)) * self._idf[bags.indices]
        bags.data *= np.repeat(inverse_lengths(bags), np.diff(bags.indptr))
        return bags


def _inverse_frequencies(store: TokenStore, chunk_entries: int) -> np.ndarray:
    """Smoothed idf of every token id up to the largest, as `xmc.data.vocab` has it for words."""
    found = np.zeros(0, np.int64)
    for start, stop in _tiles(_cumulated(_row_lengths(store)), chunk_entries):
        ids, _, indptr = _gather(store, np.arange(start, stop))
        owners = np.repeat(np.arange(stop - start), np.diff(indptr))
        pairs = np.unique((owners << 32) | ids)
        counts = np.bincount(pairs & 0xFFFFFFFF, minlength=len(found))
        counts[: len(found)] += found
        found = counts
    return np.asarray(np.log((1 + len(store)) / (1 + found)) + 1)


def _gather(
    store: BagStore | TokenStore, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [n] int64, values [n] float64 and indptr [R+1] of the given rows."""
    if isinstance(store, BagStore):
        bag = store.rows(torch.from_numpy(rows))
        return bag.ids.numpy(), bag.weights.double().numpy(), bag.offsets.numpy()
    tokens = store.rows(torch.from_numpy(rows))
    ids = tokens.ids[tokens.mask.bool()].numpy()
    return ids, np.ones(len(ids)), _cumulated(tokens.mask.sum(1).numpy())


def _row_lengths(store: BagStore | TokenStore) -> np.ndarray:
    """Number of stored ids of each row, [N] int64."""
    lengths = store.indptr.diff()
    return np.asarray((lengths if store.select is None else lengths[store.select]).numpy())


def _tiles(bounds: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Ranges that hold at most `size` each, by cumulated sizes [n+1]; one item may hold more."""
    start, count = 0, len(bounds) - 1
    while start < count:
        stop = int(np.searchsorted(bounds, bounds[start] + size, side="right")) - 1
        stop = min(max(stop, start + 1), count)
        yield start, stop
        start = stop


def _sums(bags: _Bags, owners: np.ndarray, indptr: np.ndarray) -> scipy.sparse.csr_matrix:
    """The sum of the rows `owners[indptr[i]:indptr[i + 1]]` for each label i of the tile."""
    distinct, positions = np.unique(owners, return_inverse=True)
    shape = (len(indptr) - 1, len(distinct))
    choice = scipy.sparse.csr_matrix((np.ones(len(owners)), positions, indptr), shape=shape)
    return choice @ bags.rows(distinct)


def _largest(matrix: scipy.sparse.csr_matrix, count: int | None) -> scipy.sparse.csr_matrix:
    """The `count` largest entries of each row, with sorted columns."""
    matrix.sum_duplicates()  # which sorts
    if count is None or not (np.diff(matrix.indptr) > count).any():
        return matrix
    keep = np.ones(matrix.nnz, bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > count):
        first, last = matrix.indptr[row : row + 2]
        ranked = np.argsort(-matrix.data[first:last], kind="stable")
        keep[first + ranked[count:]] = False
    indptr = _cumulated(keep)[matrix.indptr]
    parts = (matrix.data[keep], matrix.indices[keep], indptr)
    return scipy.sparse.csr_matrix(parts, shape=matrix.shape)


def _unit_rows(matrix: scipy.sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Data float32 and columns int32 of the rows at length one, and their numbers of entries."""
    counts = np.diff(matrix.indptr)
    data = matrix.data * np.repeat(inverse_lengths(matrix), counts)
    return data.astype(np.float32), matrix.indices.astype(np.int32), counts


def _cumulated(counts: np.ndarray) -> np.ndarray:
    """`[0, c0, c0 + c1, ...]` int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
