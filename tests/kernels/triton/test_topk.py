"""Streaming top-k in Triton against a full sort of dense float64 scores."""

from __future__ import annotations

import pytest
import torch

from xmc_kernels.layer import Layer
from xmc_kernels.topk import fan_in_topk

SHAPES = [
    # B, D, L, F, G and k: round, odd in one, odd in all, and the corners
    (4, 32, 128, 8, 1, 8),
    (3, 19, 77, 7, 1, 5),
    (1, 16, 130, 5, 1, 20),
    (3, 10, 40, 1, 1, 70),
    (2, 24, 33, 24, 1, 33),
    (2, 9, 1, 4, 1, 3),
    (3, 20, 64, 8, 16, 1),
    (2, 20, 68, 5, 17, 9),
]


@pytest.fixture
def run(device, monkeypatch):
    """The Triton launcher on chunks of few labels, from and to the CPU."""
    from xmc_kernels._triton import tiles, topk

    monkeypatch.setattr(tiles, "SCORE_BYTES", 4 * 4 * 64)

    def call(x, weight, index, bias, k, exclude=None, offset=0):
        x, *tensors = [None if t is None else t.to(device) for t in (x, weight, index, bias)]
        exclude = None if exclude is None else tuple(t.to(device) for t in exclude)
        scores, labels = topk.fan_in_topk(x, Layer(*tensors), k, exclude, offset)
        return scores.cpu(), labels.cpu()

    return call


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_full_sort_with_ties_to_the_lower_label(
    shape, excluding, problem, oracle, run, poisoned
) -> None:
    *shape, k = shape
    p = problem(*shape).exact()
    dense = oracle.dense_weight(p.weight, p.index, shape[1])
    scores = p.x.double() @ dense.T + p.bias
    # Row 0 has every label: excluded, nothing is left of it.
    want_scores, want = oracle.topk(scores, k, p.positives() if excluding else [[] for _ in p.x])
    exclude = (p.indptr, p.indices) if excluding else None
    for x, weight, index, bias in (
        (p.x, p.weight, p.index, p.bias),
        (p.x, dense.float(), None, p.bias),
    ):
        got_scores, got = run(x, weight, index, bias, k, exclude)
        assert got.tolist() == want
        assert got_scores.tolist() == want_scores
        assert got_scores.dtype == torch.float32


def test_many_labels_over_segments_and_chunks(problem, oracle, run, monkeypatch) -> None:
    from xmc_kernels._triton import tiles, topk

    p = problem(3, 50, 700, 3).exact()
    scores = p.x.double() @ oracle.dense_weight(p.weight, p.index, 50).T
    monkeypatch.setattr(tiles, "SCORE_BYTES", 4 * 3 * 320)
    monkeypatch.setattr(topk, "_SEGMENT", 64)
    monkeypatch.setattr(topk, "_LARGEST_K", 4)
    for k in (4, 50):  # in Triton, and by torch
        _, want = oracle.topk(scores, k, p.positives())
        assert run(p.x, p.weight, p.index, None, k, (p.indptr, p.indices))[1].tolist() == want


def test_offset_moves_labels_and_their_filter(problem, run) -> None:
    p = problem(3, 16, 40, 4)
    exclude = (p.indptr, p.indices)
    whole = run(p.x, p.weight, p.index, p.bias, 40, exclude)[1]
    half = run(p.x, p.weight[25:], p.index[25:], p.bias[25:], 15, exclude, 25)[1]
    for row in range(3):
        expected = [label for label in whole[row].tolist() if label >= 25]
        assert [label for label in half[row].tolist() if label >= 0] == expected


def test_an_empty_batch_and_signed_zeros(run) -> None:
    index = torch.zeros(4, 1, dtype=torch.uint16)
    scores, labels = run(torch.ones(0, 1), torch.ones(4, 1), index, None, 2)
    assert scores.shape == labels.shape == (0, 2)
    weight = torch.tensor([[-1.0], [-0.0], [0.0], [-0.0]])
    assert run(torch.ones(1, 1), weight, index, None, 4)[1].tolist() == [[1, 2, 3, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operation_on_a_gpu_equals_the_cpu(group, dtype, problem) -> None:
    p = problem(40, 300, 160_000, 20, group, density=0.001).exact()
    exclude = (p.indptr, p.indices)
    results = []
    for device in ("cpu", "cuda"):
        tensors = [t.to(device) for t in (p.x.to(dtype), p.weight.to(dtype), p.index)]
        on = tuple(t.to(device) for t in exclude)
        results.append([t.cpu() for t in fan_in_topk(*tensors, None, 10, exclude=on)])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
