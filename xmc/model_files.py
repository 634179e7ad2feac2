"""The files of a model's folder, one by one: its description, label strings and weights."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmc.config import ConfigError, from_dict
from xmc.data.label_file import LabelFile, LabelFileError
from xmc.distributed.sharding import RowShard
from xmc.files import write_file
from xmc.nn.compressed import Storage

VERSION = 1
EXPORTED = 2
"""The version of exported models, which add `storage`, a checksum of each tensor, and have their
labels in a `LabelFile`."""


class ModelError(ValueError):
    """A model folder that cannot be read."""


def read_tensors(
    path: Path,
    wanted: list[str] | None = None,
    row_shards: Mapping[str, RowShard] | None = None,
) -> dict[str, Tensor]:
    """All tensors of a file, or those of some names; of those in `row_shards` these rows.

    Raises ModelError naming the file where it is missing, damaged or has not so many rows.
    """
    shards = row_shards or {}
    try:
        with safe_open(path, framework="pt") as handle:
            return {
                name: _read_rows(path, handle.get_slice(name), name, shards[name])
                if name in shards
                else handle.get_tensor(name)
                for name in wanted or handle.keys()
            }
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except SafetensorError as error:
        raise ModelError(not_weights(path, error)) from None


def _read_rows(path: Path, saved: Any, name: str, rows: RowShard) -> Tensor:
    """Some rows of a tensor in a file, which maps them into memory until they are changed."""
    shape = saved.get_shape()
    if shape[:1] != [rows.total]:
        raise ModelError(f"{path}: expected {rows.total} rows of {name}, got shape {shape}")
    part: Tensor = saved[rows.start : rows.stop]
    return part


def not_weights(path: Path, error: Exception) -> str:
    """The message of an error that says so in several lines."""
    return f"{path}: not the weights of this model: {' '.join(str(error).split())}"


def check_sums(path: Path, tensors: Mapping[str, Tensor], sums: Mapping[str, str]) -> None:
    """Raise ModelError naming the first tensor of a file that is not the one that was written."""
    for name, tensor in tensors.items():
        if checksum(tensor) != sums.get(name):
            raise ModelError(f"{path}: checksum of {name} differs from model.json: damaged")


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()  # no bytes are copied
    return hashlib.sha256(content).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """`num_labels`, `config`, `storage` and `checksums` (None of a model as it was trained).

    Raises ModelError or ConfigError.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["version"] not in (VERSION, EXPORTED):
            raise ModelError(
                f"{path}: expected version {VERSION} or {EXPORTED}, got {record['version']}"
            )
        storage, sums = None, None
        if record["version"] == EXPORTED:
            storage = Storage(**record["storage"])
            sums = {str(name): str(digest) for name, digest in record["checksums"].items()}
        return {
            "num_labels": int(record["num_labels"]),
            "config": from_dict(record["config"], source=str(path)),
            "storage": storage,
            "checksums": sums,
        }
    except FileNotFoundError:
        raise ModelError(f"{path}: missing: no model here") from None
    except (ModelError, ConfigError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a model description: {error!r}") from None


def read_labels(folder: Path, num_labels: int) -> Sequence[str]:
    """The label strings in order; those of an exported model are read where they are asked for.

    Raises ModelError where they are damaged or not so many.
    """
    path = folder / "labels.safetensors"
    if path.exists():
        try:
            file = LabelFile(path)
        except LabelFileError as error:
            raise ModelError(str(error)) from None
        if len(file) != num_labels:
            raise ModelError(f"{path}: expected {num_labels} labels, got {len(file)}")
        return file
    path = folder / "labels.json.gz"
    try:
        with gzip.open(path) as handle:
            labels: list[str] = json.loads(handle.read())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: not a list of labels: {error}") from None
    if len(labels) != num_labels:
        raise ModelError(f"{path}: expected {num_labels} labels, got {len(labels)}")
    return labels


def write_labels(path: Path, labels: Sequence[str]) -> None:
    """Replace the file of label strings; the same labels are the same bytes."""
    text = json.dumps(list(labels), ensure_ascii=False).encode()
    write_file(path, lambda temporary: _write_gzip(temporary, text))


def _write_gzip(path: Path, content: bytes) -> None:
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(content)
