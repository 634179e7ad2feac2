"""What others do for a symmetric contrastive loss with its gradients, and the truth in float64.

Each takes queries and keys [B, D], key i being the positive of query i, and returns the loss and
the gradients of both: a tensor, or a list of parts in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xmc.losses import info_nce

SCALE = 20.0
CHUNK_ROWS = 1024
MINI_BATCH = 32
"""The default of sentence-transformers' cached losses, version 6.2."""
_TRUTH_ROWS = 512

Gradient = Tensor | Sequence[Tensor]
LossAndGradients = tuple[Tensor, Gradient, Gradient]
Loss = Callable[[Tensor, Tensor], LossAndGradients]


def materialised_loss(q: Tensor, k: Tensor) -> Tensor:
    """The definition: cross-entropy of the whole matrix and of its transpose."""
    scores = (SCALE * (q @ k.T)).float()
    own = torch.arange(len(q), device=q.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def differentiated(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss with gradients by autograd."""

    def run(q: Tensor, k: Tensor) -> LossAndGradients:
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        value = loss(q, k)
        return value.detach(), *torch.autograd.grad(value, (q, k))

    return run


def tiled_loss(q: Tensor, k: Tensor) -> Tensor:
    """Ours: one pass over tiles for rows and columns, 4 products of B^2 D."""
    return info_nce(q, k, scale=SCALE, symmetric=True)


def two_directions_loss(q: Tensor, k: Tensor) -> Tensor:
    """The published kernels' scheme on our tiles: rows, then columns, each a loss of its own.

    arXiv 2410.17243 runs two one-directional losses. Ours takes 4 products of B^2 D for each, the
    published kernels 5: their backward pass builds the scores once for queries, once for keys.
    """
    return (info_nce(q, k, scale=SCALE) + info_nce(k, q, scale=SCALE)) / 2


def row_chunked_loss(q: Tensor, k: Tensor) -> Tensor:
    """Rows by chunks under activation checkpointing, and columns in the same way."""

    def part(some: Tensor, others: Tensor, start: int) -> Tensor:
        scores = (SCALE * (some @ others.T)).float()
        own = torch.arange(start, start + len(some), device=some.device)
        return F.cross_entropy(scores, own, reduction="sum")

    total = q.new_zeros((), dtype=torch.float32)
    for one, other in ((q, k), (k, q)):
        for number, some in enumerate(one.split(CHUNK_ROWS)):
            start = number * CHUNK_ROWS
            total = total + checkpoint(part, some, other, start, use_reentrant=False)
    return total / (2 * len(q))


def mini_batched(q: Tensor, k: Tensor) -> LossAndGradients:
    """The loss stage of sentence-transformers' cached loss, written from its description.

    Mini-batches of rows, one backward pass each; both directions of a mini-batch are products of
    their own. Representations come in mini-batches and get their gradients there.
    """
    parts = [_leaves(q), _leaves(k)]
    queries, keys = (torch.cat(part) for part in parts)
    values = []
    for start in range(0, len(queries), MINI_BATCH):
        own = torch.arange(start, min(start + MINI_BATCH, len(queries)), device=q.device)
        within = torch.arange(len(own), device=q.device)
        rows = SCALE * (queries[own] @ keys.T)
        columns = SCALE * (queries @ keys[own].T).T
        lse = (torch.logsumexp(rows, 1) + torch.logsumexp(columns, 1)) / 2
        value = (lse - rows[within, own]).mean() * len(own) / len(queries)
        value.backward()
        values.append(value.detach())
    return torch.stack(values).sum(), *([leaf.grad for leaf in part] for part in parts)


def sentence_transformers_loss() -> Loss:
    """The loss stage of the installed library itself, by dot products."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )
    from sentence_transformers.util import dot_score

    # The model is asked for its first module alone; representations are given.
    module = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()),
        SCALE,
        dot_score,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    if module.mini_batch_size != MINI_BATCH:
        raise RuntimeError(f"expected mini-batches of {MINI_BATCH}, got {module.mini_batch_size}")

    def run(q: Tensor, k: Tensor) -> LossAndGradients:
        parts = [_leaves(q), _leaves(k)]
        value = module.calculate_loss(parts, with_backward=True)
        return value, *([leaf.grad for leaf in part] for part in parts)

    return run


def cached_loss() -> tuple[str, Loss]:
    """What stands for sentence-transformers' cached loss here, by name."""
    try:
        return (
            f"sentence-transformers cached, mini-batch {MINI_BATCH}",
            sentence_transformers_loss(),
        )
    except (ImportError, TypeError):  # not installed, or a version without these options
        return f"mini-batches of {MINI_BATCH}, written after sentence-transformers", mini_batched


def _leaves(x: Tensor) -> list[Tensor]:
    return [part.detach().requires_grad_() for part in x.split(MINI_BATCH)]


@dataclass(frozen=True)
class Truth:
    """The loss in float64, and the gradients of some queries and keys."""

    rows: Tensor  # [R] int64
    loss: float
    dq: Tensor  # [R, D]
    dk: Tensor  # [R, D]

    def errors(self, loss: Tensor, dq: Gradient, dk: Gradient) -> tuple[float, float]:
        """Relative errors of a loss and, in the Euclidean norm, of both gradients together."""
        got = torch.cat([_whole(part)[self.rows].double() for part in (dq, dk)])
        true = torch.cat([self.dq, self.dk])
        of_gradient = float((got - true).norm() / true.norm())
        return abs(float(loss) - self.loss) / abs(self.loss), of_gradient


def _whole(gradient: Gradient) -> Tensor:
    return gradient if isinstance(gradient, Tensor) else torch.cat(list(gradient))


def truth(q: Tensor, k: Tensor, *, sample: int = 256) -> Truth:
    """The definition in float64, by blocks of rows; gradients of `sample` rows spread over all."""
    q, k = q.double(), k.double()
    size = len(q)
    of_rows, of_columns = [], torch.full((size,), -torch.inf, dtype=q.dtype, device=q.device)
    for block in q.split(_TRUTH_ROWS):
        scores = SCALE * (block @ k.T)
        of_rows.append(scores.logsumexp(1))
        of_columns = torch.logaddexp(of_columns, scores.logsumexp(0))
    r, c = torch.cat(of_rows), of_columns
    positive = SCALE * (q * k).sum(1)
    loss = float(((r - positive).mean() + (c - positive).mean()) / 2)
    rows = torch.linspace(0, size - 1, min(sample, size), device=q.device).long().unique()

    def gradient(x: Tensor, y: Tensor, own: Tensor, other: Tensor) -> Tensor:
        scores = SCALE * (x[rows] @ y.T)
        g = ((scores - own[rows, None]).exp() + (scores - other).exp()) / 2
        g[torch.arange(len(rows), device=q.device), rows] -= 1
        return SCALE * (g @ y) / size

    return Truth(rows, loss, gradient(q, k, r, c), gradient(k, q, c, r))
