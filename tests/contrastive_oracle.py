"""Contrastive losses on the whole matrix of similarities, written without a look at ours.

Textbook expressions row by row, differentiated by autograd. Float64 unless a caller asks for the
naive code in another dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def features(num_queries: int, num_keys: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit queries and keys in float64 with float32 values; key i is near query i."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(num_queries, dim, generator=g)
    k = torch.randn(num_keys, dim, generator=g)
    both = min(num_queries, num_keys)
    k[:both] = q[:both] + 0.7 * k[:both]
    return F.normalize(q, dim=1).double(), F.normalize(k, dim=1).double()


def diagonal(num_queries: int, num_keys: int) -> Tensor:
    """Positive weights [Bq, Bk]: key i for query i."""
    return torch.eye(num_queries, num_keys, dtype=torch.float64)


def masked_pairs(positive: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Tensor:
    """Which pairs of equal ids are not positives."""
    if query_ids is None or key_ids is None:
        return torch.zeros(positive.shape, dtype=torch.bool)
    return (query_ids[:, None] == key_ids[None, :]) & ~positive.bool()


def _direction(scores: Tensor, positive: Tensor, allowed: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean cross-entropy of rows; weights [B, B'] are those of pairs."""
    total, of_weights = scores.new_zeros(()), scores.new_zeros(())
    for row, y, own, w in zip(scores, positive, allowed, weights, strict=True):
        if y.sum() == 0:
            continue
        pairs = w * y / y.sum()
        of_weights = of_weights + pairs.sum()
        if own.any():
            chosen = y > 0
            lse = torch.logsumexp(row[own], 0)
            total = total + (pairs[chosen] * (lse - row[chosen])).sum()
    return total / of_weights if of_weights > 0 else total


def info_nce(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    positive: Tensor,  # [Bq, Bk] weights of positives, 0 elsewhere
    *,
    designated: Tensor | None = None,
    masked: Tensor | None = None,
    weights: Tensor | None = None,
    symmetric: bool = False,
    decoupled: bool = False,
) -> Tensor:
    """The mean over rows, or half of it and half of the mean over columns."""
    scores = scale * (q @ k.T)
    positive = positive.to(scores.dtype)
    allowed = torch.ones(positive.shape, dtype=torch.bool) if masked is None else ~masked
    if decoupled:
        allowed = allowed & ~(positive > 0 if designated is None else designated)
    w = scores.new_ones(len(q)) if weights is None else weights.to(scores.dtype)
    w = w[:, None].expand(positive.shape)
    loss = _direction(scores, positive, allowed, w)
    if symmetric:
        loss = (loss + _direction(scores.T, positive.T, allowed.T, w.T)) / 2
    return loss


def sigmoid_loss(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive: Tensor,
    *,
    masked: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Minus log sigmoid of signed logits, summed over keys and averaged over queries."""
    logits = scale * (q @ k.T) + bias
    terms = -F.logsigmoid(torch.where(positive > 0, logits, -logits))
    if masked is not None:
        terms = torch.where(masked, 0.0, terms)
    w = terms.new_ones(len(q)) if weights is None else weights.to(terms.dtype)
    return (w * terms.sum(1)).sum() / w.sum()


def recall_at_k(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    *,
    ks: tuple[int, ...],
    masked: Tensor | None = None,
    weights: Tensor | None = None,
    rank_temperature: float = 0.01,
    cut_temperature: float = 1.0,
) -> Tensor:
    """One minus the smooth recall, positive by positive."""
    scores = q @ k.T
    total, of_weights = scores.new_zeros(()), scores.new_zeros(())
    for i, row in enumerate(scores):
        own = positive[i].nonzero()[:, 0].tolist()
        if not own:
            continue
        ranks = []
        for x in own:
            others = torch.ones(len(row), dtype=torch.bool)
            others[x] = False
            if masked is not None:
                others &= ~masked[i]
            ranks.append(1 + torch.sigmoid((row[others] - row[x]) / rank_temperature).sum())
        rank = torch.stack(ranks)
        recall = scores.new_zeros(())
        for cut in ks:
            hits = torch.sigmoid((cut - rank) / cut_temperature).sum()
            recall = recall + hits.clamp(max=cut) / min(cut, len(own)) / len(ks)
        w = scores.new_ones(()) if weights is None else weights[i].to(scores.dtype)
        total, of_weights = total + w * (1 - recall), of_weights + w
    return total / of_weights if of_weights > 0 else total


def with_gradients(loss, tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float64):
    """`loss(*tensors)` in a dtype, with its gradients (zeros where it depends on nothing)."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    if not value.requires_grad:
        return value, *(torch.zeros_like(leaf) for leaf in leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), *(
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    )
