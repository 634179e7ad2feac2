"""Collectives over several processes against the same on one, for equal and unequal shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from xmc.types import TopK

WORKER = Path(__file__).with_name("collectives_worker.py")


@pytest.mark.parametrize(("size", "total"), [(1, 5), (2, 6), (2, 5), (2, 1), (4, 9), (4, 3)])
def test_rows_are_gathered_and_their_sums_scattered(ranks: Any, size: int, total: int) -> None:
    results = ranks(size, WORKER, "rows", total)
    x = torch.arange(total * 3, dtype=torch.float64).view(total, 3)
    assert torch.equal(torch.cat([result["mine"] for result in results]), x)
    counts = [len(result["mine"]) for result in results]
    assert max(counts) - min(counts) <= 1
    factor = size * (size + 1) / 2
    assert torch.equal(torch.cat([result["scattered"] for result in results]), factor * x)
    expected = [label for row in range(total) for label in range(row)]
    for result in results:
        assert result["counts"] == counts
        assert torch.equal(result["gathered"], x)
        assert result["indptr"].diff().tolist() == list(range(total))
        assert result["indices"].tolist() == expected
        assert result["sum"] == factor
        assert result["agreed"] == "of rank 0"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_best_of_all_shards_ties_by_the_lower_label(ranks: Any, size: int, k: int) -> None:
    scores = torch.randint(4, (6, 9)).float()  # many ties
    every = torch.arange(9).expand(6, -1)
    expected = TopK(scores, every).ranked().resized(k)
    for result in ranks(size, WORKER, "topk", scores, k):
        assert torch.equal(result.labels, expected.labels)
        assert torch.equal(result.scores, expected.scores)
