"""Positives of a batch ordered by label, and what kernels make of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
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


@triton.jit
def targets(
    positive_label_ptr,
    positive_row_ptr,
    position,
    stop,
    label,
    offs_b,
    BLOCK_L: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """[BLOCK_L, BLOCK_B] of zeros and ones, and the position of the first pair from stop on.

    `position` is that of the first pair of these labels or higher ones. Most labels have no
    positive in a batch: one number tells.
    """
    target = tl.zeros((BLOCK_L, BLOCK_B), tl.float32)
    positive = tl.load(positive_label_ptr + position)
    while positive < stop:
        here = offs_b == tl.load(positive_row_ptr + position)
        target = tl.where((label == positive)[:, None] & here[None, :], 1.0, target)
        position += 1
        positive = tl.load(positive_label_ptr + position)
    return target, position
