"""Whole trainings: start one, stop and resume it, read what it left, compare two bit for bit.

Tests reach it through the fixture `runs` of `tests/conftest.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xmc.config import Config
from xmc.heads.classifier import ClassifierHead
from xmc.training.log import read_log
from xmc.training.loop import Interrupted
from xmc.training.run import train as train_into

TIMES = ("seconds", "examples_per_second", "peak_memory_bytes")  # of events: no two runs agree
STEP = (ClassifierHead, "own_loss_and_grad")  # called in every pass of every head


def train(config: Config, data: Path, folder: Path, *, resume: bool = False) -> Path:
    """Train into `folder/run`, which it returns; the features' cache lies beside the data."""
    run = folder / "run"
    train_into(config, data=data, out=run, cache=data.parent / "cache", resume=resume)
    return run


def events(run: Path, name: str | None = None) -> list[dict[str, Any]]:
    """The log without times; of one kind of event, if it is named."""
    return [
        {k: v for k, v in event.items() if k not in TIMES}
        for event in read_log(run / "log.jsonl")
        if name in (None, event["event"])
    ]


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").iterdir())


def newest(run: Path) -> dict[str, Tensor]:
    """The tensors of the last checkpoint."""
    return load_file(checkpoints(run)[-1] / "tensors.safetensors")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def fail_at(
    patch: pytest.MonkeyPatch,
    calls: Collection[int],
    fail: Callable[[], None],
    *,
    within: tuple[Any, str] = STEP,
) -> None:
    """Call `fail` at the start of the given calls, from 1, of an owner's function or method."""
    owner, name = within
    original, made = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if made in calls:
            fail()
        return original(*args, **kwargs)

    patch.setattr(owner, name, counted)


def stop_and_resume(
    start: Callable[..., Path],
    calls: Sequence[int],
    *,
    within: tuple[Any, str] = STEP,
    message: str = "stopped by SIGINT after step",
) -> Path:
    """The run of `start(resume=)`, stopped by SIGINT inside each of the calls and resumed.

    Calls count on over the sessions of the run. Each session starts, as a new process would, with
    a random state of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, calls, interrupt, within=within)
        for session in range(len(calls)):
            with pytest.raises(Interrupted, match=message):
                start(resume=session > 0)
            torch.manual_seed(99 + session)
    return start(resume=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: the best model, the last checkpoint with moments and random state, the log."""
    weights = [run / "model" / "weights.safetensors" for run in (one, other)]
    assert_same_tensors(*weights)
    last = [checkpoints(run)[-1] for run in (one, other)]
    assert last[0].name == last[1].name, f"checkpoints {last[0].name} and {last[1].name}"
    assert_same_tensors(*(path / "tensors.safetensors" for path in last))
    logs = [events(run) for run in (one, other)]
    lines = [pair for pair in zip(*logs, strict=False) if pair[0] != pair[1]]
    assert not lines, f"the logs part at {lines[0]}"
    assert len(logs[0]) == len(logs[1]), f"logs of {len(logs[0])} and {len(logs[1])} events"


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two safetensors files with the same bytes; what differs is named."""
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys(), f"{one}: {sorted(mine.keys() ^ theirs.keys())}"
    # As bytes: not every dtype can be compared, and NaN is to equal itself.
    different = [
        name
        for name, tensor in mine.items()
        if not torch.equal(
            tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)
        )
    ]
    assert not different, f"{one} and {other} differ in {different}"
    assert one.read_bytes() == other.read_bytes(), f"{one} and {other} differ in their headers"
