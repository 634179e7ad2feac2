import itertools
import math
import random

import numpy as np
import pytest
import scipy.sparse
import torch

from xmc.types import Bag, Batch, LabelShard, SparseLabels, Tokens, TopK

ROWS = [[3, 0], [], [1], [], [], [2, 3, 1], []]
EMPTY_KINDS = [ROWS, [[]], [[], []], [[0]], [[0, 1, 2, 3]], []]


def lists(labels):
    """The rows as lists, by plain indexing."""
    ends = labels.indptr.tolist()
    flat = labels.indices.tolist()
    return [flat[ends[row] : ends[row + 1]] for row in range(len(ends) - 1)]


def same(labels, rows):
    labels.validate()
    assert lists(labels) == rows
    assert labels.indptr.dtype == torch.int64
    assert labels.indices.dtype == torch.int32


@pytest.mark.parametrize("rows", EMPTY_KINDS)
def test_lists_become_sorted_distinct_rows(rows):
    labels = SparseLabels.from_lists([row + row[:1] for row in rows], 4)
    same(labels, [sorted(row) for row in rows])
    assert len(labels) == labels.num_rows == len(rows)
    assert labels.counts().tolist() == [len(row) for row in rows]
    flat = [label for row in rows for label in row]
    assert labels.frequencies().tolist() == [flat.count(label) for label in range(4)]
    dense = labels.to_dense()
    assert dense.shape == (len(rows), 4)
    assert [[label for label in range(4) if row[label]] for row in dense] == lists(labels)
    assert dense.sum() == len(flat)


@pytest.mark.parametrize(
    "chosen", [[], [0], [6, 0, 6], [5, 5, 1, 2], [1, 3], list(range(7)), list(range(6, -1, -1))]
)
def test_rows_picks_rows_in_the_given_order(chosen):
    labels = SparseLabels.from_lists(ROWS, 4)
    picked = labels.rows(torch.tensor(chosen, dtype=torch.int64))
    same(picked, [sorted(ROWS[row]) for row in chosen])
    assert picked.num_labels == 4


def test_slices_are_views_of_consecutive_rows():
    labels = SparseLabels.from_lists(ROWS, 4)
    for start, stop in itertools.combinations_with_replacement(range(len(ROWS) + 1), 2):
        part = labels.slice(start, stop)
        same(part, [sorted(row) for row in ROWS[start:stop]])
    part = labels.slice(2, 6)
    assert part.indices.data_ptr() == labels.indices[2:].data_ptr()
    same(part.slice(1, 4), [sorted(row) for row in ROWS[3:6]])


def test_tiles_hold_each_positive_once():
    labels = SparseLabels.from_lists(ROWS, 4)
    for start, stop in itertools.combinations_with_replacement(range(5), 2):
        rows, columns = labels.tile(start, stop)
        expected = [
            (row, label - start)
            for row, members in enumerate(ROWS)
            for label in sorted(members)
            if start <= label < stop
        ]
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
        assert rows.dtype == columns.dtype == torch.int64


@pytest.mark.parametrize("rows", [rows for rows in EMPTY_KINDS if rows])
def test_scipy_round_trip_shares_the_indices(rows):
    labels = SparseLabels.from_lists(rows, 4)
    matrix = labels.to_scipy()
    assert matrix.shape == (len(rows), 4)
    np.testing.assert_array_equal(matrix.toarray(), labels.to_dense().numpy())
    same(SparseLabels.from_scipy(matrix), lists(labels))
    if len(labels.indices):
        assert np.shares_memory(matrix.indices, labels.indices.numpy())
        back = SparseLabels.from_scipy(matrix)
        assert back.indices.data_ptr() == labels.indices.data_ptr()


