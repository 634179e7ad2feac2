"""The data that flows between the floors of the toolkit.

Letters, the same everywhere: B examples, T tokens, D features, L labels, F fan-in,
G labels that share one index row, K top-k, N rows of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SparseLabels:
    """The positive labels of N rows, as CSR: row i owns `indices[indptr[i]:indptr[i + 1]]`.

    The tensors may be memory-mapped; nothing here copies or densifies unless it says so.
    """

    indptr: Tensor  # [N+1] int64, non-decreasing, starts at 0
    indices: Tensor  # [nnz] int32, sorted and distinct within a row
    num_labels: int

    def __len__(self) -> int:
        return self.indptr.shape[0] - 1

    @property
    def num_rows(self) -> int:
        return len(self)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def to(self, device: torch.device | str) -> SparseLabels:
        return SparseLabels(self.indptr.to(device), self.indices.to(device), self.num_labels)

    def counts(self) -> Tensor:
        """Number of positives of each row, [N] int64."""
        return self.indptr[1:] - self.indptr[:-1]

    def frequencies(self) -> Tensor:
        """Number of rows that carry each label, [L] int64."""
        return torch.bincount(self.indices, minlength=self.num_labels)

    def rows(self, rows: Tensor) -> SparseLabels:
        """The labels of the given row ids [R] int64, in that order (copies R rows)."""
        starts, counts = self.indptr[rows], self.indptr[rows + 1] - self.indptr[rows]
        indptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=indptr[1:])
        within = torch.arange(int(indptr[-1]), device=self.device)
        positions = within + torch.repeat_interleave(starts - indptr[:-1], counts)
        return SparseLabels(indptr, self.indices[positions], self.num_labels)

    def slice(self, start: int, stop: int) -> SparseLabels:
        """Rows `start` to `stop` without copying the indices."""
        indptr = self.indptr[start : stop + 1]
        first, last = int(indptr[0]), int(indptr[-1])
        return SparseLabels(indptr - first, self.indices[first:last], self.num_labels)

    def tile(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The positives with `start <= label < stop`: (rows, labels - start), both [n] int64."""
        rows = torch.repeat_interleave(
            torch.arange(self.num_rows, device=self.device), self.counts()
        )
        inside = (self.indices >= start) & (self.indices < stop)
        return rows[inside], self.indices[inside].long() - start

    def within(self, shard: LabelShard) -> SparseLabels:
        """The same rows with the labels of a shard only, counted from its first."""
        if len(shard) == self.num_labels:
            return self
        inside = (self.indices >= shard.start) & (self.indices < shard.stop)
        indptr = F.pad(inside.cumsum(0), (1, 0))[self.indptr]
        return SparseLabels(indptr, self.indices[inside] - shard.start, len(shard))

    def to_dense(self) -> Tensor:
        """[N, L] float32 of zeros and ones. For tests and small sets only."""
        dense = torch.zeros(self.num_rows, self.num_labels, device=self.device)
        rows, labels = self.tile(0, self.num_labels)
        dense[rows, labels] = 1.0
        return dense

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """[N, L] float32 CSR that shares `indices` with this object."""
        data = np.ones(self.indices.shape[0], dtype=np.float32)
        shape = (self.num_rows, self.num_labels)
        parts = (data, self.indices.numpy(), self.indptr.numpy())
        return scipy.sparse.csr_matrix(parts, shape=shape, copy=False)

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.spmatrix | scipy.sparse.sparray) -> SparseLabels:
        """The stored entries of a matrix [N, L] in any scipy format, which may hold no zeros.

        Canonical CSR with int32 column ids is shared, anything else is copied.
        """
        csr = scipy.sparse.csr_matrix(cast(Any, matrix))
        zeros = csr.nnz - np.count_nonzero(csr.data)
        if zeros:
            raise ValueError(
                f"expected no explicit zeros, got {zeros} (eliminate_zeros() removes them)"
            )
        if not csr.has_canonical_format:
            csr = csr.copy()
            csr.sum_duplicates()
        indptr = torch.from_numpy(csr.indptr.astype(np.int64, copy=False))
        indices = torch.from_numpy(csr.indices.astype(np.int32, copy=False))
        return cls(indptr, indices, csr.shape[1])

    @classmethod
    def from_lists(cls, rows: list[list[int]], num_labels: int) -> SparseLabels:
        """From one list of label ids per row; sorts and removes repeats."""
        unique = [sorted(set(row)) for row in rows]
        indptr = torch.zeros(len(rows) + 1, dtype=torch.int64)
        if unique:
            indptr[1:] = torch.tensor([len(row) for row in unique]).cumsum(0)
        flat = [label for row in unique for label in row]
        labels = cls(indptr, torch.tensor(flat, dtype=torch.int32), num_labels)
        labels.validate()
        return labels

    def validate(self) -> None:
        """Raise ValueError on the first rule that does not hold."""
        if self.indptr.dtype != torch.int64 or self.indices.dtype != torch.int32:
            raise ValueError(
                "expected indptr int64 and indices int32, "
                f"got {self.indptr.dtype} and {self.indices.dtype}"
            )
        if self.indptr.dim() != 1 or self.indptr.shape[0] < 1 or int(self.indptr[0]) != 0:
            raise ValueError("expected indptr of shape [N + 1] that starts at 0")
        if bool((self.indptr[1:] < self.indptr[:-1]).any()):
            raise ValueError("expected a non-decreasing indptr")
        if int(self.indptr[-1]) != self.indices.shape[0]:
            raise ValueError(
                f"expected indptr to end at {self.indices.shape[0]} (the number of indices), "
                f"got {int(self.indptr[-1])}"
            )
        if self.indices.shape[0] == 0:
            return
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= self.num_labels:
            raise ValueError(
                f"expected label indices in [0, {self.num_labels}), got {low} to {high}"
            )
        rising = self.indices[1:] > self.indices[:-1]
        starts = self.indptr[1:-1]
        starts = starts[(starts > 0) & (starts < self.indices.shape[0])]
        rising[starts - 1] = True
        if not bool(rising.all()):
            where = int((~rising).nonzero()[0]) + 1
            row = int(torch.searchsorted(self.indptr, where, right=True)) - 1
            raise ValueError(f"expected sorted, distinct label indices, row {row} has not")


