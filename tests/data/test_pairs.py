"""Batches of a dual encoder: no key twice, no positive forgotten, the same again on resume."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc.data.pairs import Pairs, epoch_pairs, make_pairs, trainable_labels
from xmc.types import SparseLabels

NUM_LABELS = 12
ROWS = st.lists(st.lists(st.integers(0, NUM_LABELS - 1), max_size=4), min_size=1, max_size=20)


def check(pairs: Pairs, labels: SparseLabels) -> None:
    """Every rule of a batch, row by row."""
    keys = pairs.keys.tolist()
    assert len(set(keys)) == len(keys)
    pairs.positives.validate()
    assert (len(pairs.positives), pairs.positives.num_labels) == (len(pairs.rows), len(keys))
    for row, positives in zip(pairs.rows.tolist(), rows_of(pairs.positives), strict=True):
        own = set(rows_of(labels)[row])
        assert {keys[place] for place in positives} == own & set(keys)
        assert positives  # the sampled one at least


def rows_of(labels: SparseLabels) -> list[list[int]]:
    bounds = labels.indptr.tolist()
    return [labels.indices[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, batch_size=st.integers(1, 8), seed=st.integers(0, 5), mined=st.booleans())
def test_no_key_is_repeated_and_no_positive_forgotten(
    rows: list[list[int]], batch_size: int, seed: int, mined: bool
) -> None:
    labels = SparseLabels.from_lists(rows, NUM_LABELS)
    table = torch.randint(-1, NUM_LABELS, (len(rows), 3), dtype=torch.int32) if mined else None
    options = {"batch_size": batch_size, "seed": seed, "mined": table, "per_document": 2}
    text_ids = torch.arange(NUM_LABELS)
    batches = list(epoch_pairs(labels, text_ids, epoch=1, **options))  # type: ignore[arg-type]
    for pairs in batches:
        check(pairs, labels)
        known = {label for row in pairs.rows.tolist() for label in rows_of(labels)[row]}
        if table is not None:
            known |= set(table[pairs.rows].flatten().tolist())
        assert set(pairs.keys.tolist()) <= known
        assert pairs.key_ids.tolist() == pairs.keys.tolist()
    # Every row with a label, once; those without, never.
    trained = sorted(row for pairs in batches for row in pairs.rows.tolist())
    assert trained == [row for row, own in enumerate(rows) if own]
    # Going on after the first batch gives the same others.
    later = list(epoch_pairs(labels, text_ids, epoch=1, start=len(batches[:1]), **options))  # type: ignore[arg-type]
    for one, other in zip(batches[1:], later, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.keys.tolist() == other.keys.tolist()
        assert one.positives.indices.tolist() == other.positives.indices.tolist()


def test_each_label_of_a_document_is_drawn_equally_often() -> None:
    labels = SparseLabels.from_lists([[0, 1, 2, 3]], 4)
    counts = torch.zeros(4)
    for epoch in range(2000):
        (pairs,) = epoch_pairs(labels, torch.arange(4), batch_size=1, seed=0, epoch=epoch)
        counts[pairs.keys] += 1
    assert counts.sum() == 2000
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5  # five deviations


def test_mined_labels_are_keys_of_all_and_drawn_anew_each_epoch() -> None:
    labels = SparseLabels.from_lists([[0], [1]], 30)
    mined = torch.stack([torch.arange(2, 12), torch.arange(12, 22)]).int()
    drawn = set()
    for epoch in range(5):
        (pairs,) = epoch_pairs(
            labels, torch.arange(30), batch_size=2, seed=0, epoch=epoch, mined=mined, per_document=3
        )
        assert pairs.keys[:2].tolist() == [0, 1]
        extra = pairs.keys[2:].tolist()
        assert sum(label < 12 for label in extra) == sum(label >= 12 for label in extra) == 3
        drawn.add(tuple(extra))
    assert len(drawn) == 5


def test_a_mined_label_of_another_document_is_its_positive() -> None:
    labels = SparseLabels.from_lists([[0, 5], [1]], 6)
    pairs = make_pairs(
        torch.tensor([0, 1]),
        labels,
        torch.tensor([0, 1]),
        torch.arange(6),
        torch.tensor([5, 1, -1]),
    )
    assert pairs.keys.tolist() == [0, 1, 5]
    assert rows_of(pairs.positives) == [[0, 2], [1]]


def test_labels_of_the_same_text_share_an_id() -> None:
    """So that the loss can mask the pair of a document and its label's double."""
    labels = SparseLabels.from_lists([[3], [1]], 4)
    text_ids = torch.tensor([0, 1, 2, 1])  # label 3 is called like label 1
    pairs = make_pairs(torch.tensor([0, 1]), labels, torch.tensor([3, 1]), text_ids)
    assert pairs.keys.tolist() == [1, 3]
    assert pairs.query_ids.tolist() == pairs.key_ids.tolist() == [1, 1]
    assert rows_of(pairs.positives) == [[1], [0]]


def test_labels_without_a_text_are_left_out() -> None:
    labels = SparseLabels.from_lists([[0, 1], [1], [2], []], 3)
    left = trainable_labels(labels, torch.tensor([True, False, True]))
    left.validate()
    assert rows_of(left) == [[0], [], [2], []]


def test_a_start_beyond_the_epoch_is_refused() -> None:
    labels = SparseLabels.from_lists([[0], [1]], 2)
    with pytest.raises(ValueError, match=r"expected start in \[0, 1\] \(batches\), got 2"):
        list(epoch_pairs(labels, torch.arange(2), batch_size=2, seed=0, epoch=0, start=2))
