"""A pipeline over several processes against a plain loop over the same model in this one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("pipeline_worker.py")


@pytest.fixture(scope="module")
def worker() -> Any:
    spec = importlib.util.spec_from_file_location("pipeline_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Loss, all gradients and representations, which replicas take turns in."""
    seen = set()
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        for name, grad in result["grads"].items():
            torch.testing.assert_close(grad, expected["grads"][name], rtol=1e-10, atol=1e-10)
            seen.add(name)
    assert seen == set(expected["grads"])
    lasts = [result["reps"] for result in results if result["reps"] is not None]
    assert sum(map(len, lasts)) == len(expected["reps"])
    for index, reps in enumerate(expected["reps"]):
        mine = lasts[index % len(lasts)][index // len(lasts)]
        torch.testing.assert_close(mine, reps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "num_stages"), [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (2, 1)])
def test_a_step_equals_a_loop_without_a_pipeline(
    ranks: Any, worker: Any, size: int, num_stages: int
) -> None:
    number = 7
    results = ranks(size, WORKER, "steps", num_stages, number)
    expected = worker.plain_step(number)
    assert any(name.endswith("table.weight") for name in expected["grads"])
    _check([result["step"] for result in results], expected)
    _check([result["checkpointing"] for result in results], expected)
    expected = worker.plain_step(number, coupled=True)
    _check([result["coupled"] for result in results], expected)
    for rank, result in enumerate(results):
        replica, stage = divmod(rank, num_stages)
        report = result["step"]["report"]
        assert report.num_micro_batches == len(range(replica, number, size // num_stages))
        held = report.max_in_flight
        assert held == num_stages if stage == 0 else 1 <= held <= num_stages
        assert held == 1 or stage < num_stages - 1
        assert 0 < report.busy_seconds < report.seconds
        assert 0 <= report.idle_share < 1
