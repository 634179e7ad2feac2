"""Streaming top-k against a full sort of dense float64 scores."""

from __future__ import annotations

import pytest
import torch

from xmc_kernels._reference.topk import from_key, order_key
from xmc_kernels.topk import fan_in_topk

SHAPES = [
    # B, D, L, F, G and k: round, odd in one, odd in all, and the corners
    (64, 128, 1024, 32, 1, 8),
    (64, 128, 1027, 32, 1, 8),
    (70, 53, 517, 17, 1, 5),
    (1, 16, 300, 5, 1, 10),
    (33, 40, 64, 1, 1, 70),
    (17, 24, 33, 24, 1, 33),
    (5, 9, 1, 4, 1, 3),
    (48, 64, 2048, 16, 4, 1),
    (7, 30, 600, 9, 6, 4),
    (64, 96, 560, 35, 10, 6),
]


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_full_sort_with_ties_to_the_lower_label(
    shape, excluding, problem, oracle, poisoned, two_threads
) -> None:
    *shape, k = shape
    p = problem(*shape).exact()
    dense = oracle.dense_weight(p.weight, p.index, shape[1])
    scores = p.x.double() @ dense.T + p.bias
    # Row 0 has every label: excluded, nothing is left of it.
    excluded = p.positives() if excluding else [[] for _ in p.x]
    want_scores, want_labels = oracle.topk(scores, k, excluded)
    exclude = (p.indptr, p.indices) if excluding else None
    for x, weight, index in (
        (p.x, p.weight, p.index),
        (p.x, dense.float(), None),
        (p.x.double(), p.weight.double(), p.index),
    ):
        bias = p.bias.to(x.dtype)
        got_scores, got_labels = fan_in_topk(x, weight, index, bias, k, exclude=exclude)
        assert got_labels.tolist() == want_labels
        assert got_scores.tolist() == want_scores
        assert got_scores.dtype == torch.float32


def test_many_labels_over_many_tiles(problem, oracle) -> None:
    p = problem(20, 2000, 3000, 3).exact()
    scores = p.x.double() @ oracle.dense_weight(p.weight, p.index, 2000).T + p.bias
    _, want = oracle.topk(scores, 100, [[] for _ in p.x])
    assert fan_in_topk(*p.layer, 100)[1].tolist() == want


def test_random_scores_equal_the_dense_ones(problem, oracle) -> None:
    p = problem(9, 64, 5000, 16)
    scores = p.x.double() @ oracle.dense_weight(p.weight, p.index, 64).T + p.bias
    want_scores, want = oracle.topk(scores, 5, [[] for _ in p.x])
    got_scores, got = fan_in_topk(*p.layer, 5)
    assert got.tolist() == want
    torch.testing.assert_close(got_scores, torch.tensor(want_scores), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_offset_moves_labels_and_their_filter(sparse, problem) -> None:
    p = problem(12, 16, 40, 16)
    index = p.index if sparse else None
    whole = fan_in_topk(p.x, p.weight, None, p.bias, 40, exclude=(p.indptr, p.indices))
    half = fan_in_topk(
        p.x,
        p.weight[25:],
        None if index is None else index[25:],
        p.bias[25:],
        15,
        exclude=(p.indptr, p.indices),
        label_offset=25,
    )
    for row in range(12):
        expected = [label for label in whole[1][row].tolist() if label >= 25]
        assert [label for label in half[1][row].tolist() if label >= 0] == expected


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_filter_stays_in_its_row(sparse) -> None:
    # Row 1 excludes label 2, the first entry after row 0's empty list.
    index = torch.zeros(4, 1, dtype=torch.uint16) if sparse else None
    exclude = (torch.tensor([0, 0, 1]), torch.tensor([2], dtype=torch.int32))
    weight = torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    _, labels = fan_in_topk(torch.ones(2, 1), weight, index, None, 2, exclude=exclude)
    assert labels.tolist() == [[2, 1], [1, 0]]


def test_bfloat16_and_no_bias(problem, oracle) -> None:
    p = problem(10, 16, 300, 4).exact()
    scores = p.x.double() @ oracle.dense_weight(p.weight, p.index, 16).T
    _, want = oracle.topk(scores, 6, [[] for _ in p.x])
    assert fan_in_topk(p.x.bfloat16(), p.weight, p.index, None, 6)[1].tolist() == want


def test_an_empty_batch() -> None:
    index = torch.zeros(4, 1, dtype=torch.uint16)
    scores, labels = fan_in_topk(torch.ones(0, 1), torch.ones(4, 1), index, None, 2)
    assert scores.shape == labels.shape == (0, 2)


def test_order_keys_sort_like_scores_then_labels() -> None:
    scores = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 3e38, -3e38, 1.0, 1.0, -torch.inf])
    labels = torch.arange(9)
    key = order_key(scores, labels)
    assert key.argsort(descending=True).tolist() == [4, 6, 7, 2, 0, 1, 3, 5, 8]
    back_scores, back_labels = from_key(key)
    assert torch.equal(back_labels, labels)
    assert torch.equal(back_scores, scores)


def test_operator_contract(problem) -> None:
    p = problem(4, 6, 10, 3)
    for exclude in ((None, None), (p.indptr, p.indices)):
        arguments = (*p.layer, None, None, 2, *exclude, 5)
        torch.library.opcheck(torch.ops.xmc.fan_in_topk.default, arguments)


def test_compiles_as_one_graph(problem) -> None:
    p = problem(6, 12, 20, 3)

    def predict(x):
        return fan_in_topk(x.tanh(), *p.layer[1:], 4)

    compiled = torch.compile(predict, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(p.x), predict(p.x))


def test_messages(problem) -> None:
    p = problem(3, 8, 5, 2)
    with pytest.raises(ValueError, match="expected k of at least 1, got 0"):
        fan_in_topk(*p.layer, 0)
    with pytest.raises(ValueError, match=r"expected label ids below 2\^31, got 5 labels from -1"):
        fan_in_topk(*p.layer, 1, label_offset=-1)
    with pytest.raises(ValueError, match=r"expected exclude with indptr of shape \[4\]"):
        fan_in_topk(*p.layer, 1, exclude=(p.indptr[:-1], p.indices))
    x = p.x.clone()
    x[1, 1] = float("nan")
    with pytest.raises(ValueError, match="expected finite features, row 1 has NaN"):
        fan_in_topk(x, *p.layer[1:], 1)
    p.index[4, 1] = 9
    with pytest.raises(ValueError, match=r"expected index values in \[0, 8\), label 4 has \d to 9"):
        fan_in_topk(*p.layer, 1)
