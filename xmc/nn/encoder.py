"""The bag encoder: from weighted n-grams to a representation of D numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xmc.distributed.collectives import World, gather_rows
from xmc.nn.dropout import RowDropout
from xmc.types import Bag
from xmc_kernels.bag_sum import bag_sum


@dataclass(frozen=True)
class BagPart:
    """The batch of which a bag is one rank's rows."""

    bag: Bag  # the rows of all ranks, in order of rank
    counts: list[int]  # rows of every rank
    world: World

    @property
    def first(self) -> int:
        """This rank's first row."""
        return sum(self.counts[: self.world.rank])


class BagEncoder(nn.Module):
    """`dropout(relu(sum of weight * vector over the bag's features + bias))`.

    The gradient of the table is sparse: the rows of the features that the batch contains, sorted
    and distinct, each held once. Train it with `xmc.nn.lazy.LazyAdamW` and a step costs the same
    for any number of features. An empty bag gives `relu(bias)`.

    With a `part`, in training, a bag is one rank's rows of a batch. The gradient of the table is
    then that of the whole batch, on every rank the same. Backward gathers [B, D] for it, far less
    than the rows of the table that are touched.

    Raises IndexError or RuntimeError, as `F.embedding_bag`, for an id out of range.
    """

    part: BagPart | None = None

    def __init__(self, num_features: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_features < 1 or dim < 1:
            raise ValueError(
                f"expected num_features and dim of at least 1, got {num_features} and {dim}"
            )
        # torch's module holds the table, because DistributedDataParallel knows from its type that
        # the gradient is sparse.
        self.table = nn.EmbeddingBag(
            num_features,
            dim,
            mode="sum",
            sparse=True,
            include_last_offset=True,
            _weight=torch.empty(num_features, dim),
        )
        self.bias = nn.Parameter(torch.empty(dim))
        self.dropout = RowDropout(dropout)
        self.reset_parameters()

    @property
    def num_features(self) -> int:
        return self.table.num_embeddings

    @property
    def out_features(self) -> int:
        return self.table.embedding_dim

    def reset_parameters(self) -> None:
        """Vectors N(0, _TABLE_STD^2), bias 0."""
        nn.init.normal_(self.table.weight, std=_TABLE_STD)
        nn.init.zeros_(self.bias)

    def forward(self, bag: Bag) -> Tensor:  # [B, D]
        weight = self.table.weight
        part = self.part if self.training else None
        total = _BagSum.apply(weight, bag.ids, bag.offsets, bag.weights.to(weight.dtype), part)
        return self.dropout(F.relu(total + self.bias))

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, out_features={self.out_features}"


# On eurlex57k (tf-idf of unit norm, D = 512, encoder lr 5e-3), validation P@1 after 2 epochs: 87.4
# at 0.005, 87.1 at 0.02, 87.0 at 0.05, 86.9 at 0.1, 86.2 at 0.2, 78.5 at 1.
_TABLE_STD = 0.02


class _BagSum(torch.autograd.Function):
    """Weighted `F.embedding_bag` whose gradient of the table is its touched rows.

    torch's own backward holds one row per entry of the bags, repeated ids included; this one sums
    them through the transposed bag: feature u collects `weight * d_out[row]` from its rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor,
        part: BagPart | None,
    ) -> Tensor:
        ctx.part = part
        if part is None:
            ctx.save_for_backward(ids, offsets, weights)
        else:
            ctx.save_for_backward(part.bag.ids, part.bag.offsets, part.bag.weights.to(weights))
        ctx.table_shape = table.shape
        # Detached: embedding_bag then skips what only its own backward would need.
        return F.embedding_bag(
            ids,
            table.detach(),
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        ids, offsets, weights = ctx.saved_tensors
        if ctx.part is not None:
            d_out = gather_rows(d_out, ctx.part.counts, ctx.part.world)
        in_order, order = torch.sort(ids, stable=True)
        features, counts = torch.unique_consecutive(in_order, return_counts=True)
        starts = F.pad(counts.cumsum(0), (1, 0))
        bags = torch.arange(len(offsets) - 1, device=ids.device)
        rows = torch.repeat_interleave(bags, offsets.diff())
        values = bag_sum(d_out.contiguous(), rows[order], starts, weights[order])
        d_table = torch.sparse_coo_tensor(
            features[None], values, ctx.table_shape, is_coalesced=True, check_invariants=False
        )
        return d_table, None, None, None, None
