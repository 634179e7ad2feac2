"""From rows to batches: memory-mapped features and labels, gathered by row ids.

A `Dataset` is N rows of encoder inputs with their labels. It may be far larger than memory: the
features stay in their file and a batch copies only its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xmc.data.cache import load_array
from xmc.data.encoded import Features, encode_split
from xmc.data.tokens import Padding, pad_tokens
from xmc.data.vocab import Vocabulary
from xmc.types import Bag, Batch, SparseLabels, Tokens


@dataclass(frozen=True)
class BagStore:
    """Weighted feature ids of N rows as CSR; the tensors may be memory-mapped."""

    indptr: Tensor  # [R+1] int64, over the rows of the file
    ids: Tensor  # [nnz] int32, sorted and distinct within a row
    values: Tensor  # [nnz] float32
    num_features: int
    select: Tensor | None = None  # [N] int64 rows of the file; None: all of them in order

    def __len__(self) -> int:
        return self.indptr.shape[0] - 1 if self.select is None else self.select.shape[0]

    def view(self, rows: Tensor) -> BagStore:
        """The given rows [R] int64 in that order, without copying their features."""
        return replace(self, select=rows if self.select is None else self.select[rows])

    def rows(self, rows: Tensor) -> Bag:
        """Copy the features of the given rows [B] int64."""
        positions, offsets = _positions(self.indptr, _resolve(self.select, rows))
        return Bag(self.ids[positions].long(), offsets, self.values[positions])


@dataclass(frozen=True)
class TokenStore:
    """Token ids of N rows as CSR; the tensors may be memory-mapped."""

    indptr: Tensor  # [R+1] int64, over the rows of the file
    ids: Tensor  # [nnz] int32
    padding: Padding
    select: Tensor | None = None  # [N] int64 rows of the file; None: all of them in order

    def __len__(self) -> int:
        return self.indptr.shape[0] - 1 if self.select is None else self.select.shape[0]

    def view(self, rows: Tensor) -> TokenStore:
        """The given rows [R] int64 in that order, without copying their tokens."""
        return replace(self, select=rows if self.select is None else self.select[rows])

    def rows(self, rows: Tensor) -> Tokens:
        """The tokens of the given rows [B] int64, padded to the longest of them."""
        positions, offsets = _positions(self.indptr, _resolve(self.select, rows))
        return pad_tokens(self.ids[positions], offsets, self.padding)

    def widths(self, rows: Tensor) -> Tensor:  # [R] int64
        """How wide a batch is in which the given row [R] int64 is the longest, for each row."""
        chosen = _resolve(self.select, rows)
        return self.padding.widths(self.indptr[chosen + 1] - self.indptr[chosen])


@dataclass(frozen=True)
class Dataset:
    """N rows of features and labels, and the pairs that must be neither trained nor predicted."""

    features: BagStore | TokenStore
    labels: SparseLabels  # [N, L]; filtered pairs are already removed from a training split
    exclude: SparseLabels | None = None  # [N, L] filtered pairs; None where there is no filter
    key: str = ""  # names the content of files and features; equal keys, equal data

    def __post_init__(self) -> None:
        sizes = [len(self.features), len(self.labels)]
        sizes += [len(self.exclude)] if self.exclude is not None else []
        if len(set(sizes)) != 1:
            raise ValueError(f"expected as many rows of features, labels and filter, got {sizes}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_labels(self) -> int:
        return self.labels.num_labels

    def batch(self, rows: Tensor) -> Batch:
        """The examples of the given rows [B] int64, in that order; copies these rows only."""
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise ValueError(
                f"expected rows in [0, {len(self)}), got {int(rows.min())} to {int(rows.max())}"
            )
        exclude = None if self.exclude is None else self.exclude.rows(rows)
        return Batch(self.features.rows(rows), self.labels.rows(rows), rows, exclude)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in order."""
        for rows in epoch_batches(torch.arange(len(self)), batch_size):
            yield self.batch(rows)

    def subset(self, rows: Tensor) -> Dataset:
        """A data set of the given rows; labels are copied, features stay where they are."""
        exclude = None if self.exclude is None else self.exclude.rows(rows)
        return Dataset(self.features.view(rows), self.labels.rows(rows), exclude, self.key)

    def label_frequencies(self) -> Tensor:
        """Number of rows that carry each label, [L] int64."""
        return self.labels.frequencies()


