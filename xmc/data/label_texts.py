"""Label texts as training rows: each label's own title, carrying that label alone.

For data sets whose labels have texts (LF-AmazonTitles-131K and its kind). Such rows are trained on
and nothing else: frequencies, propensities, clusters and validation are of documents, so take them
from the data set before its label texts are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmc.data.batches import BagStore, Dataset
from xmc.data.cache import ArrayWriter, cache_root, entry_name, load_array, open_entry
from xmc.data.encoded import Features
from xmc.data.formats import DataError, Document, read_label_rows, split_path
from xmc.data.progress import track
from xmc.data.vocab import BagChunk
from xmc.types import SparseLabels

_VERSION = "1"  # of the arrays; a new one leaves old entries unread
_PIECE = 1 << 22  # numbers copied at a time


def with_label_texts(
    data: Dataset,  # of the training split, or of some of its rows
    folder: str | Path,  # canonical data folder
    features: Features,
    *,
    cache: str | Path | None = None,
) -> Dataset:
    """The rows of `data`, then one row for each label whose title holds anything known.

    Costs a second copy of the encoded split in the cache, so that features stay one memory-mapped
    array. Raises DataError where no label has a title that `features` know.
    """
    name = entry_name("label-texts", _VERSION, data.key)
    entry = open_entry(
        cache_root(cache), name, lambda work: _write(data, Path(folder), features, work)
    )
    indptr, owners = load_array(entry / "indptr.npy"), load_array(entry / "owners.npy")
    arrays: dict[str, Any] = {"indptr": indptr, "ids": load_array(entry / "ids.npy")}
    if isinstance(data.features, BagStore):
        arrays["values"] = load_array(entry / "values.npy")
    num_documents = len(data.features.indptr) - 1
    # A bag of words that no document has is empty: it would teach the bias this label.
    known = (indptr[num_documents:].diff() > 0).nonzero().flatten()
    if not len(known):
        raise DataError(
            f"{split_path(folder, 'lbl')}: expected titles with words that the features know "
            f"(train.label_texts), got none among {data.num_labels} labels"
        )
    rows = data.features.select
    rows = torch.arange(num_documents) if rows is None else rows
    select = torch.cat([rows, num_documents + known])
    own = SparseLabels(torch.arange(len(known) + 1), owners[known], data.num_labels)
    none = SparseLabels(torch.zeros(len(known) + 1, dtype=torch.int64), owners[:0], data.num_labels)
    return Dataset(
        replace(data.features, select=select, **arrays),
        _joined(data.labels, own),
        None if data.exclude is None else _joined(data.exclude, none),
        name,
    )


def _write(data: Dataset, folder: Path, features: Features, work: Path) -> None:
    """The arrays of the split and after them those of the titles, whose labels are `owners`."""
    store = data.features
    with ExitStack() as files:

        def writer(name: str, dtype: type[np.generic]) -> ArrayWriter:
            return files.enter_context(ArrayWriter(work / f"{name}.npy", dtype))

        indptr, ids, owners = (
            writer("indptr", np.int64),
            writer("ids", np.int32),
            writer("owners", np.int32),
        )
        _copy(store.indptr, indptr)
        _copy(store.ids, ids)
        if isinstance(store, BagStore):
            values = writer("values", np.float32)
            _copy(store.values, values)
        for chunk in features.encode(_titles(folder, owners)):
            indptr.append(ids.length + np.cumsum(chunk.counts))
            ids.append(chunk.ids)
            if isinstance(chunk, BagChunk):
                values.append(chunk.values)


def _titles(folder: Path, owners: ArrayWriter) -> Iterator[str]:
    """The titles that are not empty, as documents without content; writes down whose they are."""
    for number, label in enumerate(track(read_label_rows(folder), "Encoding label texts")):
        if label.title.strip():
            owners.append([number])
            yield Document(label.uid, label.title, "", []).text


def _copy(source: Tensor, target: ArrayWriter) -> None:
    for piece in source.split(_PIECE):
        target.append(piece.numpy())


def _joined(one: SparseLabels, other: SparseLabels) -> SparseLabels:
    indptr = torch.cat([one.indptr, one.indptr[-1] + other.indptr[1:]])
    return SparseLabels(indptr, torch.cat([one.indices, other.indices]), one.num_labels)
