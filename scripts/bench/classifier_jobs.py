"""What `classifier.py` times of ours: shapes, variants of a sparse layer, operations on them.

Numbers are random; rows of weights and indices repeat after 16,384 labels (which no cache notices:
they lie in memory one by one). Every sparse variant has weights of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timing import BATCHES, Job
from torch import Tensor

from xmc_kernels import checks, float8
from xmc_kernels.classifier import UpdateRule, classifier_step_, make_state
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer
from xmc_kernels.packing import BLOCKS, pack_index
from xmc_kernels.topk import fan_in_topk

OPERATIONS = ("step", "forward", "forward+backward", "top-k")
POSITIVES = 5  # per row
K = 5
LR = 1e-3
LARGEST_GROUP = 64
SCORE_BYTES = 2**29
"""What [B, L] may take where an operation writes it."""
_POOL = 16_384


@dataclass(frozen=True)
class Shape:
    """Labels, features, fan-in, rows."""

    L: int = 131_072
    D: int = 768
    F: int = 32
    B: int = 64

    def __post_init__(self) -> None:
        if self.L % LARGEST_GROUP:
            raise ValueError(f"expected labels in multiples of {LARGEST_GROUP}, got {self.L}")


@dataclass(frozen=True)
class Variant:
    """A sparse layer; float8 weights come with scales, a pattern with packed indices."""

    dtype: torch.dtype = torch.float32
    group: int = 1
    pattern: tuple[int, int] | None = None
    rule: str = "sgd"

    @property
    def name(self) -> str:
        """For example "sparse G16 1:32 bfloat16"; AdamW is named, SGD is not."""
        pattern = "" if self.pattern is None else f" {self.pattern[0]}:{self.pattern[1]}"
        rule = "" if self.rule == "sgd" else f", {self.rule}"
        return f"sparse G{self.group}{pattern} {dtype_name(self.dtype)}{rule}"


def dtype_name(dtype: torch.dtype) -> str:
    """For example "bfloat16"."""
    return str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")


def nearest_pattern(fan_in: int, features: int) -> tuple[int, int]:
    """(n, m) whose fan-in n D / m is nearest to one wanted, the smallest such m."""
    pairs = [(n, m) for m in BLOCKS if features % m == 0 for n in range(1, m + 1)]
    if not pairs:
        raise ValueError(f"expected features in multiples of {BLOCKS[0]}, got {features}")
    return min(pairs, key=lambda pair: abs(pair[0] * features // pair[1] - fan_in))


def variants(shape: Shape, *, extras: bool) -> list[Variant]:
    """Groups, weights of 4, 2 and 1 bytes, patterns; `extras`: AdamW and (2, 4) too."""
    half = torch.bfloat16
    pattern = nearest_pattern(shape.F, shape.D)
    chosen = [Variant(dtype, group) for dtype in (torch.float32, half) for group in (1, 16, 64)]
    chosen += [Variant(torch.float32, 1, pattern), Variant(half, 1, pattern)]
    chosen += [Variant(half, 16, pattern), Variant(float8.DTYPE)]
    if extras:
        chosen += [Variant(rule="adamw"), Variant(half, 1, (2, 4))]
    return chosen


class Inputs:
    """Batches of features and positives."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        self._x = torch.randn(BATCHES, shape.B, shape.D, device=device)
        self._half = self._x.bfloat16()
        drawn = torch.randint(shape.L, (BATCHES, shape.B, POSITIVES), device=device)
        self.indices = drawn.sort(2).values.flatten(1).int()
        self.indptr = torch.arange(shape.B + 1, device=device) * POSITIVES
        self.rows = torch.arange(shape.B, device=device).repeat_interleave(POSITIVES)

    def x(self, number: int, dtype: torch.dtype) -> Tensor:  # [B, D]
        """Features in bfloat16 or float32."""
        return (self._half if dtype == torch.bfloat16 else self._x)[number]


