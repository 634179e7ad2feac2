"""A pipeline over several processes against the same cuts on one."""

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


def _compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    seen = set()
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        for name, grad in result["grads"].items():
            torch.testing.assert_close(grad, expected["grads"][name], rtol=1e-10, atol=1e-10)
            seen.add(name)
    assert seen == set(expected["grads"])


@pytest.mark.parametrize(("ranks_", "num_stages"), [(2, 2), (3, 3), (4, 4), (4, 2), (2, 1)])
def test_a_step_equals_that_of_one_process(
    ranks: Any, worker: Any, ranks_: int, num_stages: int
) -> None:
    expected = worker.step(1, 7)
    results = ranks(ranks_, WORKER, "step", num_stages, 7)
    _compare(results, expected)
