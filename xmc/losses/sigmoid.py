"""Every pair of a query and a key as a decision of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xmc.distributed.collectives import World
from xmc.losses import over_ranks
from xmc.losses.exchange import Exchange
from xmc.losses.gradient import Compute, differentiable
from xmc.losses.targets import Given, checked_weights, mean_weights, number
from xmc.types import SparseLabels
from xmc_kernels import similarity


def sigmoid_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: SparseLabels | None = None,
    query_ids: Tensor | None = None,  # [Bq] int64
    key_ids: Tensor | None = None,  # [Bk] int64
    weights: Tensor | None = None,  # [Bq]
    world: World = World.alone(),
    exchange: str = "auto",
    wire_dtype: torch.dtype | None = None,
) -> Tensor:  # [] float32, float64 where q is
    """`-mean_i sum_j log sigmoid(y_ij * (scale * q_i . k_j + bias))`, y = 1 for positives, else -1.

    SigLIP, arXiv 2303.15343, eq. 1; the mean is weighted by `weights`. Positives, masks by ids,
    errors and memory as in `info_nce`, but rows without positives count: their pairs are
    negatives. Differentiable once, in q, k, scale and bias. Ranks as in `info_nce`.
    """
    given, numbers = (
        Given(positives, query_ids, key_ids, weights),
        (number(scale, q), number(bias, q)),
    )
    way = Exchange(world, exchange, wire_dtype)
    make = _of_one_process if world.size == 1 else _of_all_ranks
    return differentiable(make(q, k, *numbers, given, way), q, k, *numbers)


def _of_one_process(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, given: Given, exchange: Exchange
) -> Compute:
    pairs = given.pairs(q, k)
    row_weight = mean_weights(checked_weights(given.weights, len(q), q))

    def compute(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        (q, k, scale, bias), (want_q, want_k, want_scale, _) = tensors, wanted
        return similarity.sigmoid_loss(
            *(q, k, scale, bias),
            pairs,
            row_weight,
            want_q=want_q or (want_scale and not want_k),
            want_k=want_k,
        )

    return compute


def _of_all_ranks(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, given: Given, exchange: Exchange
) -> Compute:
    rows, row_weights, total = over_ranks.agree(
        *(q, k, given, exchange),
        numbers={"scale": scale, "bias": bias},
        options={},
        weights=lambda: checked_weights(given.weights, len(q), q),
    )
    row_weight = row_weights / total if total > 0 else torch.zeros_like(row_weights)

    def compute(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        (q, k, scale, bias), (want_q, want_k, want_scale, _) = tensors, wanted
        return over_ranks.sigmoid_loss(
            *(q, k, scale, bias, rows, row_weight),
            want_q=want_q or (want_scale and not want_k),
            want_k=want_k,
        )

    return compute


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` with a scale and a bias of its own; the paper starts at 10 and -10.

    `learnable` makes the logarithm of the scale, and the bias, parameters.
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0, *, learnable: bool = True) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"expected a scale above 0, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learnable)

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
        world: World = World.alone(),
        exchange: str = "auto",
        wire_dtype: torch.dtype | None = None,
    ) -> Tensor:  # []
        """The loss; arguments as in `sigmoid_loss`."""
        return sigmoid_loss(
            q,
            k,
            scale=self.scale,
            bias=self.bias,
            positives=positives,
            query_ids=query_ids,
            key_ids=key_ids,
            weights=weights,
            world=world,
            exchange=exchange,
            wire_dtype=wire_dtype,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"scale={self.scale.item():.4g}, bias={self.bias.item():.4g}"
