"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00001000` with `tensors.safetensors` (weights, indices, optimizer
moments, random state) and `state.json` (counters, log position, size and checksum of the tensors).
The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xmc.files import new_folder, write_json

_NAME = re.compile(r"step-(\d{8})")
_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`; atomic."""
    target = folder / f"step-{step:08d}"
    if target.exists():  # the same step of the same run: already complete
        return target
    with new_folder(target) as temporary:
        path = temporary / "tensors.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        record = {
            "version": _VERSION,
            "step": step,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "state": state,
        }
        write_json(temporary / "state.json", record)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if any."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, state). Raises CheckpointError naming the file that is damaged."""
    state_path, tensor_path = path / "state.json", path / "tensors.safetensors"
    try:
        record = json.loads(state_path.read_text("utf-8"))
        version, size, digest = record["version"], record["bytes"], record["sha256"]
        state = record["state"]
    except FileNotFoundError:
        raise CheckpointError(f"{state_path}: missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state_path}: not a checkpoint state: {error}") from None
    if version != _VERSION:
        raise CheckpointError(f"{state_path}: expected version {_VERSION}, got {version}")
    if not tensor_path.is_file():
        raise CheckpointError(f"{tensor_path}: missing")
    actual = tensor_path.stat().st_size
    if actual != size:
        raise CheckpointError(f"{tensor_path}: expected {size} bytes, got {actual}: truncated?")
    if _sha256(tensor_path) != digest:
        raise CheckpointError(f"{tensor_path}: checksum differs from state.json: damaged")
    try:
        with safe_open(tensor_path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{tensor_path}: {error}") from None
    return tensors, state


def load_into(target: dict[str, Tensor], source: dict[str, Tensor], prefix: str) -> None:
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


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
