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


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_any_limit_and_any_slow_stage_give_the_same_bits(ranks: Any, limit: int) -> None:
    expected = ranks(3, WORKER, "steps", 3, 6)
    delays = ((0.01, 0, 0, 0), (0, 0.01, 0, 0), (0, 0, 0, 0.01))[limit % 3]
    results = ranks(3, WORKER, "steps", 3, 6, limit, delays)
    for result, other in zip(results, expected, strict=True):
        for name in ("step", "checkpointing", "coupled"):
            assert result[name]["loss"] == other[name]["loss"]
            for key, grad in result[name]["grads"].items():
                assert torch.equal(grad, other[name]["grads"][key])
            assert result[name]["report"].max_in_flight <= limit
    assert results[0]["step"]["report"].max_in_flight == limit


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_stage_holds_more_graphs_than_the_limit(ranks: Any, limit: int) -> None:
    first, middle, last = ranks(3, WORKER, "outputs_at_once", limit, False)
    assert first == (limit, limit)
    assert middle[0] == middle[1] <= limit
    assert last == (1, 1)
    for seen, counted in ranks(3, WORKER, "outputs_at_once", limit, True):
        assert seen == 1  # no graph waits for its gradient
        assert counted <= limit


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_of_all_kinds_travel(
    ranks: Any, worker: Any, frozen: bool, checkpointing: bool
) -> None:
    expected = worker.kinds_of_tensors(frozen, checkpointing)
    first, last = ranks(2, WORKER, "kinds_of_tensors", frozen, checkpointing)
    assert first["losses"] == last["losses"]
    assert first["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert {name for name, grad in expected["grads"].items() if grad is not None} == (
        {"1.linear.weight", "1.linear.bias"}
        | (
            set()
            if frozen
            else {"0.linear.weight", "0.linear.bias", "0.norm.weight", "0.norm.bias"}
        )
    )
    for name, grad in (first["grads"] | last["grads"]).items():
        if expected["grads"][name] is None:
            assert grad is None
        else:
            torch.testing.assert_close(grad, expected["grads"][name], rtol=1e-10, atol=1e-10)
    # Running statistics take in each micro-batch of each step once, computed again or not.
    assert int(first["buffers"]["norm.num_batches_tracked"]) == 12
    for name, buffer in first["buffers"].items():
        torch.testing.assert_close(buffer, expected["buffers"][name])
    rows = 3 * 5
    assert first["bytes"] == rows * worker.DIM * (3 * 8 + 2) + 3
    d_hidden = 0 if frozen else rows * worker.DIM * 8
    assert last["bytes"] == d_hidden + 3 * 8


@pytest.mark.parametrize("bucket_bytes", [1, 60, 10**6])
def test_gradients_of_replicas_are_summed(ranks: Any, bucket_bytes: int) -> None:
    for grads in ranks(2, WORKER, "summed_gradients", bucket_bytes):
        expected = [10.0, 12.0, 2.0, 13.0, None, None]
        for grad, value in zip(grads, expected, strict=True):
            if value is None:
                assert grad is None
            else:
                assert torch.equal(grad, torch.full_like(grad, value))


def test_gradients_of_replicas_are_dense(ranks: Any) -> None:
    for text in ranks(2, WORKER, "sparse_gradients"):
        assert text == "expected dense gradients to sum over replicas, got torch.sparse_coo"


def test_dropout_follows_the_generator_of_the_first_stage(ranks: Any) -> None:
    first, last = ranks(2, WORKER, "default_seeds")
    assert first == last
    assert first[0] != first[1]
    assert ranks(2, WORKER, "default_seeds")[0] == first


def test_autocast_around_a_step_holds_for_its_forward_passes(ranks: Any, worker: Any) -> None:
    loss, expected = worker.under_autocast()
    for other_loss, grads in ranks(2, WORKER, "under_autocast"):
        assert other_loss == loss
        for name, grad in grads.items():
            assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_gradients_are_clipped_by_the_norm_of_all_stages(
    ranks: Any, worker: Any, factor: float
) -> None:
    expected = worker.plain_step(3)["grads"]
    norm = torch.cat([grad.flatten() for grad in expected.values()]).norm().item()
    for total, grads in ranks(2, WORKER, "clipped", factor * norm):
        assert total == pytest.approx(norm, rel=1e-12)
        for name, grad in grads.items():
            # torch's clipping adds 1e-6 to the norm.
            torch.testing.assert_close(grad, expected[name] * min(factor, 1), rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
def test_ranks_that_share_a_gpu_give_the_same_as_one(ranks: Any, worker: Any) -> None:
    results = ranks(2, WORKER, "steps", 2, 7, None, (), "cuda:0")
    for name in ("step", "checkpointing", "coupled"):
        expected = worker.plain_step(7, coupled=name == "coupled", device="cuda:0")
        _check([result[name] for result in results], expected)


@pytest.mark.gpu
def test_ranks_with_a_gpu_each_give_the_same_as_one(
    ranks: Any, worker: Any, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = ranks(2, WORKER, "steps_through_nccl", str(tmp_path / "store"), 2, 7)
    for name in ("step", "checkpointing", "coupled"):
        expected = worker.plain_step(7, coupled=name == "coupled", device="cuda:0")
        _check([result[name] for result in results], expected)