def load_dataset(
    folder: str | Path,
    split: str,
    features: Features,
    *,
    cache: str | Path | None = None,
) -> Dataset:
    """A split of a canonical folder, memory-mapped from the cache, which is filled if needed.

    Args:
        folder: canonical data folder.
        split: `trn`, `val`, `tst`, or `train`, `validation`, `test`.
        features: what `xmc.data.features.fit_features` or `load_features` gave.
        cache: folder of encoded splits (default `~/.cache/xmc`).

    Raises DataError in one line for anything wrong with the files. A damaged cache entry is made
    again, with a CacheWarning.
    """
    encoded = encode_split(folder, split, features, cache=cache)
    place = encoded.folder
    store = load_store(place, features)
    labels = _labels(place, "label", encoded.num_labels)
    exclude = _labels(place, "exclude", encoded.num_labels) if encoded.has_filter else None
    return Dataset(store, labels, exclude, encoded.key)


def load_store(place: Path, features: Features) -> BagStore | TokenStore:
    """The encoded texts in a folder of the cache, memory-mapped."""
    indptr, ids = load_array(place / "indptr.npy"), load_array(place / "ids.npy")
    if isinstance(features, Vocabulary):
        return BagStore(indptr, ids, load_array(place / "values.npy"), features.num_features)
    return TokenStore(indptr, ids, features.padding)


def _labels(place: Path, name: str, num_labels: int) -> SparseLabels:
    indptr = load_array(place / f"{name}_indptr.npy")
    return SparseLabels(indptr, load_array(place / f"{name}_indices.npy"), num_labels)


def train_validation_split(num_rows: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row ids (training, validation), each sorted; a share above 0 gives validation a row.

    The rows are drawn by a generator of their own, so that the split depends on nothing else.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a validation share in [0, 1), got {share}")
    num_validation = round(num_rows * share)
    if share > 0:
        num_validation = max(num_validation, 1)
        if num_rows < 2:
            raise ValueError(f"expected at least 2 rows to hold out a share, got {num_rows}")
        num_validation = min(num_validation, num_rows - 1)
    shuffled = torch.randperm(num_rows, generator=seeded_generator(seed, _SPLIT))
    validation, training = shuffled[:num_validation], shuffled[num_validation:]
    return training.sort().values, validation.sort().values


def epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:  # [N] int64
    """The rows in the order of one epoch: a permutation that depends on the arguments only."""
    return torch.randperm(num_rows, generator=seeded_generator(seed, _ORDER, epoch))


def epoch_batches(
    order: Tensor,  # [N] int64
    batch_size: int,
    start: int = 0,
) -> Iterator[Tensor]:
    """Slices of at most `batch_size` rows of `order`, from batch number `start`; the last is short.

    An epoch interrupted after n batches goes on with `start=n`.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    num_batches = -(-len(order) // batch_size)
    if not 0 <= start <= num_batches:
        raise ValueError(f"expected start in [0, {num_batches}] (batches), got {start}")
    for begin in range(start * batch_size, len(order), batch_size):
        yield order[begin : begin + batch_size]


# So that the split, the epochs and the steps of one seed draw from different streams.
_SPLIT, _ORDER, STEP_STREAM = 0, 1, 2


def seeded_generator(*key: int) -> torch.Generator:
    """A generator seeded by several integers; near keys give unrelated streams."""
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _resolve(select: Tensor | None, rows: Tensor) -> Tensor:
    return rows if select is None else select[rows]


def _positions(indptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries of the given CSR rows lie [n], and the offsets of the copy [B+1]."""
    starts = indptr[rows]
    counts = indptr[rows + 1] - starts
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    within = torch.arange(int(offsets[-1]))
    return within + torch.repeat_interleave(starts - offsets[:-1], counts), offsets
