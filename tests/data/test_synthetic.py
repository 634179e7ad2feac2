"""Synthetic data has the frequencies and the structure it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xmc.data.batches import BagStore, Dataset
from xmc.data.synthetic import make_synthetic


def features_of(data: Dataset) -> BagStore:
    assert isinstance(data.features, BagStore)
    return data.features


def test_rows_are_valid_and_repeat() -> None:
    data = make_synthetic(20_000, 1000, 5000, labels_per_row=4, seed=1)  # two blocks
    data.labels.validate()
    counts = data.labels.counts()
    assert (int(counts.min()), int(counts.max())) == (1, 4)
    store = features_of(data)
    assert int(store.ids.min()) >= 0
    assert int(store.ids.max()) < 5000
    batch = data.batch(torch.tensor([7, 19_999]))
    for part in (batch.inputs.slice(0, 1), batch.inputs.slice(1, 2)):
        assert bool((part.ids[1:] > part.ids[:-1]).all())
        assert abs(float(part.weights.square().sum()) - 1) < 1e-5
    again = make_synthetic(20_000, 1000, 5000, labels_per_row=4, seed=1)
    assert torch.equal(store.ids, features_of(again).ids)
    assert torch.equal(data.labels.indices, again.labels.indices)
    other = make_synthetic(20_000, 1000, 5000, labels_per_row=4, seed=2)
    assert not torch.equal(data.labels.indptr, other.labels.indptr)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
def test_frequencies_follow_the_power_law(exponent: float) -> None:
    """Draws per label against the integral of x ** -exponent over [l + 1, l + 2]."""
    data = make_synthetic(200_000, 50, 100, labels_per_row=1, seed=0, exponent=exponent)
    edges = np.arange(1, 52, dtype=np.float64)
    integral = np.log(edges) if exponent == 1 else edges ** (1 - exponent) / (1 - exponent)
    expected = np.diff(integral) / (integral[-1] - integral[0]) * 200_000
    found = data.label_frequencies().numpy()
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max())


def test_labels_can_be_read_off_the_features() -> None:
    """Features of single-label rows name the label of rows of another seed."""
    train = make_synthetic(4000, 200, 20_000, labels_per_row=1, seed=0)
    test = make_synthetic(500, 200, 20_000, labels_per_row=1, seed=1)
    centroids = torch.zeros(200, 20_000)
    for data in (train,):
        store = features_of(data)
        rows = torch.repeat_interleave(torch.arange(4000), store.indptr[1:] - store.indptr[:-1])
        flat = data.labels.indices.long()[rows] * 20_000 + store.ids
        centroids.view(-1).index_add_(0, flat, store.values)
    centroids = torch.nn.functional.normalize(centroids)
    hits = 0
    for row in range(500):
        bag = test.batch(torch.tensor([row])).inputs
        scores = centroids[:, bag.ids].sum(1)
        hits += int(scores.argmax()) == int(test.labels.indices[row])
    assert hits > 480


@pytest.mark.parametrize("name", ["num_rows", "num_labels", "num_features", "labels_per_row"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"num_rows": 2, "num_labels": 2, "num_features": 2, "labels_per_row": 2, name: 0}
    with pytest.raises(ValueError, match=f"expected {name} of at least 1, got 0"):
        make_synthetic(**sizes)


def test_a_negative_exponent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an exponent of at least 0, got -1"):
        make_synthetic(2, 2, 2, exponent=-1)
