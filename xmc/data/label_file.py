"""Label strings in a file that is opened at once and read where somebody asks for a label.

`labels.safetensors` holds `text` uint8, blocks of 256 labels each, a block a JSON array compressed
by zlib, and `ends` int64, where each block ends. The file is mapped into memory: opening it reads
nothing but its header and the ends, whatever the number of labels.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_BLOCK = 256  # labels
_CACHED = 64  # blocks


class LabelFileError(ValueError):
    """A file of labels that cannot be read."""


def write_label_file(labels: Iterable[str], path: Path) -> None:
    """Write label strings in order; a block of them at a time is taken from `labels`."""
    iterator, count = iter(labels), 0
    blocks: list[bytes] = []
    ends: list[int] = []
    while block := list(islice(iterator, _BLOCK)):
        count += len(block)
        blocks.append(zlib.compress(json.dumps(block, ensure_ascii=False).encode(), 9))
        ends.append(len(blocks[-1]) + (ends[-1] if ends else 0))
    text = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8) if blocks else None
    tensors = {
        "text": torch.empty(0, dtype=torch.uint8) if text is None else text,
        "ends": torch.tensor(ends, dtype=torch.int64),
    }
    save_file(tensors, path, metadata={"labels": str(count), "block": str(_BLOCK)})


class LabelFile(Sequence[str]):
    """The labels of a file, like a list of strings that is not in memory.

    Raises LabelFileError naming the file, when it is opened or at the label that is damaged.
    Threads may read it together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                values = file.metadata() or {}
                self._count, self._block = int(values["labels"]), int(values["block"])
                self._text, ends = file.get_tensor("text"), file.get_tensor("ends")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise LabelFileError(f"{path}: not a file of labels: {error}") from None
        self._ends = ends.tolist()
        blocks = -(-self._count // self._block) if self._block > 0 else -1
        rising = all(a < b for a, b in zip([0, *self._ends], self._ends, strict=False))
        if (
            len(self._ends) != blocks
            or not rising
            or (blocks and self._ends[-1] != len(self._text))
        ):
            raise LabelFileError(f"{path}: its blocks do not make {self._count} labels: damaged")
        # Of this object, so that another file has its own.
        self._read = functools.lru_cache(_CACHED)(self._read_block)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._count))]
        i = at + self._count if at < 0 else at
        if not 0 <= i < self._count:
            raise IndexError(f"expected a label in [0, {self._count}), got {at}")
        return self._read(i // self._block)[i % self._block]

    def __iter__(self) -> Iterator[str]:
        for block in range(len(self._ends)):
            yield from self._read_block(block)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list

    def _read_block(self, block: int) -> list[str]:
        start, stop = self._ends[block - 1] if block else 0, self._ends[block]
        wanted = min(self._block, self._count - block * self._block)
        try:
            labels: list[str] = json.loads(_unpacked(self._text[start:stop].numpy().tobytes()))
            good = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        except (zlib.error, ValueError) as error:
            raise LabelFileError(
                f"{self.path}: labels from {block * self._block} on: {error}"
            ) from None
        if not good or len(labels) != wanted:
            raise LabelFileError(
                f"{self.path}: labels from {block * self._block} on: expected {wanted} strings"
            )
        return labels


_MOST = 2**26  # bytes of a block's text: 256 KiB a label


def _unpacked(data: bytes) -> bytes:
    """Raises ValueError on a block that swells beyond all labels, before it does."""
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, _MOST)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError(f"truncated, or more than {_MOST} bytes of text")
    return text
