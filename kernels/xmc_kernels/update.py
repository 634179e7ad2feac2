"""How a gradient becomes a weight: update rules and the tensors they remember."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xmc_kernels import float8

RULES = ("sgd", "momentum", "adamw", "adagrad")


@dataclass(frozen=True)
class UpdateRule:
    """One of torch's optimizers, on the same gradients: SGD, SGD with momentum, AdamW, Adagrad.

    Weight decay is decoupled for adamw (`w -= lr * wd * w`) and L2 otherwise (`grad += wd * w`);
    biases never decay.
    """

    kind: Literal["sgd", "momentum", "adamw", "adagrad"] = "adamw"
    momentum: float = 0.9
    """Used by momentum only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Used by adamw only."""
    eps: float = 1e-8
    """Used by adamw and adagrad."""
    weight_decay: float = 0.0
    moment_dtype: Literal["float32", "float8"] = "float32"
    """How adamw and momentum remember a weight: float8 takes a byte a number (`float8.py`)."""

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise ValueError(f"expected an update rule of {', '.join(RULES)}, got {self.kind!r}")
        if self.moment_dtype not in ("float32", "float8"):
            raise ValueError(f"expected moments of float32 or float8, got {self.moment_dtype!r}")
        if self.moment_dtype == "float8" and not self.keeps_mean:
            raise ValueError(f"expected adamw or momentum with float8 moments, got {self.kind!r}")

    @property
    def keeps_mean(self) -> bool:
        """Whether the rule remembers a running mean of gradients."""
        return self.kind in ("momentum", "adamw")

    @property
    def keeps_square(self) -> bool:
        """Whether the rule remembers squared gradients."""
        return self.kind in ("adamw", "adagrad")


@dataclass
class ClassifierState:
    """What a rule remembers of a layer, None where it remembers nothing.

    `grad_weight` and `grad_bias` exist only between the first pass of an accumulated step and its
    update.
    """

    weight_m: Tensor | None = None  # [L, F], mean of gradients
    weight_v: Tensor | None = None  # [L, F], mean or sum of squared gradients
    bias_m: Tensor | None = None  # [L]
    bias_v: Tensor | None = None  # [L]
    grad_weight: Tensor | None = None  # [L, F]
    grad_bias: Tensor | None = None  # [L]
    weight_m_scale: Tensor | None = None  # [L] float32, of float8 moments
    weight_v_scale: Tensor | None = None  # [L] float32; weight_v then holds square roots


def moment_dtype(param: Tensor) -> torch.dtype:
    """float64 for a parameter of float64, float32 for all others."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def make_state(weight: Tensor, bias: Tensor | None, rule: UpdateRule) -> ClassifierState:
    """Zero moments for `rule`: in float32 at least, those of weights in float8 where it says so."""
    narrow = rule.moment_dtype == "float8"

    def zeros(like: Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> Tensor | None:
        if like is None or not wanted:
            return None
        return torch.zeros(like.shape, dtype=dtype or moment_dtype(like), device=like.device)

    def scales(wanted: bool) -> Tensor | None:
        return torch.ones(len(weight), device=weight.device) if narrow and wanted else None

    dtype = float8.DTYPE if narrow else None
    return ClassifierState(
        weight_m=zeros(weight, rule.keeps_mean, dtype),
        weight_v=zeros(weight, rule.keeps_square, dtype),
        bias_m=zeros(bias, rule.keeps_mean),
        bias_v=zeros(bias, rule.keeps_square),
        weight_m_scale=scales(rule.keeps_mean),
        weight_v_scale=scales(rule.keeps_square),
    )
