"""What `contrastive.py` times at one shape: ways to a symmetric loss with its gradients.

Queries and keys are random unit vectors, key i near query i.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import contrastive_baselines as baselines
import torch
import torch.nn.functional as F
from timing import BATCHES, Job
from torch import Tensor

from xmc.nn.compiler import missing_compiler

TILED = "tiled, one pass"
MATERIALISED = "materialised"
COMPILED = "materialised, compiled"
ROW_CHUNKED = "row-chunked"
TWO_DIRECTIONS = "two one-directional passes"
_INPUT_BYTES = 2**30  # of all batches that take turns


@dataclass(frozen=True)
class Shape:
    """Rows of a batch, features, dtype of queries and keys."""

    B: int
    D: int = 256
    dtype: str = "float32"

    @property
    def flops(self) -> float:
        """Of four products of B^2 D: scores once, again for the gradients, and two gradients."""
        return 8.0 * self.B * self.B * self.D


@dataclass(frozen=True)
class Limits:
    """What is not tried."""

    dense_bytes: float
    """What the matrices of a materialised loss may hold."""
    seconds: float
    """What a run may take, by the time of the same variant at another shape."""
    truth_flops: float
    """Products of the float64 truth."""


class Inputs:
    """Batches that take turns; fewer where they are large."""

    def __init__(self, shape: Shape, device: str, *, batches: int = BATCHES) -> None:
        dtype = getattr(torch, shape.dtype)
        size = 2 * shape.B * shape.D * dtype.itemsize
        self.batches = []
        for _ in range(max(1, min(batches, _INPUT_BYTES // size))):
            q = F.normalize(torch.randn(shape.B, shape.D, device=device), dim=1)
            near = q + torch.randn_like(q) / shape.D**0.5
            self.batches.append((q.to(dtype), F.normalize(near, dim=1).to(dtype)))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.batches[number % len(self.batches)]


def dense_bytes(shape: Shape) -> int:
    """Matrices [B, B] that the materialised loss holds at its peak: four of float32."""
    return 16 * shape.B * shape.B


def _ways(shape: Shape, device: str, *, compiled: bool) -> Iterator[tuple[str, baselines.Loss]]:
    own = baselines.differentiated
    yield TILED, own(baselines.tiled_loss)
    yield MATERIALISED, own(baselines.materialised_loss)
    if compiled and not missing_compiler(torch.device(device)):
        torch.compiler.reset()  # else eight shapes are compiled and no more
        yield COMPILED, own(torch.compile(baselines.materialised_loss, dynamic=False))
    yield ROW_CHUNKED, own(baselines.row_chunked_loss)
    yield TWO_DIRECTIONS, own(baselines.two_directions_loss)
    yield _cached()


@functools.cache
def _cached() -> tuple[str, baselines.Loss]:
    return baselines.cached_loss()


class Run:
    """A way over batches that take turns; its first result is compared with the truth."""

    def __init__(self, way: baselines.Loss, inputs: Inputs, truth: baselines.Truth | None) -> None:
        self._way, self._inputs, self._truth = way, inputs, truth
        self.errors: dict[str, float] = {}

    def __call__(self, number: int) -> baselines.LossAndGradients:
        result = self._way(*self._inputs[number])
        if self._truth is not None and not self.errors:  # the warm-up, with batch 0
            of_loss, of_gradient = self._truth.errors(*result)
            self.errors = {"loss_error": of_loss, "gradient_error": of_gradient}
        return result


def loss_jobs(
    shape: Shape,
    device: str,
    inputs: Inputs,
    *,
    truth: baselines.Truth | None = None,
    compiled: bool = False,
) -> Iterator[Job]:
    """A job for each way to the loss; what it runs is a `Run`."""
    about = {**asdict(shape), "scale": baselines.SCALE, "input_batches": len(inputs.batches)}
    for what, way in _ways(shape, device, compiled=compiled):
        ours = what in (TILED, TWO_DIRECTIONS)
        yield Job("loss", what, Run(way, inputs, truth), about, shape.flops, ours=ours)


def left_out(what: str, shape: Shape, limits: Limits, known: dict[str, tuple[Shape, float]]) -> str:
    """Why a way is not tried at a shape, in words; empty where it is.

    `known` holds a shape and the milliseconds of each way, from which time grows as the products.
    """
    held = dense_bytes(shape)
    if what in (MATERIALISED, COMPILED) and held > limits.dense_bytes:
        return f"matrices of {held / 2**30:.3g} GiB, more than --dense-gib"
    if what in known:
        other, milliseconds = known[what]
        seconds = milliseconds / 1e3 * shape.flops / other.flops
        if seconds > limits.seconds:
            return f"about {seconds:.0f} s a run, more than --max-seconds"
    return ""
