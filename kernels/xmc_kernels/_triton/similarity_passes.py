"""The two passes of the softmax loss of all similarities on a GPU: `similarity.py` in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels._triton.similarity import Inputs
from xmc_kernels._triton.similarity_scores import Weights
from xmc_kernels.pairs import Pairs


def softmax_statistics(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    columns_too: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexps of rows and (else of no keys) columns; scores of designated pairs."""
    inputs = Inputs(q, k, scale, pairs, without_pairs=decoupled)
    row_lse, column_lse, dots = inputs.statistics(columns_too)
    scores = inputs.scale * dots
    return row_lse, row_lse[:0].clone() if column_lse is None else column_lse, scores


def softmax_gradients(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    target: Tensor,  # [nnz]
    positive: Tensor,  # [nnz]
    row_lse: Tensor,  # [Bq]
    row_weight: Tensor,  # [Bq]
    column_lse: Tensor | None,  # [Bk]
    column_weight: Tensor | None,  # [Bk]
    decoupled: bool,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `G = row_weight exp(S - row_lse) + column_weight exp(S - column_lse) - target` gives."""
    inputs = Inputs(q, k, scale, pairs, without_pairs=decoupled)
    if not (want_q or want_k):
        none = q.new_empty((0, q.shape[1]), dtype=torch.float32)
        return none, none.clone(), torch.zeros((), device=q.device)
    rows, keys = inputs.queries, inputs.pairs.indices.long()
    pair_grad = -target
    if not decoupled:
        pair_grad += row_weight[rows] * (positive - row_lse[rows]).exp()
        if column_lse is not None and column_weight is not None:
            pair_grad += column_weight[keys] * (positive - column_lse[keys]).exp()
    weights = Weights(row_weight.contiguous(), row_lse.contiguous(), column_weight, column_lse)
    dq, dk, sums = inputs.gradients(weights, pair_grad, want_q, want_k, wide=True)
    d_scale = sums[0] - (target.double() * inputs.dots().double()).sum()
    return dq, dk, d_scale.float()
