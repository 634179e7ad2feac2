"""Data sets and batches: the right rows with their labels, in an order that can be repeated."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from xmc.config import FeatureConfig
from xmc.data.batches import (
    BagStore,
    Dataset,
    TokenStore,
    epoch_batches,
    epoch_order,
    load_dataset,
    train_validation_split,
)
from xmc.data.features import fit_features, load_features
from xmc.data.formats import DataError
from xmc.data.tokens import Padding
from xmc.types import Bag, SparseLabels, Tokens

ROWS = [[3, 5], [], [0], [1, 2, 9]]
LABELS = [[0], [1, 2], [], [0, 2]]


def dataset() -> Dataset:
    indptr = torch.tensor([0, 2, 2, 3, 6])
    flat = torch.tensor([3, 5, 0, 1, 2, 9], dtype=torch.int32)
    store = BagStore(indptr, flat, flat.float() / 10, 10)
    exclude = SparseLabels.from_lists([[2], [], [], [1]], 3)
    return Dataset(store, SparseLabels.from_lists(LABELS, 3), exclude, "key")


def rows_of(ids: torch.Tensor, offsets: torch.Tensor) -> list[list[int]]:
    bounds = offsets.tolist()
    return [ids[a:b].tolist() for a, b in pairwise(bounds)]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1, 3], [1], []])
def test_a_batch_holds_the_rows_asked_for(rows: list[int]) -> None:
    data = dataset()
    batch = data.batch(torch.tensor(rows, dtype=torch.int64))
    assert isinstance(batch.inputs, Bag)
    assert rows_of(batch.inputs.ids, batch.inputs.offsets) == [ROWS[row] for row in rows]
    assert batch.inputs.ids.dtype == torch.int64
    torch.testing.assert_close(batch.inputs.weights, batch.inputs.ids.float() / 10)
    assert rows_of(batch.labels.indices, batch.labels.indptr) == [LABELS[row] for row in rows]
    assert batch.exclude is not None
    excluded = [[2], [], [], [1]]
    assert rows_of(batch.exclude.indices, batch.exclude.indptr) == [excluded[row] for row in rows]
    assert batch.rows.tolist() == rows


def test_a_subset_is_the_same_rows_and_shares_the_features() -> None:
    data = dataset()
    subset = data.subset(torch.tensor([3, 0, 2]))
    assert (len(subset), subset.num_labels, subset.key) == (3, 3, "key")
    batch = subset.batch(torch.tensor([0, 2]))
    assert isinstance(batch.inputs, Bag)
    assert rows_of(batch.inputs.ids, batch.inputs.offsets) == [ROWS[3], ROWS[2]]
    assert rows_of(batch.labels.indices, batch.labels.indptr) == [LABELS[3], LABELS[2]]
    assert subset.label_frequencies().tolist() == [2, 0, 1]
    deeper = subset.subset(torch.tensor([1])).batch(torch.tensor([0]))
    assert isinstance(deeper.inputs, Bag)
    assert rows_of(deeper.inputs.ids, deeper.inputs.offsets) == [ROWS[0]]
    assert isinstance(subset.features, BagStore)
    assert isinstance(data.features, BagStore)
    assert subset.features.ids.data_ptr() == data.features.ids.data_ptr()


def test_batches_cover_every_row_once() -> None:
    seen = [batch.rows.tolist() for batch in dataset().batches(3)]
    assert seen == [[0, 1, 2], [3]]


def test_wrong_rows_and_sizes_are_refused() -> None:
    data = dataset()
    with pytest.raises(ValueError, match=r"expected rows in \[0, 4\), got 1 to 4"):
        data.batch(torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"expected rows in \[0, 4\), got -1 to 2"):
        data.batch(torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"labels and filter, got \[4, 3\]"):
        Dataset(data.features, data.labels.slice(0, 3))


def test_tokens_are_padded_to_the_longest_row() -> None:
    store = TokenStore(
        torch.tensor([0, 2, 2, 5]), torch.arange(1, 6, dtype=torch.int32), Padding(99)
    )
    tokens = store.rows(torch.tensor([2, 1, 0]))
    assert isinstance(tokens, Tokens)
    assert tokens.ids.tolist() == [[3, 4, 5], [99, 99, 99], [1, 2, 99]]
    assert tokens.mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert store.view(torch.tensor([0])).rows(torch.tensor([0])).ids.tolist() == [[1, 2]]
    assert store.rows(torch.tensor([1])).ids.tolist() == [[99]]
    assert store.rows(torch.tensor([], dtype=torch.int64)).ids.shape == (0, 1)


def test_epoch_orders_are_permutations_that_repeat() -> None:
    first = epoch_order(1000, seed=3, epoch=0)
    assert sorted(first.tolist()) == list(range(1000))
    torch.manual_seed(77)  # the global generator plays no part
    assert torch.equal(first, epoch_order(1000, seed=3, epoch=0))
    others = [epoch_order(1000, 3, 1), epoch_order(1000, 4, 0), epoch_order(1000, 0, 3)]
    for other in others:
        # Unrelated permutations agree in about one place.
        assert int((other == first).sum()) < 12


def test_epoch_batches_go_on_where_they_stopped() -> None:
    order = epoch_order(10, 1, 1)
    batches = list(epoch_batches(order, 4))
    assert [len(rows) for rows in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), order)
    for start in range(4):
        rest = list(epoch_batches(order, 4, start=start))
        assert [rows.tolist() for rows in rest] == [rows.tolist() for rows in batches[start:]]
    with pytest.raises(ValueError, match=r"expected start in \[0, 3\] \(batches\), got 4"):
        list(epoch_batches(order, 4, start=4))
    with pytest.raises(ValueError, match="expected a batch size of at least 1, got 0"):
        list(epoch_batches(order, 0))


def test_validation_rows_are_held_out_the_same_way_every_time() -> None:
    training, validation = train_validation_split(1000, 0.1, seed=5)
    assert len(validation) == 100
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(1000))
    assert bool((training[1:] > training[:-1]).all())
    assert bool((validation[1:] > validation[:-1]).all())
    again = train_validation_split(1000, 0.1, seed=5)
    assert torch.equal(validation, again[1])
    assert not torch.equal(validation, train_validation_split(1000, 0.1, seed=6)[1])


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.001, 1), (0.5, 2), (0.99, 3)])
def test_small_shares_hold_out_a_row_and_leave_one(share: float, held_out: int) -> None:
    training, validation = train_validation_split(4, share, seed=0)
    assert (len(training), len(validation)) == (4 - held_out, held_out)


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a validation share in \[0, 1\), got 1"):
        train_validation_split(10, 1.0, seed=0)
    with pytest.raises(ValueError, match="expected at least 2 rows to hold out a share, got 1"):
        train_validation_split(1, 0.1, seed=0)


def folder_with_filters(folder: Path) -> Path:
    folder.mkdir()
    rows = [("a b", [0, 1]), ("b c", [1, 2]), ("c a", [2])]
    lines = [json.dumps({"title": text, "target_ind": labels}) for text, labels in rows]
    for name in ("trn.json", "tst.json"):
        (folder / name).write_text("\n".join(lines))
    (folder / "lbl.json").write_text("\n".join(f'{{"title": "l{row}"}}' for row in range(3)))
    (folder / "filter_labels_train.txt").write_text("1 1\n0 2\n")
    (folder / "filter_labels_test.txt").write_text("2 2\n")
    return folder


def test_filtered_pairs_leave_training_but_not_the_truth(tmp_path: Path) -> None:
    folder = folder_with_filters(tmp_path / "data")
    features = fit_features(FeatureConfig(), folder, cache=tmp_path / "cache")
    train = load_dataset(folder, "train", features, cache=tmp_path / "cache")
    test = load_dataset(folder, "test", features, cache=tmp_path / "cache")
    assert rows_of(train.labels.indices, train.labels.indptr) == [[0, 1], [2], [2]]
    assert rows_of(test.labels.indices, test.labels.indptr) == [[0, 1], [1, 2], [2]]
    assert train.exclude is not None
    assert test.exclude is not None
    assert rows_of(train.exclude.indices, train.exclude.indptr) == [[2], [1], []]
    assert rows_of(test.exclude.indices, test.exclude.indptr) == [[], [], [2]]
    train.exclude.validate()
    for data in (train, test):
        data.labels.validate()
        assert data.num_labels == 3


def test_a_cached_row_has_the_bits_of_prediction(tmp_path: Path) -> None:
    folder = folder_with_filters(tmp_path / "data")
    features = fit_features(FeatureConfig(ngrams=2, min_df=1), folder, cache=tmp_path / "cache")
    features.save(tmp_path / "model")
    loaded = load_features(tmp_path / "model", FeatureConfig(ngrams=2, min_df=1))
    expected = loaded.transform(["b c\n"])
    for split in ("trn", "tst"):
        data = load_dataset(folder, split, features, cache=tmp_path / "cache")
        found = data.batch(torch.tensor([1])).inputs
        assert isinstance(found, Bag)
        assert isinstance(expected, Bag)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.weights, expected.weights)
        assert len(found.ids) == 3
    with pytest.raises(DataError, match=r"expected features of .*ngrams=1.*, got .*ngrams=2"):
        load_features(tmp_path / "model", FeatureConfig(ngrams=1, min_df=1))


def test_an_empty_split_is_a_data_set_without_rows(tmp_path: Path) -> None:
    folder = folder_with_filters(tmp_path / "data")
    (folder / "val.json").write_text("")
    features = fit_features(FeatureConfig(), folder, cache=tmp_path / "cache")
    data = load_dataset(folder, "val", features, cache=tmp_path / "cache")
    assert len(data) == 0
    assert data.label_frequencies().tolist() == [0, 0, 0]
    assert list(data.batches(8)) == []