def test_any_scipy_format_is_read_and_left_alone():
    dense = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=np.float32)
    expected = [[1, 3], [], [0, 1]]
    for kind in ("csr", "csc", "coo", "lil"):
        same(SparseLabels.from_scipy(scipy.sparse.csr_matrix(dense).asformat(kind)), expected)
        same(SparseLabels.from_scipy(scipy.sparse.csr_array(dense).asformat(kind)), expected)
    parts = np.ones(5), np.array([3, 1, 1, 1, 0], dtype=np.int32), np.array([0, 3, 3, 5])
    messy = scipy.sparse.csr_matrix(parts, shape=(3, 4))
    same(SparseLabels.from_scipy(messy), expected)
    assert messy.indices.tolist() == [3, 1, 1, 1, 0]


def test_stored_zeros_are_refused():
    matrix = scipy.sparse.csr_matrix(np.eye(3))
    matrix.data[1] = 0
    with pytest.raises(ValueError, match="expected no explicit zeros, got 1"):
        SparseLabels.from_scipy(matrix)
    matrix.eliminate_zeros()
    same(SparseLabels.from_scipy(matrix), [[0], [], [2]])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        (int32(0, 1), int32(0), "indptr int64 and indices int32, got torch.int32 and torch.int32"),
        (torch.tensor([0, 1]), torch.tensor([0]), "got torch.int64 and torch.int64"),
        (torch.tensor([1, 1]), int32(0), r"indptr of shape \[N \+ 1\] that starts at 0"),
        (torch.tensor([[0, 1]]), int32(0), r"indptr of shape \[N \+ 1\] that starts at 0"),
        (torch.zeros(0, dtype=torch.int64), int32(), r"indptr of shape \[N \+ 1\]"),
        (torch.tensor([0, 2, 1]), int32(0), "expected a non-decreasing indptr"),
        (torch.tensor([0, 2]), int32(0), r"indptr to end at 1 \(the number of indices\), got 2"),
        (torch.tensor([0, 1, 2]), int32(0, 4), r"label indices in \[0, 4\), got 0 to 4"),
        (torch.tensor([0, 1, 2]), int32(-1, 3), r"label indices in \[0, 4\), got -1 to 3"),
        (torch.tensor([0, 1, 1, 3]), int32(3, 2, 1), "sorted, distinct label indices, row 2 has"),
        (torch.tensor([0, 0, 2, 2]), int32(1, 1), "sorted, distinct label indices, row 1 has"),
        (torch.tensor([0, 3, 3]), int32(0, 2, 1), "sorted, distinct label indices, row 0 has"),
    ],
)
def test_validate_names_the_rule_that_is_broken(indptr, indices, message):
    with pytest.raises(ValueError, match=message):
        SparseLabels(indptr, indices, 4).validate()


def test_lists_with_a_label_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"label indices in \[0, 2\), got 1 to 2"):
        SparseLabels.from_lists([[1], [2]], 2)


def test_batches_are_cut_into_chunks_of_all_their_parts():
    bag = Bag(torch.tensor([5, 1, 2, 7, 9]), torch.tensor([0, 2, 2, 3, 5]), torch.arange(5.0))
    labels = SparseLabels.from_lists([[0], [], [1, 2], [3]], 4)
    exclude = SparseLabels.from_lists([[1], [2], [], [0]], 4)
    batch = Batch(bag, labels, torch.tensor([10, 11, 12, 13]), exclude)
    chunks = list(batch.chunks(3))
    assert [len(chunk) for chunk in chunks] == [3, 1]
    assert [chunk.rows.tolist() for chunk in chunks] == [[10, 11, 12], [13]]
    assert [lists(chunk.labels) for chunk in chunks] == [[[0], [], [1, 2]], [[3]]]
    assert [lists(chunk.exclude) for chunk in chunks] == [[[1], [2], []], [[0]]]
    assert [chunk.inputs.ids.tolist() for chunk in chunks] == [[5, 1, 2], [7, 9]]
    assert [chunk.inputs.offsets.tolist() for chunk in chunks] == [[0, 2, 2, 3], [0, 2]]
    assert [chunk.inputs.weights.tolist() for chunk in chunks] == [[0, 1, 2], [3, 4]]
    assert [len(chunk.inputs) for chunk in chunks] == [3, 1]


