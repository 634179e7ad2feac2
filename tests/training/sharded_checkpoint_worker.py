"""What each rank does in test_sharded_checkpoint.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.memory import resident_bytes
from xmc.training import checkpoint
from xmc.training.byte_meter import AllocationMeter
from xmc.training.checkpoint import load_checkpoint, save_checkpoint
from xmc.training.checkpoint_writer import CheckpointWriter

Bounds = dict[str, list[int]]  # of the tensors that are in shards: first row of each rank, last


def shards_of(bounds: Bounds) -> dict[str, RowShard]:
    rank = World.current().rank
    return {name: RowShard(b[rank], b[rank + 1], b[-1]) for name, b in bounds.items()}


def parts_of(tensors: dict[str, Tensor], bounds: Bounds) -> dict[str, Tensor]:
    shards = shards_of(bounds)
    mine = {
        name: (tensor[shards[name].start : shards[name].stop] if name in shards else tensor).clone()
        for name, tensor in tensors.items()
    }
    if "index" in mine:  # torch cannot send uint16 to a process
        mine["index"] = mine["index"].to(torch.uint16)
    return mine


def save(folder: Path, step: int, tensors: dict[str, Tensor], bounds: Bounds) -> Path:
    mine, shards = parts_of(tensors, bounds), shards_of(bounds)
    world = World.current()
    if world.rank > 0:  # what is the same everywhere is the first rank's
        for name in mine.keys() - shards.keys():
            mine[name] = torch.zeros_like(mine[name])
    state = {"steps": step}
    return save_checkpoint(
        folder, step=step, tensors=mine, state=state, world=world, row_shards=shards
    )


def load(path: Path, bounds: Bounds) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, state = load_checkpoint(path, world=World.current(), row_shards=shards_of(bounds))
    assert "index" not in tensors or tensors["index"].dtype == torch.uint16
    plain = {n: t.int() if t.dtype == torch.uint16 else t.clone() for n, t in tensors.items()}
    return plain, state


def resident_after_load(path: Path, rows: int) -> int:
    """Bytes that a quarter of a tensor takes once it was read."""
    turn = World.current().rank
    shards = {"weight": RowShard(turn * rows // 4, (turn + 1) * rows // 4, rows)}
    before = resident_bytes()
    tensors, _ = load_checkpoint(path, world=World.current(), row_shards=shards)
    assert tensors["weight"].sum() == tensors["weight"].numel()
    return resident_bytes() - before


def failure_of_load(path: Path, bounds: Bounds) -> str:
    with pytest.raises(Exception) as info:
        load(path, bounds)
    return f"{info.type.__name__}: {info.value}"


def failure_of_save(
    folder: Path, tensors: dict[str, Tensor], bounds: Bounds, rank: int, at: str
) -> str:
    """A save in which a function fails on one rank; what each of them raised."""

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if World.current().rank == rank:
            patch.setattr(checkpoint, at, fail)
        with pytest.raises(Exception) as info:
            save(folder, 2, tensors, bounds)
    return f"{info.type.__name__}: {info.value}"


def background(folder: Path, tensors: dict[str, Tensor], bounds: Bounds) -> list[bool]:
    """Saves while the tensors change and ranks send; whether each had ended when it began."""
    world, shards = World.current(), shards_of(bounds)
    mine = parts_of(tensors, bounds)
    ended = []
    with CheckpointWriter(folder, world=world, background=True) as writer:
        for step in (1, 2):
            state = {"list": [step]}
            writer.save(step=step, tensors=mine, state=state, row_shards=shards)
            state["list"].append(-1)
            ended.append((folder / f"step-{step - 1:08d}").exists())
            for name in mine:
                mine[name].zero_()
            for _ in range(20):  # messages of training meanwhile
                x = torch.full((1000,), float(world.rank))
                dist.all_reduce(x)
                assert float(x[0]) == sum(range(world.size))
            mine = parts_of({name: t + step for name, t in tensors.items()}, bounds)
    return ended


def failure_in_background(
    folder: Path, tensors: dict[str, Tensor], bounds: Bounds
) -> tuple[str, bool]:
    """The error of a save that failed behind, raised by the next one; and whether that wrote."""

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    world, shards = World.current(), shards_of(bounds)
    mine = parts_of(tensors, bounds)
    with CheckpointWriter(folder, world=world, background=True) as writer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "write_json", fail)
            writer.save(step=1, tensors=mine, state={}, row_shards=shards)
            with pytest.raises(Exception) as info:
                writer.wait()
        writer.save(step=2, tensors=mine, state={}, row_shards=shards)
    return f"{info.type.__name__}: {info.value}", (folder / "step-00000002").exists()


def peak_of_save(folder: Path, rows: int, features: int) -> int:
    world = World.current()
    mine = {"weight": torch.full((rows, features), float(world.rank))}
    shards = {"weight": RowShard(world.rank * rows, (world.rank + 1) * rows, world.size * rows)}
    with AllocationMeter() as meter:
        save_checkpoint(folder, step=1, tensors=mine, state={}, world=world, row_shards=shards)
    return meter.peak


def killed(folder: Path, tensors: dict[str, Tensor], bounds: Bounds, behind: bool) -> None:
    """The last rank dies in the middle of its file, in the second save; what the first one saw."""
    world, shards = World.current(), shards_of(bounds)
    mine = parts_of(tensors, bounds)
    writer = CheckpointWriter(folder, world=world, background=behind)
    writer.save(step=1, tensors=mine, state={}, row_shards=shards)
    writer.wait()
    if world.rank == world.size - 1:

        def die(write: Any, *_: object) -> None:
            write(memoryview(b"half of it"))
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.stream_tensors = die
    try:
        writer.save(step=2, tensors=mine, state={}, row_shards=shards)
        writer.wait()
    except Exception as error:
        (folder / "seen").write_text(f"{type(error).__name__}: {error}")
