"""Which keys are positives of which query, and which pairs do not count at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Designated pairs of Bq queries and Bk keys, as CSR, and ids that take pairs out."""

    indptr: Tensor  # [Bq+1] int64
    indices: Tensor  # [nnz] int32, keys, sorted and distinct within a row
    query_ids: Tensor | None = None  # [Bq] int64
    key_ids: Tensor | None = None  # [Bk] int64
    """A pair of equal ids that is not designated is masked: it enters no sum."""

    @property
    def num_pairs(self) -> int:
        """The number of designated pairs."""
        return self.indices.shape[0]