@dataclass(frozen=True)
class Bag:
    """Weighted bags of feature ids: row i owns `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Tensor  # [nnz] int64, distinct within a row
    offsets: Tensor  # [B+1] int64
    weights: Tensor  # [nnz] float32

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def to(self, device: torch.device | str) -> Bag:
        return Bag(self.ids.to(device), self.offsets.to(device), self.weights.to(device))

    def slice(self, start: int, stop: int) -> Bag:
        offsets = self.offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return Bag(self.ids[first:last], offsets - first, self.weights[first:last])


@dataclass(frozen=True)
class BagReps:
    """Representations of B examples, and beside them the features of their bags.

    Of all the features of a vocabulary only those that occur in the batch have a column.
    """

    values: Tensor  # [B, D + A + Z]: the representation, these features, one or more zeros
    active: Tensor  # [A] int64, rising: the features that occur

    def __len__(self) -> int:
        return self.values.shape[0]

    def detach(self) -> BagReps:
        return BagReps(self.values.detach(), self.active)


@dataclass(frozen=True)
class Tokens:
    """Padded token ids with their attention mask."""

    ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] int64, 1 for a real token

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))

    def slice(self, start: int, stop: int) -> Tokens:
        return Tokens(self.ids[start:stop], self.mask[start:stop])


@dataclass(frozen=True)
class Batch:
    """B examples: encoder inputs, positives and the rows of the data set they came from."""

    inputs: Bag | Tokens
    labels: SparseLabels
    rows: Tensor  # [B] int64
    exclude: SparseLabels | None = None  # labels a row must not be given (the filter file)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        exclude = None if self.exclude is None else self.exclude.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), self.rows.to(device), exclude)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Consecutive slices of at most `size` examples."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield Batch(
                self.inputs.slice(start, stop),
                self.labels.slice(start, stop),
                self.rows[start:stop],
                None if self.exclude is None else self.exclude.slice(start, stop),
            )


@dataclass(frozen=True)
class TopK:
    """The K best labels of B examples, best first, ties broken by the lower label id.

    Rows with fewer than K candidates are padded with label -1 and score -inf.
    """

    scores: Tensor  # [B, K] float32
    labels: Tensor  # [B, K] int64

    def merge(self, other: TopK) -> TopK:
        """The best K of both; associative, so tiles and shards may merge in any grouping.

        Both have K columns and no label in common.
        """
        if self.labels.shape != other.labels.shape:
            raise ValueError(
                "expected two top-k of the same shape, "
                f"got {list(self.labels.shape)} and {list(other.labels.shape)}"
            )
        scores = torch.cat([self.scores, other.scores], 1)
        labels = torch.cat([self.labels, other.labels], 1)
        both, k = TopK(scores, labels).ranked(), self.scores.shape[1]
        return TopK(both.scores[:, :k], both.labels[:, :k])

    def resized(self, k: int) -> TopK:
        """Cut to k columns, or padded to k."""
        missing = max(k - self.labels.shape[1], 0)
        scores = F.pad(self.scores[:, :k], (0, missing), value=-torch.inf)
        return TopK(scores, F.pad(self.labels[:, :k], (0, missing), value=-1))

    def ranked(self) -> TopK:
        """The same entries, best first, ties broken by the lower label id, padding last."""
        # A stable sort by score of label-sorted entries breaks ties by the lower label;
        # padding (label -1) has score -inf and is sent last.
        last = torch.iinfo(self.labels.dtype).max
        by_label = torch.where(self.labels < 0, last, self.labels).argsort(1)
        scores, labels = self.scores.gather(1, by_label), self.labels.gather(1, by_label)
        best = scores.argsort(dim=1, descending=True, stable=True)
        return TopK(scores.gather(1, best), labels.gather(1, best))


@dataclass(frozen=True)
class LabelShard:
    """A contiguous range of labels owned by one rank."""

    start: int
    stop: int
    num_labels: int

    def __len__(self) -> int:
        return self.stop - self.start

    @classmethod
    def whole(cls, num_labels: int) -> LabelShard:
        return cls(0, num_labels, num_labels)

    @classmethod
    def partition(cls, num_labels: int, rank: int, world_size: int, *, unit: int = 1) -> LabelShard:
        """The share of `rank` in whole units of labels; sizes differ by at most one unit."""
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank in [0, {world_size}), got {rank}")
        small, larger = divmod(-(-num_labels // unit), world_size)
        start = rank * small + min(rank, larger)
        stop = start + small + (rank < larger)
        return cls(min(start * unit, num_labels), min(stop * unit, num_labels), num_labels)