def test_token_batches_are_cut_too():
    ids = torch.arange(6).reshape(3, 2)
    labels = SparseLabels.from_lists([[], [0], []], 1)
    batch = Batch(Tokens(ids, torch.ones_like(ids)), labels, torch.arange(3))
    first, second = batch.chunks(2)
    assert first.inputs.ids.tolist() == [[0, 1], [2, 3]]
    assert second.inputs.ids.tolist() == [[4, 5]]
    assert second.inputs.mask.tolist() == [[1, 1]]
    assert second.exclude is None


def padded(pairs, k):
    """Best k of (score, label) pairs, by sorting."""
    best = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
    return best + [(-math.inf, -1)] * (k - len(best))


def topk_of(rows, k):
    rows = [padded(row, k) for row in rows]
    return TopK(
        torch.tensor([[score for score, _ in row] for row in rows]),
        torch.tensor([[label for _, label in row] for row in rows]),
    )


def pairs_of(topk):
    return [
        list(zip(scores, labels, strict=True))
        for scores, labels in zip(topk.scores.tolist(), topk.labels.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_merge_equals_sorting_all_candidates_in_any_grouping(seed):
    rng = random.Random(seed)
    k, num_rows, num_labels = rng.randrange(1, 6), 4, 12
    candidates = [
        [
            (rng.choice([-1.0, 0.0, 0.5, 0.5, -math.inf]), label)
            for label in range(num_labels)
            if rng.random() < rng.choice([0.2, 1.0])
        ]
        for _ in range(num_rows)
    ]
    shares = [[rng.randrange(4) for _ in range(num_labels)] for _ in range(num_rows)]
    tiles = [
        topk_of(
            [
                [pair for pair in row if share[pair[1]] == tile]
                for row, share in zip(candidates, shares, strict=True)
            ],
            k,
        )
        for tile in range(4)
    ]
    expected = [padded(row, k) for row in candidates]
    a, b, c, d = tiles
    assert pairs_of(a.merge(b).merge(c).merge(d)) == expected
    assert pairs_of(a.merge(b.merge(c.merge(d)))) == expected
    assert pairs_of(d.merge(b).merge(c.merge(a))) == expected


def test_merge_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"same shape, got \[1, 2\] and \[1, 3\]"):
        topk_of([[]], 2).merge(topk_of([[]], 3))


@pytest.mark.parametrize("num_labels", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_partition_covers_all_labels_in_order_and_evenly(num_labels, world_size):
    shards = [LabelShard.partition(num_labels, rank, world_size) for rank in range(world_size)]
    covered = [label for shard in shards for label in range(shard.start, shard.stop)]
    assert covered == list(range(num_labels))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert all(shard.num_labels == num_labels for shard in shards)
    if world_size == 1:
        assert shards == [LabelShard.whole(num_labels)]


@pytest.mark.parametrize("rank", [-1, 3])
def test_partition_refuses_a_rank_outside_the_world(rank):
    with pytest.raises(ValueError, match=rf"expected a rank in \[0, 3\), got {rank}"):
        LabelShard.partition(10, rank, 3)


def test_units_are_divided_whole() -> None:
    shards = [LabelShard.partition(22, rank, 3, unit=4) for rank in range(3)]
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 8), (8, 16), (16, 22)]


def test_labels_of_a_shard_count_from_its_first() -> None:
    labels = SparseLabels.from_lists([[0, 3, 4], [], [5], [1, 9], [2, 3, 4, 5]], 10)
    dense = labels.to_dense()
    for start, stop in ((0, 3), (3, 6), (6, 9), (9, 10), (0, 10)):
        own = labels.within(LabelShard(start, stop, 10))
        own.validate()
        assert torch.equal(own.to_dense(), dense[:, start:stop])
