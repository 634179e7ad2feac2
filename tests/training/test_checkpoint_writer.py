"""Trainings whose checkpoints are written behind them: the same run, also after an interruption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xmc.config import Config, from_dict, to_dict
from xmc.training import checkpoint

RANKS_WORKER = Path(__file__).parents[1] / "distributed" / "training_worker.py"


def config(*, behind: bool) -> Config:
    values = {
        "features": {"min_df": 1},
        "encoder": {"dim": 16, "dropout": 0.3},
        "head": {"fan_in": 6},
        "train": {"epochs": 2, "batch_size": 40, "checkpoint_every": 3, "async_checkpoint": behind},
    }
    return from_dict(values, source="test")


@pytest.mark.parametrize("call", [5, 14])
def test_a_run_is_the_same_with_checkpoints_behind_it(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, call: int
) -> None:
    whole = runs.train(config(behind=False), tiny_data, tmp_path / "whole")
    start = partial(runs.train, config(behind=True), tiny_data, tmp_path / "parts")
    parts = runs.stop_and_resume(start, [call])
    runs.assert_same_run(whole, parts)
    names = [[path.name for path in runs.checkpoints(run)] for run in (whole, parts)]
    assert names[0] == names[1]


def test_ranks_write_behind_a_training_too(ranks: Any, tiny_data: Path, tmp_path: Path) -> None:
    """Stopped by a signal to one of them and resumed; the bits of the run whose steps waited."""
    runs = [
        (False, "whole", False, None),
        (True, "parts", False, (1, 8)),
        (True, "parts", True, None),
    ]
    for behind, name, resume, stop in runs:
        values = to_dict(config(behind=behind))
        said = ranks(2, RANKS_WORKER, "train", values, tiny_data, tmp_path / name, resume, stop)
        assert said == (["stopped by SIGTERM after step 8"] * 2 if stop else said)
    for newest in (1, 2):
        one, other = (
            sorted((tmp_path / n).glob("checkpoints/step-*"))[-newest] for n in ("whole", "parts")
        )
        assert one.name == other.name
        for part in ("tensors-00001-of-00002.safetensors", "tensors-00002-of-00002.safetensors"):
            assert (one / part).read_bytes() == (other / part).read_bytes()
    one, other = (tmp_path / n / "model" / "weights.safetensors" for n in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("write", [2, 3])  # one on the way; the last
def test_what_goes_wrong_behind_a_training_ends_it(
    runs: ModuleType,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
) -> None:
    def fail() -> None:
        raise OSError("No space left on device")

    options = config(behind=True)
    with monkeypatch.context() as patch:
        runs.fail_at(patch, [write], fail, within=(checkpoint, "write_json"))
        with pytest.raises(OSError, match="No space left on device"):
            runs.train(options, tiny_data, tmp_path / "parts")
    kept = runs.checkpoints(tmp_path / "parts" / "run")
    assert len(kept) == write - 1
    whole = runs.train(options, tiny_data, tmp_path / "whole")
    runs.assert_same_run(whole, runs.train(options, tiny_data, tmp_path / "parts", resume=True))
