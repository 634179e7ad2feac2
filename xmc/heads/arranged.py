"""A classifier whose rows are labels in another order, the first of them perhaps dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.config import HeadConfig, OptimizerConfig, RewireConfig
from xmc.distributed.collectives import World, counts_of, gather_labels, gather_rows
from xmc.distributed.sharding import RowShard
from xmc.heads.classifier import ClassifierHead
from xmc.heads.head import HeadResult
from xmc.heads.order import num_dense, order_problem, renumbered
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire import RewireReport
from xmc.nn.slot_age import SlotAges
from xmc.types import SparseLabels, TopK
from xmc_kernels.checks import check_label_range

_NEVER = -1e30  # bias of a phantom row: its sigmoid is 0, and every label outranks it


class ArrangedHead(nn.Module):
    """Row r scores label `order[r]`; outside, there are label ids only.

    The first rows are those of `dense`, if given: the most frequent labels, which read every
    feature. The others are those of `sparse`, whose size may exceed the labels by less than a
    group: such phantom rows (weight 0, bias -1e30) have no loss, no gradient and no place in a
    top-k. Only a rewiring by threshold sees them, as zeros in the mean magnitude of their group.

    Ties in a returned row are in order of label id. Where labels of equal score compete for the
    last place, those of the lower rows win.
    """

    order: Tensor  # [L] int32, the label of each row
    _row_of: Tensor | None  # [L] int32, the row of each label: made at first use, and in no file

    def __init__(
        self,
        sparse: ClassifierHead,
        order: Tensor,  # [L], the label of each row
        *,
        dense: ClassifierHead | None = None,
        dense_lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.sparse = sparse
        self.dense_lr_scale = dense_lr_scale
        self.register_buffer("order", order.int())
        self.register_buffer("_row_of", None, persistent=False)
        group = sparse.layer.group_size if isinstance(sparse.layer, FixedFanInLinear) else 1
        num_rows, num_labels = self._num_dense + sparse.num_labels, self.num_labels
        if not 0 <= num_rows - num_labels < group:
            raise ValueError(
                f"expected {num_labels} rows for {num_labels} labels, or less than a group of "
                f"{group} more, got {num_rows}"
            )
        problem = order_problem(self.order, num_labels)
        if problem:
            raise ValueError(problem)
        self._silence_phantoms_()

    @classmethod
    def from_config(
        cls,
        in_features: int,
        num_labels: int,
        config: HeadConfig,
        optimizer: OptimizerConfig | None = None,
        *,
        order: Tensor | None = None,  # [L], the label of each row; None: labels as they come
        label_shares: Tensor | None = None,  # [L], by label
        positive_weight: Tensor | None = None,  # [L], by label
        world: World | None = None,  # None: alone
    ) -> ArrangedHead:
        """A fresh head, see `ClassifierHead.from_config` and `xmc.heads.order.label_order`.

        Dense and sparse rows are divided among the ranks each by themselves. Dense rows are stored
        like sparse ones, in bfloat16 where those are float8.
        """
        if order is None:
            order = torch.arange(num_labels)
        dense_rows = num_dense(num_labels, config)
        tail = num_labels - dense_rows
        padded = -(-tail // config.group_size) * config.group_size

        def rows(values: Tensor | None, start: int, stop: int) -> Tensor | None:
            """Of the labels of some rows; a phantom gets one half, which means nothing."""
            if values is None:
                return None
            chosen = values[order[start:stop].long()]
            return F.pad(chosen, (0, stop - start - len(chosen)), value=0.5)

        def part(options: HeadConfig, start: int, stop: int) -> ClassifierHead:
            return ClassifierHead.from_config(
                in_features,
                stop - start,
                options,
                optimizer,
                label_shares=rows(label_shares, start, stop),
                positive_weight=rows(positive_weight, start, stop),
                world=world,
            )

        plain = replace(config, order="none", dense_share=0.0)
        dense = None
        if dense_rows:
            dtype = "bfloat16" if config.weight_dtype == "float8" else config.weight_dtype
            options = replace(plain, kind="dense", pattern="", weight_dtype=dtype, group_size=1)
            dense = part(options, 0, dense_rows)
        sparse = part(plain, dense_rows, dense_rows + padded)
        return cls(sparse, order, dense=dense, dense_lr_scale=config.dense_lr_scale)

    @property
    def num_labels(self) -> int:
        return self.order.shape[0]

    @property
    def world(self) -> World:
        """The ranks that the rows of both parts are divided among."""
        return self.sparse.world

    @property
    def layer(self) -> FixedFanInLinear | nn.Linear:
        """Of the sparse rows on this rank, phantoms included: the one whose pattern evolves."""
        return self.sparse.layer

    @property
    def loss(self) -> str:
        return self.sparse.loss

    @property
    def lr(self) -> float:
        """Of the sparse rows; dense ones learn at `dense_lr_scale` times it."""
        return self.sparse.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.sparse.lr = value
        if self.dense is not None:
            self.dense.lr = value * self.dense_lr_scale

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.sparse.steps

    @steps.setter
    def steps(self, value: int) -> None:
        for _, part in self._parts():
            part.steps = value

    @property
    def seed(self) -> int:
        """Of stochastic rounding."""
        return self.sparse.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.sparse.seed = value
        if self.dense is not None:
            self.dense.seed = value + 1  # noise is keyed by the row within a part

    def loss_and_grad(
        self,
        reps: Tensor,  # [B, D]
        labels: SparseLabels,
        *,
        num_rows: int | None = None,
        update: bool = True,
        weight: float = 1.0,
    ) -> HeadResult:
        """The sum of the results of dense and sparse rows; see `Head.loss_and_grad`."""
        counts = counts_of(len(reps), self.world)
        reps = gather_rows(reps, counts, self.world)
        labels = gather_labels(labels, counts, self.world)
        first, *others = [
            part.own_loss_and_grad(reps, own, num_rows=num_rows, update=update, weight=weight)
            for (_, part), own in zip(self._parts(), self._by_part(labels), strict=True)
        ]
        return sum(others, first).summed(counts, self.world)

    @torch.no_grad()
    def topk(
        self,
        reps: Tensor,  # [B, D]
        k: int,
        exclude: SparseLabels | None = None,  # labels never returned for a row
    ) -> TopK:
        """The k best labels of each row, streamed over label tiles."""
        parts = list(self._parts())
        excluded = [None] * len(parts) if exclude is None else self._by_part(exclude)
        found = []
        for (start, part), own in zip(parts, excluded, strict=True):
            best = part.topk(reps, k, own)
            rows = torch.where(best.labels < 0, best.labels, best.labels + start)
            found.append(TopK(best.scores, rows))
        best = found[0] if len(found) == 1 else found[0].merge(found[1])
        # Phantom rows come behind all others, so that they push none out.
        nothing = (best.labels < 0) | (best.labels >= self.num_labels)
        labels = self.order[best.labels.masked_fill(nothing, 0)].long()
        scores = best.scores.masked_fill(nothing, -torch.inf)
        return TopK(scores, labels.masked_fill(nothing, -1)).ranked()

    @torch.no_grad()
    def candidate_scores(
        self,
        reps: Tensor,  # [B, D]
        labels: Tensor,  # [B, C] int64, -1 for padding
    ) -> Tensor:  # [B, C] float32
        """The exact scores of chosen labels; -inf for padding."""
        check_label_range(labels[labels >= 0], self.num_labels)
        rows = torch.where(labels < 0, -1, self._rows[labels.clamp(min=0)].long())
        scores = []
        for start, part in self._parts():
            inside = (rows >= start) & (rows < start + part.num_labels)
            scores.append(part.candidate_scores(reps, torch.where(inside, rows - start, -1)))
        return scores[0] if len(scores) == 1 else torch.maximum(*scores)  # the other is -inf

    @torch.no_grad()
    def rewire_(
        self,
        config: RewireConfig,
        *,
        seed: int,
        step: int,
        progress: float = 0.0,
        reps: Tensor | None = None,  # [B, D]
        labels: SparseLabels | None = None,
        ages: SlotAges | None = None,
    ) -> RewireReport:
        """`ClassifierHead.rewire_` of the sparse rows; `dead_labels` are label ids, in order."""
        report = self.sparse.rewire_(
            config,
            seed=seed,
            step=step,
            progress=progress,
            reps=reps,
            labels=None if labels is None else self._by_part(labels)[-1],
            ages=ages,
        )
        self._silence_phantoms_()  # new weights may be anything but 0
        rows = report.dead_labels + self._num_dense
        labels_of = self.order[rows[rows < self.num_labels]].long()
        return replace(report, dead_labels=labels_of.sort().values)

    def training_state(self) -> dict[str, Tensor]:
        """The optimizers' tensors, by name; the same storage, so that they can be loaded into."""
        state = {f"sparse.{name}": tensor for name, tensor in self.sparse.training_state().items()}
        if self.dense is not None:
            dense = self.dense.training_state()
            state |= {f"dense.{name}": tensor for name, tensor in dense.items()}
        return state

    def slot_ages(self) -> SlotAges | None:
        """`ClassifierHead.slot_ages` of the sparse rows."""
        return self.sparse.slot_ages()

    def row_shards(self) -> dict[str, RowShard]:
        """`ClassifierHead.row_shards` of both parts; `order` is whole on every rank."""
        shards = {f"sparse.{name}": rows for name, rows in self.sparse.row_shards().items()}
        if self.dense is not None:
            shards |= {f"dense.{name}": rows for name, rows in self.dense.row_shards().items()}
        return shards

    @property
    def _rows(self) -> Tensor:
        """The row of each label, [L] int32."""
        if self._row_of is None:
            self._row_of = self.order.argsort().int()
        return self._row_of

    @property
    def _num_dense(self) -> int:
        return 0 if self.dense is None else self.dense.num_labels

    def _parts(self) -> Iterator[tuple[int, ClassifierHead]]:
        """First row and head of each part."""
        if self.dense is not None:
            yield 0, self.dense
        yield self._num_dense, self.sparse

    def _by_part(self, labels: SparseLabels) -> list[SparseLabels]:
        """Rows [B] of label ids as rows of classifier rows, for each part."""
        if labels.num_labels != self.num_labels:
            raise ValueError(
                f"expected rows over {self.num_labels} labels, got {labels.num_labels}"
            )
        sizes = [part.num_labels for _, part in self._parts()]
        return renumbered(labels, self._rows, sizes)

    @torch.no_grad()
    def _silence_phantoms_(self) -> None:
        layer, shard = self.sparse.layer, self.sparse.shard
        first = max(self.num_labels - self._num_dense, shard.start) - shard.start
        if first >= layer.out_features or layer.weight.is_meta:
            return
        if layer.bias is None:
            raise ValueError("expected a bias, which keeps phantom rows silent, got none")
        phantoms = layer.weight[first:]
        (phantoms.view(torch.uint8) if phantoms.itemsize == 1 else phantoms).zero_()
        layer.bias[first:] = _NEVER

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses an order that is none: predictions would go by wrong names."""
        given = state_dict.get(prefix + "order")
        problem = order_problem(given, self.num_labels) if isinstance(given, Tensor) else ""
        if problem:
            error_msgs.append(f"{prefix}order: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._row_of = None
