"""Folders of arrays that are computed once, named by what they are computed from.

An entry is `ROOT/NAME/` with `.npy` files and `manifest.json` (size of every file). It is built
beside its place and renamed, so that a reader sees it whole or not at all and several builders may
race. An entry whose files do not match the manifest is rebuilt, with a CacheWarning.
"""

from __future__ import annotations

import json
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from xmc.files import new_folder, write_json

_MANIFEST = "manifest.json"
_HEADER_BYTES = 128


class CacheWarning(UserWarning):
    """A cache entry that could not be used and was computed again."""


def cache_root(cache: str | Path | None) -> Path:
    """The given folder, or `~/.cache/xmc`."""
    return Path(cache) if cache is not None else Path.home() / ".cache" / "xmc"


def entry_name(kind: str, *parts: str) -> str:
    """`kind-<hash of the parts>`: the place of what is computed from them."""
    text = json.dumps(parts)
    return f"{kind}-{blake2b(text.encode(), digest_size=16).hexdigest()}"


def content_digest(paths: Iterable[Path | None]) -> str:
    """Names the content of files, in order; None stands for a file that is not there."""
    hasher = blake2b(digest_size=16)
    for path in paths:
        if path is None:
            hasher.update(b"none")
            continue
        with path.open("rb") as file:
            one = blake2b(digest_size=16)
            while block := file.read(1 << 20):
                one.update(block)
        hasher.update(one.digest())
    return hasher.hexdigest()


def open_entry(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder of an entry, built by `build(folder)` where it is missing or damaged."""
    folder = root / name
    problem = _problem(folder) if folder.exists() else "missing"
    if problem and problem != "missing":
        warnings.warn(f"{folder}: {problem}; computing it again", CacheWarning, stacklevel=3)
        _remove(folder)
    if problem:
        try:
            with new_folder(folder) as work:
                build(work)
                sizes = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
                write_json(work / _MANIFEST, {"sizes": sizes})
        except OSError:
            # Somebody else built the same entry meanwhile; theirs is as good.
            if not folder.exists() or _problem(folder):
                raise
    return folder


def has_entry(root: Path, name: str) -> bool:
    """Whether the entry is there and undamaged."""
    return (root / name).exists() and not _problem(root / name)


def load_array(path: Path) -> Tensor:
    """A memory-mapped array as a tensor; writing to it changes memory only, never the file."""
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    return torch.from_numpy(array)


class ArrayWriter:
    """A one-dimensional `.npy` file written piece by piece."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._file.write(self._header())

    def append(self, values: np.ndarray | list[int]) -> None:
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data)
        self.length += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _header(self) -> bytes:
        """Version 1.0 of the npy format, padded to a fixed size so that it can be rewritten."""
        fields = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        text = repr(fields).encode().ljust(_HEADER_BYTES - 11) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _problem(folder: Path) -> str:
    """Why an entry cannot be used; empty if it can."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text("utf-8"))["sizes"]
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"expected {size} bytes in {name}, got {found}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is damaged"
    return ""


def _remove(folder: Path) -> None:
    """Take an entry away in one rename, so that nobody opens half of it."""
    trash = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return  # another process was faster
    shutil.rmtree(trash, ignore_errors=True)
