"""A classifier whose labels read words beside the representation.

A representation of D numbers holds little of what tells rare labels apart; linear classifiers on
the words themselves have no such limit. Here a label has inputs of both kinds in one sparse row, so
that both are trained together by the same fused step, each on what the other leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from xmc.config import HeadConfig, OptimizerConfig
from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.heads.classifier import ClassifierHead
from xmc.heads.fresh import DTYPES, own_labels, starting_bias
from xmc.heads.head import HeadResult
from xmc.nn.bag_reps import gather_bag_reps
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.pattern import draw_index_, draw_uniform_
from xmc.types import BagReps

_TILE = 1 << 22  # inputs chosen at a time


class BagClassifierHead(ClassifierHead):
    """A `ClassifierHead` over D numbers of a representation and V features of bags.

    Its layer is one of D + V inputs, of which a label reads the first `fan_in` among the D and the
    others among the V. A batch holds few of the V features: the operations get the columns that it
    has, and an index that points to them. That index takes 4 (fan_in + bag_fan_in) bytes a label
    while the head is in use.
    """

    def __init__(
        self,
        layer: FixedFanInLinear,
        num_reps: int,  # D
        **options: Any,
    ) -> None:
        super().__init__(layer, **options)
        self.num_reps = num_reps
        self._local: Tensor | None = None  # [L, F] int32, made at first use

    @classmethod
    def from_options(
        cls,
        in_features: int,  # D
        num_bag_features: int,  # V
        num_labels: int,
        config: HeadConfig,
        optimizer: OptimizerConfig | None = None,
        *,
        label_shares: Tensor | None = None,  # [L], share of training rows with the label
        positive_weight: Tensor | None = None,  # [L], what a positive of each label counts
        world: World | None = None,  # None: alone
    ) -> BagClassifierHead:
        """A fresh head: the usual start for the representation, random features of weight 0.

        On several ranks as `ClassifierHead.from_config`. Raises ValueError where there are fewer
        features than labels are to read.
        """
        world = world or World.alone()
        shard = own_labels(num_labels, world)
        rows = RowShard(shard.start, shard.stop, num_labels)
        inner, words = config.fan_in, config.bag_fan_in
        if words > num_bag_features:
            raise ValueError(
                f"head.bag_fan_in: expected at most the {num_bag_features} features, got {words}"
            )
        layer = FixedFanInLinear(
            in_features + num_bag_features,
            len(shard),
            inner + words,
            dtype=DTYPES[config.weight_dtype],
            rows=rows,
        )
        if not layer.index.is_meta:
            parts = [torch.empty(len(shard), n, dtype=torch.int32) for n in (inner, words)]
            draw_index_(parts[0], in_features, rows)
            draw_index_(parts[1], num_bag_features, rows).add_(in_features)
            layer.index.copy_(torch.cat(parts, 1))
            with torch.no_grad():
                draw_uniform_(layer.weight[:, :inner], 1 / math.sqrt(inner), rows)
                layer.weight[:, inner:].zero_()
        shares = label_shares if config.bias_init == "log_prior" else None
        layer.bias = starting_bias(layer.bias, shares, shard)
        return cls(
            layer,
            in_features,
            loss=config.loss,
            optimizer=optimizer,
            label_smoothing=config.label_smoothing,
            positive_weight=positive_weight,
            world=world,
            shard=shard,
        )

    @torch.no_grad()
    def choose_features_(
        self,
        features: scipy.sparse.csr_matrix,  # [L, V] of all labels, at most bag_fan_in entries a row
        scale: float,
    ) -> None:
        """Let each label read these features, with `scale` times these weights.

        A label with fewer keeps some of its random ones, with weight 0.
        """
        layer = self._layer
        inner = layer.fan_in - self._bag_fan_in
        step = max(1, _TILE // layer.fan_in)
        for start in range(0, len(layer.weight), step):
            rows = slice(start, start + step)
            own = layer.index[rows, inner:].int().cpu().numpy() - self.num_reps
            first = self.shard.start + start
            index, weight = _completed(features[first : first + len(own)], own)
            layer.index[rows, inner:] = torch.from_numpy(index + self.num_reps).to(layer.index)
            layer.weight[rows, inner:] = torch.from_numpy(scale * weight).to(layer.weight)

    def _gather(self, reps: Any, counts: Sequence[int]) -> Any:
        """BagReps of all rows: instead of bags' columns the weights of their features are sent."""
        reps = _checked(reps)
        least = self._layer.fan_in
        return gather_bag_reps(reps, self.num_reps, counts, self.world, least=least)

    def _summed(self, own: HeadResult, reps: Any, counts: Sequence[int]) -> HeadResult:
        """d_reps [B, D + A + Z], on several ranks 0 for bags, whose columns differ over ranks."""
        if self.world.size == 1:
            return own
        own = HeadResult(own.loss, own.d_reps[:, : self.num_reps])
        result = own.summed(counts, self.world)
        missing = reps.values.shape[1] - self.num_reps
        return HeadResult(result.loss, F.pad(result.d_reps, (0, missing)))

    def _read(self, reps: Any) -> tuple[Tensor, Tensor | None]:
        """[B, D + A + Z], and an index into its columns."""
        reps = _checked(reps)
        return reps.values, self._local_index(reps)

    def candidate_scores(self, reps: Tensor | BagReps, labels: Tensor) -> Tensor:  # [B, C]
        """The exact scores of chosen labels, see `xmc.heads.candidates`."""
        reps = _checked(reps)
        return self._candidate_scores(reps.values, labels, self._columns(reps))

    def rewire_(self, *args: Any, **options: Any) -> Any:
        """Raises ValueError: features of bags stay as chosen."""
        raise ValueError("expected a head of representations alone to rewire, got one of bags too")

    @property
    def _layer(self) -> FixedFanInLinear:
        assert isinstance(self.layer, FixedFanInLinear)
        return self.layer

    @property
    def _bag_fan_in(self) -> int:
        """How many inputs of each label are features of bags."""
        return int((self._layer.index[0].int() >= self.num_reps).sum())

    def _columns(self, reps: BagReps) -> Tensor:  # [D + V] int32
        """The column of `reps.values` that holds each input; that of zeros for absent features."""
        size, zeros = self._layer.in_features, reps.values.shape[1] - 1
        columns = torch.full((size,), zeros, dtype=torch.int32, device=reps.values.device)
        present = torch.arange(zeros, dtype=torch.int32, device=reps.values.device)
        columns[: self.num_reps] = present[: self.num_reps]
        last = self.num_reps + len(reps.active)
        columns[self.num_reps + reps.active] = present[self.num_reps : last]
        return columns

    def _local_index(self, reps: BagReps) -> Tensor:  # [L, F] int32
        """Where in `reps.values` a label's inputs are.

        Rising but for absent features, which all point to the column of zeros: their gradient is 0.
        """
        index = self._layer.index
        if self._local is None or self._local.device != index.device:
            self._local = torch.empty(index.shape, dtype=torch.int32, device=index.device)
        wanted = index if index.dtype == torch.int32 else index.int()
        out = self._local.view(-1)
        torch.index_select(self._columns(reps), 0, wanted.reshape(-1), out=out)
        return self._local


