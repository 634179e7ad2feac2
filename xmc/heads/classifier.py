"""The classifier head: scores for all labels, trained by the fused step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import HeadConfig, OptimizerConfig, RewireConfig
from xmc.distributed.collectives import (
    World,
    counts_of,
    gather_labels,
    gather_rows,
    merge_topk,
    sum_,
)
from xmc.distributed.sharding import RowShard
from xmc.heads.candidates import candidate_scores
from xmc.heads.fresh import fresh_layer, own_labels, starting_bias
from xmc.heads.growth import growth_scores
from xmc.heads.head import HeadResult
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire import RewireReport, rewire_
from xmc.nn.rewire_schedule import prune_amount
from xmc.nn.slot_age import SlotAges
from xmc.types import LabelShard, SparseLabels, TopK
from xmc_kernels.checks import check_label_range
from xmc_kernels.classifier import ClassifierState, UpdateRule, classifier_step_, make_state
from xmc_kernels.topk import fan_in_topk


class ClassifierHead(nn.Module):
    """One-against-all classifier over a fixed fan-in layer, or over a dense one.

    The layer's weights never enter autograd: `loss_and_grad` computes scores, gradients and the
    optimizer's update label tile by label tile, so neither `[B, L]` nor a gradient of the weights
    exists (an `[L, F]` gradient does while a step is accumulated over several passes).

    Where `world` has several ranks, each has the layer of its `shard` of the labels, and all call
    a method together. Labels are named by their ids among all of them everywhere.
    """

    def __init__(
        self,
        layer: FixedFanInLinear | nn.Linear,
        *,
        loss: str = "bce",
        optimizer: OptimizerConfig | None = None,
        label_smoothing: float = 0.0,
        positive_weight: Tensor | None = None,  # [L], what a positive of each label counts
        world: World | None = None,  # None: alone
        shard: LabelShard | None = None,  # the labels of the layer; None: all
    ) -> None:
        super().__init__()
        optimizer = optimizer or OptimizerConfig()
        self.world = world or World.alone()
        self.shard = shard or LabelShard.whole(layer.out_features)
        if len(self.shard) != layer.out_features:
            raise ValueError(f"expected a shard of {layer.out_features} labels, got {self.shard}")
        self.layer = layer.requires_grad_(False)
        self.loss = loss
        self.label_smoothing = label_smoothing
        # Only training needs it, and has it from the data: it is in no file.
        self.positive_weight: Tensor | None
        positive_weight = _checked(positive_weight, self.shard)
        self.register_buffer("positive_weight", positive_weight, persistent=False)
        self.rule = UpdateRule(
            kind=optimizer.kind,
            momentum=optimizer.momentum,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            moment_dtype=optimizer.moments,
        )
        self.lr = optimizer.lr  # set by the trainer before every step
        self.steps = 0  # optimizer steps taken
        self.seed = 0  # of stochastic rounding
        self._moments: ClassifierState | None = None

    @classmethod
    def from_config(
        cls,
        in_features: int,
        num_labels: int,
        config: HeadConfig,
        optimizer: OptimizerConfig | None = None,
        *,
        label_shares: Tensor | None = None,  # [L], share of training rows with the label
        positive_weight: Tensor | None = None,  # [L], what a positive of each label counts
        world: World | None = None,  # None: alone
    ) -> ClassifierHead:
        """A fresh head; `label_shares` feeds the log-prior bias.

        Every rank calls it with the same arguments and the same state of torch's generator, gets
        the rows of its labels as one process would draw them, and leaves the generator alike.
        Raises ValueError for fewer groups of labels than ranks.
        """
        world = world or World.alone()
        shard = own_labels(num_labels, world, config.group_size)
        layer = fresh_layer(in_features, shard, config)
        shares = label_shares if config.bias_init == "log_prior" else None
        layer.bias = starting_bias(layer.bias, shares, shard)
        return cls(
            layer,
            loss=config.loss,
            optimizer=optimizer,
            label_smoothing=config.label_smoothing,
            positive_weight=positive_weight,
            world=world,
            shard=shard,
        )

    @property
    def index(self) -> Tensor | None:
        """[L/G, F] for a sparse layer, None for a dense one."""
        return self.layer.index if isinstance(self.layer, FixedFanInLinear) else None

    @property
    def _storage(self) -> dict[str, Any]:
        """How the layer's numbers are stored, for the operations."""
        if isinstance(self.layer, FixedFanInLinear):
            return {"pattern": self.layer.pattern, "scale": self.layer.weight_scale}
        return {}

    @property
    def _objective(self) -> dict[str, Any]:
        """The loss, for the operations."""
        return {
            "loss": self.loss,
            "smoothing": self.label_smoothing,
            "positive_weight": self.positive_weight,
        }

    def _read(self, reps: Any) -> tuple[Tensor, Tensor | None]:
        """What the operations read, and each label's place in it: all of `reps`, by `index`."""
        return reps, self.index

    def _gather(self, reps: Any, counts: Sequence[int]) -> Any:
        """What all ranks' rows read."""
        return gather_rows(reps, counts, self.world)

    def _summed(self, own: HeadResult, reps: Any, counts: Sequence[int]) -> HeadResult:
        """The whole result of this rank's `reps`, from that of its labels on all rows."""
        return own.summed(counts, self.world)

    @property
    def moments(self) -> ClassifierState:
        """The optimizer's state, made at first use: a head that only predicts holds none."""
        if self._moments is None:
            self._moments = make_state(self.layer.weight, self.layer.bias, self.rule)
        return self._moments

    @property
    def num_labels(self) -> int:
        """On all ranks."""
        return self.shard.num_labels

    @torch.no_grad()
    def loss_and_grad(
        self,
        reps: Tensor,  # [B, D]
        labels: SparseLabels,
        *,
        num_rows: int | None = None,
        update: bool = True,
        weight: float = 1.0,
    ) -> HeadResult:
        """`weight` times the loss summed over labels, mean over `num_rows`; updates the layer.

        One all-gather of [B, D] and of the labels, one reduce-scatter of [B, D]. Raises ValueError
        on representations that are not finite.
        """
        counts = counts_of(len(reps), self.world)
        own = self.own_loss_and_grad(
            self._gather(reps, counts),
            gather_labels(labels, counts, self.world),
            num_rows=num_rows,
            update=update,
            weight=weight,
        )
        return self._summed(own, reps, counts)

    @torch.no_grad()
    def own_loss_and_grad(
        self,
        reps: Tensor,  # [B, D], the rows of all ranks
        labels: SparseLabels,  # of the same rows
        *,
        num_rows: int | None = None,
        update: bool = True,
        weight: float = 1.0,
    ) -> HeadResult:
        """`loss_and_grad` of this rank's labels alone, whose sum over ranks is the whole."""
        labels = self._own(labels)
        x, index = self._read(reps)
        loss, d_reps = classifier_step_(
            x,
            self.layer.weight,
            index,
            self.layer.bias,
            labels.indptr,
            labels.indices,
            **self._storage,
            **self._objective,
            rule=self.rule,
            state=self.moments,
            lr=self.lr,
            step=self.steps + 1,
            grad_scale=weight / (num_rows or len(reps)),
            update=update,
            seed=self.seed,
            row_offset=self.shard.start,
        )
        self.steps += update
        return HeadResult(loss, d_reps)

    @torch.no_grad()
    def topk(
        self,
        reps: Tensor,  # [B, D]
        k: int,
        exclude: SparseLabels | None = None,  # labels never returned for a row
    ) -> TopK:
        """The k best labels of each row, streamed over label tiles; rows are the same on all ranks.

        One all-gather of [B, k].
        """
        pairs = None if exclude is None else (exclude.indptr, exclude.indices)
        x, index = self._read(reps)
        scores, labels = fan_in_topk(
            *(x, self.layer.weight, index, self.layer.bias, k),
            **self._storage,
            exclude=pairs,
            label_offset=self.shard.start,
        )
        return merge_topk(TopK(scores, labels), self.world)

    def candidate_scores(
        self,
        reps: Tensor,  # [B, D]
        labels: Tensor,  # [B, C] int64, -1 for padding
    ) -> Tensor:  # [B, C] float32
        """The exact scores of chosen labels, see `xmc.heads.candidates`; the same on all ranks.

        One all-reduce of [B, C].
        """
        return self._candidate_scores(reps, labels)

    def _candidate_scores(
        self,
        reps: Tensor,
        labels: Tensor,
        columns: Tensor | None = None,  # see `xmc.heads.candidates`
    ) -> Tensor:
        check_label_range(labels[labels >= 0], self.num_labels)
        mine = (labels >= self.shard.start) & (labels < self.shard.stop)
        own = torch.where(mine, labels - self.shard.start, -1)
        scores = candidate_scores(self.layer, reps, own, columns=columns)
        total = sum_(scores.masked_fill(~mine, 0), self.world)
        return total.masked_fill(labels < 0, -torch.inf)

    @torch.no_grad()
    def rewire_(
        self,
        config: RewireConfig,
        *,
        seed: int,
        step: int,
        progress: float = 0.0,
        reps: Tensor | None = None,  # [B, D], this rank's rows of the step just taken
        labels: SparseLabels | None = None,  # of the same B rows
        ages: SlotAges | None = None,
    ) -> RewireReport:
        """Prune and regrow the layer's inputs, optimizer moments with them, in place.

        `progress` is the share of the rewiring period that has passed, for annealing. RigL needs
        `reps` and `labels`: its gradient is that of their mean loss at the present weights.
        The pattern does not depend on the number of ranks, but for RigL in ties that rounding
        breaks. With RigL one all-gather of [B, D] and of the labels; always one of the report.

        Raises ValueError for a dense head, for RigL without rows, and between the passes of an
        accumulated step.
        """
        if not isinstance(self.layer, FixedFanInLinear):
            raise ValueError("rewire.method: a dense head has no pattern to rewire")
        if config.method == "static":
            raise ValueError('rewire.method: expected "set" or "rigl", got "static"')
        if self.moments.grad_weight is not None:
            raise ValueError("expected to rewire after an optimizer step, got one half accumulated")
        growth = None
        if config.method == "rigl":
            if reps is None or labels is None:
                raise ValueError("rewire.method: rigl needs the representations and labels of rows")
            counts = counts_of(len(reps), self.world)
            growth = growth_scores(
                gather_rows(reps, counts, self.world),
                self._own(gather_labels(labels, counts, self.world)),
                self.layer.weight,
                self.layer.index,
                self.layer.bias,
                **self._storage,
                **self._objective,
            )
        moments = [m for m in (self.moments.weight_m, self.moments.weight_v) if m is not None]
        shard = self.shard
        report = rewire_(
            self.layer.weight,
            self.layer.index,
            self.layer.in_features,
            **self._storage,
            prune=config.prune,
            amount=prune_amount(config, progress),
            seed=seed,
            step=step,
            growth=growth,
            init=config.init,
            moments=moments,
            keep_moments=config.moments == "keep",
            row_offset=shard.start // self.layer.group_size,
            ages=ages,
        )
        num_slots = shard.num_labels // self.layer.group_size * self.layer.fan_in
        return report.of_all(self.world, first_label=shard.start, num_slots=num_slots)

    def slot_ages(self) -> SlotAges | None:
        """What `rewire_` follows as `ages`, of the labels on this rank; None for a dense head."""
        layer = self.layer
        if not isinstance(layer, FixedFanInLinear):
            return None
        rows = self._rows.per(layer.group_size)
        device = layer.weight.device
        return SlotAges(rows.total, layer.fan_in, device=device, world=self.world, shard=rows)

    def training_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by name; the same storage, so that they can be loaded into."""
        named = {name: getattr(self.moments, name) for name in _MOMENTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def row_shards(self) -> dict[str, RowShard]:
        """Of the tensors, by their names in `state_dict` and `training_state`, which rows are here.

        Empty where all are. A name may be of a tensor that this head does not have.
        """
        if self.world.size == 1:
            return {}
        layer = self.layer
        group = layer.group_size if isinstance(layer, FixedFanInLinear) else 1
        names = ("layer.weight", "layer.bias", "layer.weight_scale", *_MOMENTS)
        return dict.fromkeys(names, self._rows) | {"layer.index": self._rows.per(group)}

    @property
    def _rows(self) -> RowShard:
        """The shard as rows of the layer's tensors."""
        return RowShard(self.shard.start, self.shard.stop, self.shard.num_labels)

    def _own(self, labels: SparseLabels) -> SparseLabels:
        """Those of the shard, counted from its first; ValueError where one is out of range."""
        if len(self.shard) < self.num_labels:  # the operations know only the shard's
            check_label_range(labels.indices, self.num_labels)
        return labels.within(self.shard)


def _checked(positive_weight: Tensor | None, shard: LabelShard) -> Tensor | None:
    """The shard's as float32; ValueError unless all labels have a finite one of at least 0."""
    if positive_weight is None:
        return None
    num_labels = shard.num_labels
    if list(positive_weight.shape) != [num_labels]:
        raise ValueError(
            f"expected positive_weight of shape [{num_labels}], got {list(positive_weight.shape)}"
        )
    good = (positive_weight >= 0) & (positive_weight < torch.inf)
    if not bool(good.all()):
        label = int((~good).nonzero()[0])
        raise ValueError(
            f"expected finite positive weights of at least 0, "
            f"got {positive_weight[label].item()} for label {label}"
        )
    own = positive_weight[shard.start : shard.stop].float()
    return own if len(own) == num_labels else own.clone()  # a view would keep those of all labels


_MOMENTS = ("weight_m", "weight_v", "bias_m", "bias_v", "weight_m_scale", "weight_v_scale")
