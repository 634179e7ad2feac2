"""The texts of all labels as encoder inputs: row l is the title of label l."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from xmc.data.batches import BagStore, TokenStore, load_store
from xmc.data.cache import (
    ArrayWriter,
    cache_root,
    content_digest,
    entry_name,
    load_array,
    open_entry,
)
from xmc.data.encoded import Features
from xmc.data.formats import DataError, Document, read_label_rows, split_path
from xmc.data.progress import track
from xmc.data.vocab import BagChunk, Vocabulary

_VERSION = "1"  # of the arrays; a new one leaves old entries unread


@dataclass(frozen=True)
class LabelTexts:
    """Features of the titles of L labels; the tensors may be memory-mapped."""

    features: BagStore | TokenStore  # L rows
    known: Tensor  # [L] bool: has a title, with something in it that the features know
    first: Tensor  # [L] int64: the first label of the same title

    def __len__(self) -> int:
        return len(self.known)


def load_label_texts(
    folder: str | Path,  # canonical data folder
    features: Features,
    *,
    cache: str | Path | None = None,
) -> LabelTexts:
    """The titles of the label file, encoded once and memory-mapped from the cache after.

    Raises DataError where no label has a title that `features` know.
    """
    path = split_path(folder, "lbl")
    name = entry_name("label-store", _VERSION, features.digest(), content_digest([path]))
    entry = open_entry(cache_root(cache), name, lambda work: _write(Path(folder), features, work))
    titled, first = load_array(entry / "titled.npy"), load_array(entry / "first.npy")
    store = load_store(entry, features)
    known = (store.indptr.diff() > 0) & titled.bool()
    if not bool(known.any()):
        raise DataError(
            f"{path}: expected titles with words that the features know, "
            f"got none among {len(known)} labels"
        )
    return LabelTexts(store, known, first)


def _write(folder: Path, features: Features, work: Path) -> None:
    with ExitStack() as files:

        def writer(name: str, dtype: type[np.generic]) -> ArrayWriter:
            return files.enter_context(ArrayWriter(work / f"{name}.npy", dtype))

        indptr, ids = writer("indptr", np.int64), writer("ids", np.int32)
        if isinstance(features, Vocabulary):
            values = writer("values", np.float32)
        indptr.append([0])
        texts = _texts(folder, writer("titled", np.uint8), writer("first", np.int64))
        for chunk in features.encode(texts):
            indptr.append(ids.length + np.cumsum(chunk.counts))
            ids.append(chunk.ids)
            if isinstance(chunk, BagChunk):
                values.append(chunk.values)


def _texts(folder: Path, titled: ArrayWriter, first: ArrayWriter) -> Iterator[str]:
    """The titles as documents without content; writes down which are empty or seen before."""
    seen: dict[str, int] = {}
    for number, label in enumerate(track(read_label_rows(folder), "Encoding label texts")):
        titled.append([bool(label.title.strip())])
        first.append([seen.setdefault(label.title, number)])
        yield Document(label.uid, label.title, "", []).text
