"""InfoNCE: each query picks its positives out of all keys, and keys out of all queries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xmc.distributed.collectives import World
from xmc.losses import over_ranks
from xmc.losses.exchange import Exchange
from xmc.losses.gradient import Compute, differentiable
from xmc.losses.targets import (
    Given,
    checked_weights,
    mean_weights,
    normalised,
    number,
    rows_of,
)
from xmc.types import SparseLabels
from xmc_kernels import similarity
from xmc_kernels.pairs import Pairs


def info_nce(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    *,
    scale: float | Tensor,
    symmetric: bool = False,
    positives: SparseLabels | None = None,
    query_ids: Tensor | None = None,  # [Bq] int64
    key_ids: Tensor | None = None,  # [Bk] int64
    weights: Tensor | None = None,  # [Bq]
    decoupled: bool = False,
    positive_weights: Tensor | None = None,  # [nnz]
    world: World = World.alone(),
    exchange: str = "auto",
    wire_dtype: torch.dtype | None = None,
) -> Tensor:  # [] float32, float64 where q is
    """Cross-entropy of the rows of `S = scale * q @ k.T` with their positives; S is never whole.

    `l_i = logsumexp_j S_ij - sum_j y_ij S_ij`, and the loss is `sum w_i l_i / sum w_i` (arXiv
    1807.03748, eq. 4). y is the row of `positives` (CSR, one column per key), divided by its sum;
    `positive_weights` weighs its entries. Without `positives` key i is the positive of query i, and
    further keys are negatives. `symmetric` takes the mean with the same loss of the columns: a key
    picks among queries, `y_ij` divided by the sum of its column, and a key's weight is the mean
    weight of its positives (arXiv 2103.00020, fig. 3).

    Pairs of equal `query_ids` and `key_ids` that are not positives enter no sum: another document
    of the same label is no negative. `decoupled` leaves positives out of the logsumexp (arXiv
    2110.06848, eq. 5). Rows (columns) without positives are left out of the mean. Where no pair is
    left in the logsumexp, the loss of the row is 0.

    Differentiable once, in q, k and scale (a number or a tensor []), in the inputs' dtype; what
    needs no gradient costs none. Of sizes [Bq, Bk] exist tiles alone, and the gradients are made
    with the loss: memory beside them does not grow with Bq * Bk.

    With a `world` of several ranks q, k and all that goes with them are this rank's rows, and the
    loss that of the rows of all ranks, joined in order of rank: see `xmc.losses`.

    Raises ValueError or TypeError where arguments do not fit together, on features or a scale that
    are not finite, positives that are no keys and weights below 0.
    """
    given, scale = Given(positives, query_ids, key_ids, weights), number(scale, q)
    way = Exchange(world, exchange, wire_dtype)
    make = _of_one_process if world.size == 1 else _of_all_ranks
    compute = make(q, k, scale, given, positive_weights, symmetric, decoupled, way)
    return differentiable(compute, q, k, scale)


def _of_one_process(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    given: Given,
    positive_weights: Tensor | None,
    symmetric: bool,
    decoupled: bool,
    exchange: Exchange,
) -> Compute:
    """All pairs at once: the operation may keep tiles of its first pass for the second."""
    pairs = given.pairs(q, k)
    row, column = _targets(pairs, q, k, symmetric, given.weights, positive_weights)

    def compute(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        (q, k, scale), (want_q, want_k, want_scale) = tensors, wanted
        return similarity.softmax_loss(
            *(q, k, scale),
            pairs,
            row,
            column,
            decoupled=decoupled,
            want_q=want_q or (want_scale and not want_k),
            want_k=want_k,
        )

    return compute


def _of_all_ranks(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    given: Given,
    positive_weights: Tensor | None,
    symmetric: bool,
    decoupled: bool,
    exchange: Exchange,
) -> Compute:
    """Keys block by block; what a row or column weighs is divided by the sum of all ranks."""
    own: list[Tensor] = []

    def shares() -> Tensor:
        """Of each pair in its row; what a pair counts goes into `own` beside the rows' weights."""
        pairs = given.pairs(q, k, check_keys=False)
        row_weights = checked_weights(given.weights, len(q), q)
        values = checked_weights(positive_weights, pairs.num_pairs, q, "positive_weights")
        own[:] = [row_weights, values]
        queries = rows_of(pairs)
        return row_weights[queries] * normalised(values, queries, len(q))

    rows, share, total = over_ranks.agree(
        *(q, k, given, exchange),
        numbers={"scale": scale},
        options={"symmetric": symmetric, "decoupled": decoupled},
        weights=shares,
    )
    row_weights, values = own
    row = share / total if total > 0 else torch.zeros_like(share)

    def compute(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        (q, k, scale), (want_q, want_k, want_scale) = tensors, wanted
        return over_ranks.softmax_loss(
            *(q, k, scale, rows),
            row / 2 if symmetric else row,
            values,
            row_weights if symmetric else None,
            decoupled=decoupled,
            want_q=want_q or (want_scale and not want_k),
            want_k=want_k,
        )

    return compute


def _targets(
    pairs: Pairs,
    q: Tensor,
    k: Tensor,
    symmetric: bool,
    weights: Tensor | None,
    positive_weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What each positive pair weighs in the sum of rows and in that of columns."""
    row_weights = checked_weights(weights, len(q), q)
    values = checked_weights(positive_weights, pairs.num_pairs, q, "positive_weights")
    queries, keys = rows_of(pairs), pairs.indices.long()
    # Over the pairs of a row these add up to its weight, so that their sum is that of the rows.
    row = mean_weights(row_weights[queries] * normalised(values, queries, len(q)))
    if not symmetric:
        return row, None
    # Beyond the keys an index would be out of bounds; the operation names it.
    column = normalised(values, keys.clamp(0, len(k) - 1), len(k))
    return row / 2, mean_weights(row_weights[queries] * column) / 2


class InfoNCE(nn.Module):
    """`info_nce` with a scale (the inverse temperature) of its own.

    `learnable` makes the logarithm of the scale a parameter; in training it is held below
    `max_scale` (100, arXiv 2103.00020, section 2.5).
    """

    def __init__(
        self,
        scale: float = 20.0,
        *,
        learnable: bool = False,
        symmetric: bool = False,
        decoupled: bool = False,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if not 0 < scale <= max_scale:
            raise ValueError(f"expected a scale above 0, at most {max_scale}, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learnable)
        self.symmetric, self.decoupled, self.max_scale = symmetric, decoupled, max_scale

    @property
    def scale(self) -> Tensor:
        """The scale now, a tensor []."""
        return self.log_scale.exp()

    def forward(
        self,
        q: Tensor,  # [Bq, D]
        k: Tensor,  # [Bk, D]
        *,
        positives: SparseLabels | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weights: Tensor | None = None,
        positive_weights: Tensor | None = None,
        world: World = World.alone(),
        exchange: str = "auto",
        wire_dtype: torch.dtype | None = None,
    ) -> Tensor:  # []
        """The loss; arguments as in `info_nce`."""
        if self.training and self.log_scale.requires_grad:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return info_nce(
            q,
            k,
            scale=self.scale,
            symmetric=self.symmetric,
            positives=positives,
            query_ids=query_ids,
            key_ids=key_ids,
            weights=weights,
            decoupled=self.decoupled,
            positive_weights=positive_weights,
            world=world,
            exchange=exchange,
            wire_dtype=wire_dtype,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return (
            f"scale={self.scale.item():.4g}, learnable={self.log_scale.requires_grad}, "
            f"symmetric={self.symmetric}, decoupled={self.decoupled}"
        )
