"""Dropout of some rows of a batch, as if all of the batch were here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowDropout(nn.Dropout):
    """`nn.Dropout`, or that of rows `part[0]`, `part[0] + 1`, ... of a batch of `part[1]` rows.

    With a part it draws the mask of the whole batch and keeps its rows': ranks that start from the
    same random state drop together what one process drops, and stay in the same state.
    """

    part: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, ...] -> [B, ...]
        if self.part is None or not self.training or self.p == 0:
            return super().forward(x)
        first, total = self.part
        whole = torch.ones((total, *x.shape[1:]), dtype=x.dtype, device=x.device)
        return x * F.dropout(whole, self.p)[first : first + len(x)]
