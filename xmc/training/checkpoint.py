"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00001000` with `tensors.safetensors` (weights, indices, optimizer
moments, random state) and `state.json` (counters, log position; size, checksum and rows of each
file of tensors). Several ranks write a file each, `tensors-00001-of-00004.safetensors`; what is the
same on all of them stands in the first only. Any number of ranks can read it, each what it wants.
The folder appears under its name only when it is complete, and nothing in it is pickled.

Why not torch.distributed.checkpoint, whose safetensors storage pickles nothing either (torch 2.13):
it reads a checkpoint that lacks a rank's file without an error, the rows of which then keep what
they held; it has no checksums; a rank holds its shard three times while it writes; and plans go
between ranks as pickled objects.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.distributed.tensor_file import check_rows, in_sequence, stream_tensors
from xmc.distributed.together import on_rank, together
from xmc.files import publish_folder, write_json

_NAME = re.compile(r"step-(\d{8})")
_VERSION = 2  # 1: a single file, whose size and checksum stand in the record itself


class CheckpointError(ValueError):
    """A checkpoint that cannot be read."""


@dataclass(frozen=True)
class _File:
    """What `state.json` says of a file of tensors."""

    name: str
    bytes: int
    sha256: str
    rows: dict[str, RowShard]
    """Of the tensors of which it has a part."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int = 2,
    world: World = World.alone(),
    row_shards: Mapping[str, RowShard] | None = None,
) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`; atomic.

    All ranks call this, in a folder that they share: each writes the rows that `row_shards` names
    as its own, a block at a time, and rank 0 all else. An error on any rank is one on all of them
    and leaves what was there before. Sends sizes and checksums.
    """
    shards = dict(row_shards or {})
    target = folder / f"step-{step:08d}"
    unfinished = folder / f".{target.name}.unfinished"

    def begin() -> bool:
        if target.exists():  # the same step of the same run: already complete
            return False
        for left in folder.glob(".step-*"):  # by a run that was killed
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
        return True

    def finish() -> None:
        record = {"version": _VERSION, "step": step, "files": files, "state": state}
        write_json(unfinished / "state.json", record)
        publish_folder(unfinished, target)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)

    if on_rank(0, begin, world):
        try:
            write = functools.partial(_write, unfinished, tensors, shards, world)
            files = together(write, world)
            on_rank(0, finish, world)
        finally:
            if world.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _write(
    folder: Path, tensors: Mapping[str, Tensor], shards: dict[str, RowShard], world: World
) -> dict[str, Any]:
    """Write this rank's file; what the record says of it."""
    check_rows(tensors, shards)
    own = {name: tensors[name] for name in tensors if name in shards or world.rank == 0}
    part = f"-{world.rank + 1:05d}-of-{world.size:05d}" if world.size > 1 else ""
    path = folder / f"tensors{part}.safetensors"
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(block: memoryview) -> None:
            digest.update(block)
            file.write(block)

        stream_tensors(write, own, World.alone(), {})
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return asdict(_File(path.name, size, digest.hexdigest(), shards))


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if any."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(
    path: Path,
    *,
    world: World = World.alone(),
    row_shards: Mapping[str, RowShard] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, state): of a tensor that `row_shards` names its rows, all of any other.

    The ranks that load need not be as many as wrote. They share the checking of the files, so that
    each is read once for it, and an error of one is an error on all of them. Rows that lie in one
    file are mapped, not read. Raises CheckpointError naming the file that is damaged.
    """
    files, state = _read_record(path)

    def check() -> None:
        for file in files[world.rank :: world.size]:
            _check(path / file.name, file)

    together(check, world)
    try:
        return _read_tensors(path, files, row_shards or {}), state
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_into(target: dict[str, Tensor], source: Mapping[str, Tensor], prefix: str) -> None:
    """Copy `source[prefix + name]` into each tensor of `target`; shapes and names must match."""
    for name, tensor in target.items():
        saved = source.get(prefix + name)
        if saved is None:
            raise CheckpointError(f"checkpoint has no tensor {prefix}{name}")
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise CheckpointError(
                f"checkpoint tensor {prefix}{name}: expected {tensor.dtype} {list(tensor.shape)}, "
                f"got {saved.dtype} {list(saved.shape)}"
            )
        tensor.copy_(saved)


def _read_record(path: Path) -> tuple[list[_File], dict[str, Any]]:
    """The files of a checkpoint, that of rank 0 first, and its state."""
    file = path / "state.json"
    try:
        record = json.loads(file.read_text("utf-8"))
        version, state = record["version"], record["state"]
        if version == 1:
            only = _File("tensors.safetensors", record["bytes"], record["sha256"], {})
            return [only], state
        if version != _VERSION:
            raise CheckpointError(f"{file}: expected version {_VERSION}, got {version}")
        files = []
        for entry in record["files"]:
            rows = {name: RowShard(**shard) for name, shard in entry["rows"].items()}
            files.append(_File(**{**entry, "rows": rows}))
        for name in files[0].rows:
            in_sequence([entry.rows[name] for entry in files])
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint state: {error}") from None
    return files, state


def _check(path: Path, file: _File) -> None:
    """Raise CheckpointError where a file is not what was written."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size = path.stat().st_size
    if size != file.bytes:
        raise CheckpointError(f"{path}: expected {file.bytes} bytes, got {size}: truncated?")
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != file.sha256:
        raise CheckpointError(f"{path}: checksum differs from state.json: damaged")


def _read_tensors(
    path: Path, files: list[_File], wanted: Mapping[str, RowShard]
) -> dict[str, Tensor]:
    """The wanted rows of the tensors in checked files, and all of the others."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:

        @functools.cache
        def opened(number: int) -> Any:
            return stack.enter_context(safe_open(path / files[number].name, framework="pt"))

        for name in opened(0).keys():  # noqa: SIM118
            if name not in wanted and name not in files[0].rows:
                tensors[name] = opened(0).get_tensor(name)
                continue
            if name in files[0].rows:
                shards = [file.rows[name] for file in files]
            else:
                shards = [RowShard.whole(opened(0).get_slice(name).get_shape()[0])]
            want = wanted.get(name, RowShard.whole(shards[0].total))
            if want.total != shards[0].total:
                raise CheckpointError(
                    f"{path}: {name}: expected {want.total} rows, got {shards[0].total}"
                )
            parts = []
            for number in in_sequence(shards):
                shard = shards[number]
                start, stop = want.within(shard.start, shard.stop)
                if start < stop:
                    saved = opened(number).get_slice(name)
                    parts.append(saved[start - shard.start : stop - shard.start])
            if not parts:
                parts = [opened(0).get_slice(name)[:0]]
            tensors[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensors


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name))
