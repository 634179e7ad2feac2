"""Definition of the weighted sum of bags of rows, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bag_sum(
    x: Tensor,  # [N, D]
    ids: Tensor,  # [nnz] int64
    offsets: Tensor,  # [U+1] int64
    weights: Tensor,  # [nnz]
) -> Tensor:  # [U, D]
    """`out[u] = sum over e in offsets[u]..offsets[u+1] of weights[e] * x[ids[e]]`."""
    return F.embedding_bag(
        ids, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