@functools.cache
def _pool(rows: int, features: int, fan_in: int, pattern: tuple[int, int] | None) -> Tensor:
    """[rows, F] sorted, distinct inputs; n of every m where there is a pattern."""
    if pattern is None:
        return torch.rand(rows, features).topk(fan_in, dim=1).indices.sort(1).values
    n, m = pattern
    local = torch.rand(rows, features // m, m).topk(n, dim=2).indices.sort(2).values
    return (local + torch.arange(0, features, m)[:, None]).flatten(1)


def _repeat(pool: Tensor, rows: int, device: str) -> Tensor:
    return pool.to(device).repeat(-(-rows // len(pool)), 1)[:rows].contiguous()


def make_layer(shape: Shape, variant: Variant, device: str) -> Layer:
    """A random layer of this variant; a pattern has a fan-in of its own."""
    pattern = variant.pattern
    fan_in = shape.F if pattern is None else pattern[0] * shape.D // pattern[1]
    pool = _pool(min(shape.L, _POOL), shape.D, fan_in, pattern)[: shape.L // variant.group]
    wide = torch.uint16 if shape.D <= 65_536 else torch.int32
    rows = pool.to(wide) if pattern is None else pack_index(pool.int(), pattern)
    index = _repeat(rows, shape.L // variant.group, device)
    values = torch.randn(min(shape.L, _POOL), fan_in) / fan_in**0.5
    bias = torch.full((shape.L,), -5.0, device=device)
    if variant.dtype == float8.DTYPE:
        scale = float8.row_scale(values)
        codes = float8.quantize(values, scale).view(torch.uint8)
        weight = _repeat(codes, shape.L, device).view(float8.DTYPE)
        scale = _repeat(scale[:, None], shape.L, device).flatten()
        return Layer(weight, index, bias, pattern, scale)
    weight = _repeat(values.to(variant.dtype), shape.L, device)
    return Layer(weight, index, bias, pattern)


def num_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def sparse_jobs(
    inputs: Inputs, variant: Variant, device: str, operations: tuple[str, ...]
) -> Iterator[Job]:
    """Our operations on one layer; `backend` in a record tells which code runs them."""
    shape = inputs.shape
    layer = make_layer(shape, variant, device)
    weight, index, bias = layer.weight, layer.index, layer.bias
    assert index is not None
    assert bias is not None
    rule = UpdateRule(variant.rule)  # type: ignore[arg-type]
    state = make_state(weight, bias, rule)
    moments = (state.weight_m, state.weight_v, state.bias_m, state.bias_v)
    narrow = device == "cuda" and variant.dtype != torch.float32
    x_dtype = torch.bfloat16 if narrow else torch.float32
    extra: dict[str, Any] = {"pattern": layer.pattern, "scale": layer.scale}
    read = num_bytes(weight, index, bias, layer.scale)
    macs = float(shape.B) * weight.numel()
    about = {
        **asdict(shape),
        "F": layer.fan_in,
        "fan_in_wanted": shape.F,
        "G": variant.group,
        "pattern": None if layer.pattern is None else list(layer.pattern),
        "dtype": dtype_name(variant.dtype),
        "x_dtype": dtype_name(x_dtype),
        "rule": variant.rule,
    }

    def job(operation: str, run: Callable[[int], object], flops: float, written: int) -> Job:
        others = moments if operation == "step" else ()
        x = inputs.x(0, x_dtype)
        on = {"backend": backend(x, layer, *others)}
        return Job(operation, variant.name, run, about | on, flops, read + written, ours=True)

    def step(number: int) -> object:
        return classifier_step_(
            inputs.x(number, x_dtype),
            weight,
            index,
            bias,
            inputs.indptr,
            inputs.indices[number],
            **extra,
            loss="bce",
            rule=rule,
            state=state,
            lr=LR,
            step=1,
            grad_scale=1 / shape.B,
        )

    def forward(number: int) -> Tensor:
        return fan_in_linear(inputs.x(number, x_dtype), weight, index, bias, **extra)

    def topk(number: int) -> object:
        return fan_in_topk(inputs.x(number, x_dtype), weight, index, bias, K, **extra)

    if "step" in operations:
        written = num_bytes(weight, bias, layer.scale) + 2 * num_bytes(*moments)
        yield job("step", step, 6 * macs, written)
    if variant.rule != "sgd":
        return
    if "top-k" in operations:
        yield job("top-k", topk, 2 * macs, 0)
    if shape.L * shape.B * 4 > SCORE_BYTES:
        return
    if "forward" in operations:
        yield job("forward", forward, 2 * macs, 0)
    if "forward+backward" in operations and layer.scale is None:
        grad = torch.randn(shape.B, shape.L, device=device).to(x_dtype)
        own = (weight.clone().requires_grad_(), bias.clone().requires_grad_())

        def both(number: int) -> object:
            x = inputs.x(number, x_dtype).detach().requires_grad_()
            out = fan_in_linear(x, own[0], index, own[1], **extra)
            return torch.autograd.grad(out, (x, *own), grad)

        yield job("forward+backward", both, 6 * macs, num_bytes(weight, bias))


def backend(x: Tensor, layer: Layer, *others: Tensor | None) -> str:
    """Which code an operation runs: "numba", "triton" or "reference"."""
    if x.is_cuda:
        return "triton" if checks.compiled_on_cuda(x, layer, *others) else "reference"
    return "numba" if checks.compiled_on_cpu(x, layer, *others) else "reference"
