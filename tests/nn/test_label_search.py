"""The nearest labels against all inner products."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from xmc.nn.label_search import ApproximateSearch, exact_topk, is_member
from xmc.types import SparseLabels


def dense_scores(x: torch.Tensor, embeddings: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return (x.double() @ embeddings.double().T).masked_fill(~known, -torch.inf)


def test_exact_search_finds_the_nearest_known_labels() -> None:
    x, embeddings = torch.randn(20, 8), F.normalize(torch.randn(300, 8), dim=1)
    known = torch.rand(300) > 0.2
    exclude = SparseLabels.from_lists([[row, 2 * row] for row in range(20)], 300)
    expected = dense_scores(x, embeddings, known)
    for row in range(20):
        expected[row, [row, 2 * row]] = -torch.inf
    best = exact_topk(x, embeddings, known, 9, exclude)
    truth = expected.topk(9)
    assert best.labels.tolist() == truth.indices.tolist()
    torch.testing.assert_close(best.scores.double(), truth.values, rtol=1e-5, atol=1e-6)


def test_fewer_known_labels_than_asked_for() -> None:
    known = torch.tensor([False, True, False, True])
    best = exact_topk(torch.tensor([[1.0, 0.0]]), torch.eye(4)[:, :2], known, 4)
    assert best.labels.tolist() == [[1, 3, -1, -1]]
    assert best.scores[0, 2:].isneginf().all()


def test_approximate_search_finds_most_of_the_nearest_and_the_same_again() -> None:
    pytest.importorskip("faiss", reason="needs the extra ann")
    centres = F.normalize(torch.randn(40, 16), dim=1)
    embeddings = F.normalize(centres.repeat(100, 1) + 0.1 * torch.randn(4000, 16), dim=1)
    known = torch.rand(4000) > 0.1
    x = F.normalize(centres + 0.1 * torch.randn(40, 16), dim=1)
    exclude = SparseLabels.from_lists([[row, row + 40] for row in range(40)], 4000)
    search = ApproximateSearch(embeddings, known)
    best, again = search.topk(x, 10, exclude), ApproximateSearch(embeddings, known).topk(x, 10)
    assert search.topk(x, 10).labels.tolist() == again.labels.tolist()
    truth = exact_topk(x, embeddings, known, 10, exclude)
    overlap = sum(
        len(set(a) & set(b))
        for a, b in zip(best.labels.tolist(), truth.labels.tolist(), strict=True)
    )
    assert overlap > 0.9 * 400
    assert not is_member(best.labels, exclude).any()
    assert known[best.labels].all()
    scores = dense_scores(x, embeddings, known).gather(1, best.labels)
    torch.testing.assert_close(best.scores.double(), scores, rtol=1e-4, atol=1e-5)
    assert bool((best.scores.diff(dim=1) <= 0).all())


def test_approximate_search_of_few_labels_is_padded() -> None:
    pytest.importorskip("faiss", reason="needs the extra ann")
    search = ApproximateSearch(torch.eye(3), torch.tensor([True, False, True]))
    best = search.topk(torch.tensor([[0.1, 0.5, 1.0]]), 4)
    assert best.labels.tolist() == [[2, 0, -1, -1]]
    assert search.topk(torch.zeros(0, 3), 2).labels.shape == (0, 2)


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'"ann" needs faiss: pip install "xmc-toolkit\[ann\]"'):
        ApproximateSearch(torch.eye(2), torch.ones(2, dtype=torch.bool))


def test_membership() -> None:
    rows = SparseLabels.from_lists([[1, 4], [], [0]], 5)
    labels = torch.tensor([[4, 0, -1], [1, 4, 0], [0, 0, 1]])
    expected = [[True, False, False], [False] * 3, [True, True, False]]
    assert is_member(labels, rows).tolist() == expected
    assert not is_member(labels, SparseLabels.from_lists([[], [], []], 5)).any()
