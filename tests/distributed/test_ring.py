"""Rows that visit every rank: each is seen once by each, and what visits give comes home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("ring_worker.py")


@pytest.mark.parametrize("counts", [[3], [3, 2], [1, 0], [0, 0], [2, 5, 0, 1], [4, 4, 4, 4]])
def test_every_row_visits_every_rank_and_its_earnings_come_home(ranks: Any, counts: Any) -> None:
    size, total = len(counts), sum(counts)
    whole = torch.randn(total, 3), torch.arange(total)
    tensors = [list(x.split(counts)) for x in whole]
    for rank, results in enumerate(ranks(size, WORKER, "visits", counts, tensors)):
        mine = tensors[0][rank].double()
        for kind, result in results.items():
            torch.testing.assert_close(result["sum"], mine * (size * (size + 1) // 2))
            factors = torch.arange(1, size + 1, dtype=torch.float64)
            assert torch.equal(result["max"], (mine * factors[:, None, None]).amax(0))
            assert result["none"] is None
            assert len(result["seen"]) == 2 * (1 if kind == "Gather" else size)
            for start, stop, given in result["seen"]:
                for own, all_rows in zip(given, whole, strict=True):
                    assert torch.equal(own, all_rows[start:stop])
            covered = [row for start, stop, _ in result["seen"] for row in range(start, stop)]
            assert sorted(covered) == sorted(2 * list(range(total)))


def test_rows_travel_on_while_they_are_visited(ranks: Any) -> None:
    rows, earned = "send torch.float32", "send torch.float64"
    once = [rows, "visit", earned]
    for events in ranks(4, WORKER, "order", [3, 1, 2, 2]):
        assert events == [*once, *once, *once, "visit", earned]
