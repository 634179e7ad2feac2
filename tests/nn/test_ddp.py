"""Encoder and sparse layer under DistributedDataParallel: two processes train as one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(world_size: int, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", WORKER, str(rank), str(world_size), folder],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(errors)
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(world_size)]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (alone,) = run(1, tmp_path / "one")
    first, second = run(2, tmp_path / "two")
    # Each drew its own pattern; the wrapper gave both that of rank 0.
    assert not torch.equal(first["drawn"], second["drawn"])
    assert torch.equal(first["drawn"], alone["drawn"])
    assert torch.equal(second["state"]["layer.index"], alone["drawn"])
    for name, expected in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        if name != "layer.index":
            torch.testing.assert_close(first["state"][name], expected, rtol=1e-4, atol=1e-5)
