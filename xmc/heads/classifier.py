"""The classifier head: scores for all labels, trained by the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import HeadConfig, OptimizerConfig, RewireConfig
from xmc.heads.candidates import candidate_scores
from xmc.heads.growth import growth_scores
from xmc.heads.head import HeadResult
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire import RewireReport, rewire_
from xmc.nn.rewire_schedule import prune_amount
from xmc.nn.slot_age import SlotAges
from xmc.types import SparseLabels, TopK
from xmc_kernels.classifier import ClassifierState, UpdateRule, classifier_step_, make_state
from xmc_kernels.topk import fan_in_topk


class ClassifierHead(nn.Module):
    """One-against-all classifier over a fixed fan-in layer, or over a dense one.

    The layer's weights never enter autograd: `loss_and_grad` computes scores, gradients and the
    optimizer's update label tile by label tile, so neither `[B, L]` nor a gradient of the weights
    exists (an `[L, F]` gradient does while a step is accumulated over several passes).
    """

    def __init__(
        self,
        layer: FixedFanInLinear | nn.Linear,
        *,
        loss: str = "bce",
        optimizer: OptimizerConfig | None = None,
        label_smoothing: float = 0.0,
        positive_weight: Tensor | None = None,  # [L], what a positive of each label counts
    ) -> None:
        super().__init__()
        optimizer = optimizer or OptimizerConfig()
        self.layer = layer.requires_grad_(False)
        self.loss = loss
        self.label_smoothing = label_smoothing
        # Only training needs it, and has it from the data: it is in no file.
        self.positive_weight: Tensor | None
        self.register_buffer(
            "positive_weight", _checked(positive_weight, layer.out_features), persistent=False
        )
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
    ) -> ClassifierHead:
        """A fresh head; `label_shares` feeds the log-prior bias."""
        layer: FixedFanInLinear | nn.Linear
        dtype = DTYPES[config.weight_dtype]
        if config.kind == "sparse":
            layer = FixedFanInLinear(
                in_features,
                num_labels,
                config.fan_in,
                group_size=config.group_size,
                pattern=_pattern(config.pattern),
                dtype=dtype,
            )
        else:
            layer = nn.Linear(in_features, num_labels, dtype=dtype)
        layer.bias = starting_bias(layer.bias, config, label_shares)
        return cls(
            layer,
            loss=config.loss,
            optimizer=optimizer,
            label_smoothing=config.label_smoothing,
            positive_weight=positive_weight,
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

    @property
    def moments(self) -> ClassifierState:
        """The optimizer's state, made at first use: a head that only predicts holds none."""
        if self._moments is None:
            self._moments = make_state(self.layer.weight, self.layer.bias, self.rule)
        return self._moments

    @property
    def num_labels(self) -> int:
        return self.layer.out_features

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

        Raises ValueError on representations that are not finite.
        """
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
        """The k best labels of each row, streamed over label tiles."""
        pairs = None if exclude is None else (exclude.indptr, exclude.indices)
        x, index = self._read(reps)
        scores, labels = fan_in_topk(
            *(x, self.layer.weight, index, self.layer.bias, k),
            **self._storage,
            exclude=pairs,
        )
        return TopK(scores, labels)

    def candidate_scores(
        self,
        reps: Tensor,  # [B, D]
        labels: Tensor,  # [B, C] int64, -1 for padding
    ) -> Tensor:  # [B, C] float32
        """The exact scores of chosen labels, see `xmc.heads.candidates`."""
        return candidate_scores(self.layer, reps, labels)

    @torch.no_grad()
    def rewire_(
        self,
        config: RewireConfig,
        *,
        seed: int,
        step: int,
        progress: float = 0.0,
        reps: Tensor | None = None,  # [B, D], all rows of the step just taken
        labels: SparseLabels | None = None,  # of the same B rows
        ages: SlotAges | None = None,
    ) -> RewireReport:
        """Prune and regrow the layer's inputs, optimizer moments with them, in place.

        `progress` is the share of the rewiring period that has passed, for annealing. RigL needs
        `reps` and `labels`: its gradient is that of their mean loss at the present weights.

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
            growth = growth_scores(
                reps,
                labels,
                self.layer.weight,
                self.layer.index,
                self.layer.bias,
                **self._storage,
                **self._objective,
            )
        moments = [m for m in (self.moments.weight_m, self.moments.weight_v) if m is not None]
        return rewire_(
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
            ages=ages,
        )

    def training_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by name; the same storage, so that they can be loaded into."""
        named = {name: getattr(self.moments, name) for name in _MOMENTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
}


def starting_bias(
    bias: Tensor | None,  # [L]
    config: HeadConfig,
    label_shares: Tensor | None,  # [L]
) -> nn.Parameter:  # [L] float32
    """Zeros, or the logits of the shares: one a label, not worth the rounding of weights."""
    assert bias is not None
    start = torch.zeros_like(bias, dtype=torch.float32)
    if config.bias_init == "log_prior" and label_shares is not None:
        start.copy_(torch.logit(label_shares.double(), eps=1e-7))
    return nn.Parameter(start)


def _checked(positive_weight: Tensor | None, num_labels: int) -> Tensor | None:
    """As float32; ValueError unless there is a finite weight of at least 0 for each label."""
    if positive_weight is None:
        return None
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
    return positive_weight.float()


def _pattern(text: str) -> tuple[int, int] | None:
    """(n, m) from "n:m"."""
    if not text:
        return None
    n, m = text.split(":")
    return int(n), int(m)


_MOMENTS = ("weight_m", "weight_v", "bias_m", "bias_v", "weight_m_scale", "weight_v_scale")