def _checked(reps: Tensor | BagReps) -> BagReps:
    if not isinstance(reps, BagReps):
        raise TypeError(f"expected BagReps for a head that reads bags, got {type(reps).__name__}")
    return reps


def _completed(
    features: scipy.sparse.csr_matrix,  # [L, V]
    spare: np.ndarray,  # [L, F], distinct in each row
) -> tuple[np.ndarray, np.ndarray]:  # [L, F] int64 rising, [L, F] float32
    """The entries of each row, and as many spare columns of weight 0 as make F distinct ones.

    Raises ValueError for a row of more than F entries.
    """
    num_rows, count = spare.shape
    sizes = np.diff(features.indptr)
    if sizes.max(initial=0) > count:
        raise ValueError(f"expected at most {count} features a label, got {sizes.max()}")
    rows = np.concatenate(
        [np.repeat(np.arange(num_rows), sizes), np.repeat(np.arange(num_rows), count)]
    )
    columns = np.concatenate([features.indices.astype(np.int64), spare.reshape(-1)])
    weights = np.zeros(len(rows), np.float32)
    weights[: features.nnz] = features.data
    # Of a column that a row has twice, the first, which has the weight.
    _, first = np.unique(rows * features.shape[1] + columns, return_index=True)
    order = first[np.lexsort((first, rows[first]))]  # by row, entries before spare columns
    starts = np.searchsorted(rows[order], np.arange(num_rows))
    kept = order[(starts[:, None] + np.arange(count)).reshape(-1)]
    index, weight = columns[kept].reshape(spare.shape), weights[kept].reshape(spare.shape)
    rising = index.argsort(1, kind="stable")
    return np.take_along_axis(index, rising, 1), np.take_along_axis(weight, rising, 1)
