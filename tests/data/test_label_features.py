"""Label features against the textbook expression on dense float64 matrices."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from xmc.data.batches import BagStore, Dataset, TokenStore
from xmc.data.label_features import label_features
from xmc.data.tokens import Padding
from xmc.types import SparseLabels

N, L, V = 60, 17, 40


def random_rows(seed: int, num_rows: int, high: int, most: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, most + 1, num_rows)
    return [sorted(generator.choice(high, size, replace=False).tolist()) for size in sizes]


def csr(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    indptr = torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()])
    return indptr, torch.tensor([i for row in rows for i in row], dtype=torch.int32)


@pytest.fixture
def bags() -> Dataset:
    """Rows with no features, rows with no labels; label 0 is frequent, 5 and L - 1 have no row."""
    indptr, ids = csr(random_rows(1, N, V, 9))
    values = torch.rand(len(ids), generator=torch.Generator().manual_seed(2)) + 0.1
    labels = [
        [label for label in row if label not in (5, L - 1)] for row in random_rows(3, N, L, 4)
    ]
    labels = [sorted({0, *row}) if number % 2 else row for number, row in enumerate(labels)]
    return Dataset(BagStore(indptr, ids, values, V), SparseLabels.from_lists(labels, L))


def unit(matrix: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.divide(matrix, lengths, out=np.zeros_like(matrix), where=lengths > 0)


def dense_truth(data: Dataset) -> np.ndarray:
    """Y^T X of all rows, [L, V] float64."""
    x = np.zeros((len(data), V))
    for row in range(len(data)):
        bag = data.features.rows(torch.tensor([row]))
        x[row, bag.ids.numpy()] = bag.weights.double().numpy()  # type: ignore[union-attr]
    return unit(data.labels.to_dense().double().numpy().T @ unit(x))


@pytest.mark.parametrize("chunk_entries", [1, 7, 50, 1 << 22])
def test_bags_are_summed_over_the_rows_of_a_label(bags: Dataset, chunk_entries: int) -> None:
    found = label_features(bags, max_terms=None, chunk_entries=chunk_entries)
    assert found.dtype == np.float32
    assert found.indices.dtype == np.int32
    assert found.has_canonical_format
    np.testing.assert_allclose(found.toarray(), dense_truth(bags), rtol=1e-6, atol=1e-7)
    assert found[[5, L - 1]].nnz == 0


def test_only_the_rows_of_a_subset_count(bags: Dataset) -> None:
    subset = bags.subset(torch.arange(0, N, 3).flip(0))
    found = label_features(subset, max_terms=None, chunk_entries=20)
    np.testing.assert_allclose(found.toarray(), dense_truth(subset), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_terms", [1, 4])
def test_the_largest_terms_stay_and_rows_have_length_one(bags: Dataset, max_terms: int) -> None:
    truth = dense_truth(bags)
    expected = np.zeros_like(truth)
    for label, row in enumerate(truth):
        best = sorted(range(V), key=lambda v: (-row[v], v))[:max_terms]
        expected[label, best] = row[best]
    found = label_features(bags, max_terms=max_terms, chunk_entries=30)
    np.testing.assert_allclose(found.toarray(), unit(expected), rtol=1e-6, atol=1e-7)
    assert np.diff(found.indptr).max() == max_terms


def test_equal_terms_are_kept_by_the_lower_feature() -> None:
    indptr, ids = csr([[2, 4, 6, 9]])
    data = Dataset(BagStore(indptr, ids, torch.ones(4), V), SparseLabels.from_lists([[0]], 1))
    assert label_features(data, max_terms=2).indices.tolist() == [2, 4]


@pytest.mark.parametrize("chunk_entries", [5, 1 << 22])
def test_token_ids_are_weighted_as_words_are(chunk_entries: int) -> None:
    generator = np.random.default_rng(7)
    texts = [[1, *generator.integers(2, V, size).tolist(), 3] for size in (4, 0, 9, 6, 2, 12)]
    labels = SparseLabels.from_lists([[0], [0, 2], [], [2], [1], [1, 2]], 4)
    indptr, ids = csr(texts)
    data = Dataset(TokenStore(indptr, ids, Padding(0)), labels)
    x = np.zeros((len(texts), V))
    for row, text in enumerate(texts):
        for token, count in Counter(text).items():
            rows_with = sum(token in other for other in texts)
            x[row, token] = (1 + math.log(count)) * (math.log(7 / (1 + rows_with)) + 1)
    expected = unit(labels.to_dense().double().numpy().T @ unit(x))
    found = label_features(data, max_terms=None, chunk_entries=chunk_entries).toarray()
    np.testing.assert_allclose(found, expected[:, : found.shape[1]], rtol=1e-6, atol=1e-7)
    assert not expected[:, found.shape[1] :].any()


def test_impossible_sizes_are_refused(bags: Dataset) -> None:
    with pytest.raises(ValueError, match="expected max_terms of at least 1, got 0"):
        label_features(bags, max_terms=0)
    with pytest.raises(ValueError, match="expected chunk_entries of at least 1, got 0"):
        label_features(bags, chunk_entries=0)
