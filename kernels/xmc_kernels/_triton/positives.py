"""Positives of a batch ordered by label, as kernels meet them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positives(NamedTuple):
    """(label, row) pairs of a batch, labels rising, closed by a pair that no label reaches."""

    labels: Tensor  # [nnz + 1] int32
    rows: Tensor  # [nnz + 1] int32

    def first(self, labels: Tensor) -> Tensor:
        """Positions of the first pairs of these labels or higher ones, int64."""
        return torch.searchsorted(self.labels, labels.int())


def sort_by_label(indptr: Tensor, indices: Tensor, num_labels: int) -> Positives:
    """From CSR rows, on their device and without waiting for it."""
    device = indices.device
    numbers = torch.arange(len(indptr) - 1, dtype=torch.int32, device=device)
    rows = torch.repeat_interleave(numbers, indptr.diff(), output_size=len(indices))
    labels, order = indices.sort(stable=True)
    end = torch.tensor([num_labels], dtype=torch.int32, device=device)
    return Positives(torch.cat([labels, end]), torch.cat([rows[order], end]))
