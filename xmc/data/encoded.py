"""A split as arrays on disk: features, labels and filter, made once and memory-mapped after.

An entry of the cache holds `indptr.npy` (int64), `ids.npy` (int32) and, for bags, `values.npy`
(float32); `label_indptr.npy` (int64), `label_indices.npy` (int32); with a filter file also
`exclude_indptr.npy`, `exclude_indices.npy`; and `meta.json`. Its name is a hash of the content of
the split, label and filter files and of the features.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xmc.config import FeatureConfig
from xmc.data.cache import (
    ArrayWriter,
    cache_root,
    content_digest,
    entry_name,
    has_entry,
    open_entry,
)
from xmc.data.formats import (
    count_labels,
    filter_path,
    read_documents,
    read_filter,
    split_name,
    split_path,
)
from xmc.data.progress import track
from xmc.data.tokens import TextTokenizer, TokenChunk
from xmc.data.vocab import BagChunk, Vocabulary, bag_options
from xmc.data.vocab_fit import fit_vocabulary
from xmc.files import write_json

_VERSION = "1"  # of the arrays; a new one leaves old entries unread

Features = Vocabulary | TextTokenizer
"""What turns texts into encoder inputs."""


@dataclass(frozen=True)
class EncodedSplit:
    """An entry of the cache, ready to be opened."""

    folder: Path
    key: str  # the entry's name: equal keys, equal arrays
    num_rows: int
    num_labels: int
    has_filter: bool


def encode_split(
    folder: str | Path,
    split: str,
    features: Features,
    *,
    cache: str | Path | None = None,
) -> EncodedSplit:
    """The arrays of a split, made if the cache has none of this content and these features."""
    root, split = cache_root(cache), split_name(split)

    def build(work: Path) -> None:
        texts = _write_labels(Path(folder), split, work)
        _write_features(features, features.encode(texts), work)

    name = _split_entry(folder, split, features)
    entry = open_entry(root, name, build)
    meta = json.loads((entry / "meta.json").read_text("utf-8"))
    return EncodedSplit(
        entry, name, meta["num_rows"], meta["num_labels"], (entry / "exclude_indptr.npy").exists()
    )


def fit_cached_vocabulary(
    folder: str | Path, options: FeatureConfig, *, cache: str | Path | None = None
) -> Vocabulary:
    """The vocabulary of the training split, from the cache where it is there.

    Fitting also encodes the training split, because its words are at hand.
    """
    root = cache_root(cache)
    source = content_digest([split_path(folder, "trn")])
    name = entry_name("vocabulary", _VERSION, json.dumps(bag_options(options)), source)
    if has_entry(root, name):
        return Vocabulary.load(root / name)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fit-", dir=root) as scratch:
        labels = Path(scratch) / "labels"
        labels.mkdir()
        texts = _write_labels(Path(folder), "trn", labels)
        vocabulary, words = fit_vocabulary(texts, options, Path(scratch) / "words")

        def build(work: Path) -> None:
            for file in labels.iterdir():
                file.rename(work / file.name)
            _write_features(vocabulary, vocabulary.encode_words(words), work)

        open_entry(root, _split_entry(folder, "trn", vocabulary), build)
        open_entry(root, name, vocabulary.save)
    return vocabulary


def _split_entry(folder: str | Path, split: str, features: Features) -> str:
    files = [split_path(folder, split), split_path(folder, "lbl"), filter_path(folder, split)]
    return entry_name("split", _VERSION, split, features.digest(), content_digest(files))


def _write_labels(source: Path, split: str, out: Path) -> Iterator[str]:
    """Write labels and filter of a split while its texts pass through; complete at the end."""
    num_labels = count_labels(source)
    pairs = read_filter(source, split, num_rows=None, num_labels=num_labels)
    removed = pairs if split == "trn" else pairs[:0]  # from training only, not from the truth
    num_rows = 0
    documents = read_documents(source, split, num_labels=num_labels)
    with (
        ArrayWriter(out / "label_indptr.npy", np.int64) as indptr,
        ArrayWriter(out / "label_indices.npy", np.int32) as indices,
    ):
        indptr.append([0])
        for document in track(documents, f"Encoding {split}"):
            labels = _without(document.labels, removed, num_rows)
            indices.append(labels)
            indptr.append([indices.length])
            num_rows += 1
            yield document.text
    if filter_path(source, split) is not None:
        # Read once more, now that the largest document index is known.
        pairs = read_filter(source, split, num_rows=num_rows, num_labels=num_labels)
        counts = np.bincount(pairs[:, 0], minlength=num_rows)
        np.save(out / "exclude_indptr.npy", np.concatenate([[0], np.cumsum(counts)]))
        np.save(out / "exclude_indices.npy", pairs[:, 1].astype(np.int32))
    write_json(out / "meta.json", {"num_rows": num_rows, "num_labels": num_labels})


def _without(labels: list[int], pairs: np.ndarray, row: int) -> list[int]:
    """The labels that no filter pair [n, 2] (sorted by row) names for this row."""
    if not len(pairs):
        return labels
    first, last = np.searchsorted(pairs[:, 0], (row, row + 1))
    gone = set(pairs[first:last, 1].tolist())
    return [label for label in labels if label not in gone]


def _write_features(features: Features, chunks: Iterable[BagChunk | TokenChunk], out: Path) -> None:
    with ExitStack() as files:
        indptr = files.enter_context(ArrayWriter(out / "indptr.npy", np.int64))
        ids = files.enter_context(ArrayWriter(out / "ids.npy", np.int32))
        if isinstance(features, Vocabulary):
            values = files.enter_context(ArrayWriter(out / "values.npy", np.float32))
        indptr.append([0])
        for chunk in chunks:
            indptr.append(ids.length + np.cumsum(chunk.counts))
            ids.append(chunk.ids)
            if isinstance(chunk, BagChunk):
                values.append(chunk.values)
