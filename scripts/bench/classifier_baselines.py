"""What torch has beside the classifier's operations: the best simple dense and sparse ways."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F
from classifier_jobs import (
    LR,
    SCORE_BYTES,
    Inputs,
    K,
    Shape,
    dtype_name,
    num_bytes,
)
from timing import Job
from torch import Tensor

from xmc_kernels.layer import Layer

TORCH_SPARSE = ("F.embedding_bag float32", "torch CSR float32", "torch 2:4 bfloat16")
"""Names of `torch_sparse_jobs`."""
_TILE = 131_072  # labels of a dense tile, so that [B, L] stays small here too


def torch_sparse_jobs(inputs: Inputs, layer: Layer, device: str) -> Iterator[Job]:
    """Torch's own ways to a float32 layer's forward, without the bias, labels first: [L, B]."""
    shape = inputs.shape
    if shape.L * shape.B * 4 > SCORE_BYTES:
        return
    assert layer.index is not None
    weight, index = layer.weight, layer.index.int()
    macs = float(shape.B) * weight.numel()
    about = asdict(shape) | {"G": 1, "dtype": "float32", "backend": "torch"}
    yield Job(
        "forward",
        TORCH_SPARSE[0],
        lambda number: F.embedding_bag(
            index,
            inputs.x(number, torch.float32).t().contiguous(),
            per_sample_weights=weight,
            mode="sum",
        ),
        about,
        2 * macs,
        num_bytes(weight, index),
    )
    crow = torch.arange(0, shape.L * shape.F + 1, shape.F, dtype=torch.int32, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch's CSR is "in beta state"
        matrix = torch.sparse_csr_tensor(
            crow, index.flatten(), weight.flatten(), (shape.L, shape.D)
        )
    yield Job(
        "forward",
        TORCH_SPARSE[1],
        lambda number: matrix @ inputs.x(number, torch.float32).t(),
        about,
        2 * macs,
        num_bytes(crow, index, weight),
    )
    yield _semi_structured_job(inputs, device)


def _semi_structured_job(inputs: Inputs, device: str) -> Job:
    """Torch's 2:4 tensors on the GPU's sparse tensor cores, beside our (2, 4) pattern."""
    shape = inputs.shape
    half = torch.bfloat16
    made: list[Tensor] = []

    def forward(number: int) -> Tensor:
        if device != "cuda":
            raise RuntimeError("needs a GPU's sparse tensor cores")
        if not made:
            dense = torch.randn(shape.L, shape.D // 4, 4, device=device).to(half)
            dense[:, :, ::2] = 0
            made.append(torch.sparse.to_sparse_semi_structured(dense.flatten(1)))
        return F.linear(inputs.x(number, half), made[0])

    about = {**asdict(shape), "F": shape.D // 2, "G": 1, "pattern": [2, 4]}
    about |= {"dtype": "bfloat16", "backend": "torch", "fan_in_wanted": shape.F}
    # Half the weights, and two bits for the place of each.
    state = shape.L * shape.D // 2 * 2 + shape.L * shape.D // 8
    flops = 2.0 * shape.B * shape.L * shape.D / 2
    return Job("forward", TORCH_SPARSE[2], forward, about, flops, state)


def dense_step(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [C, D]
    bias: Tensor,  # [C]
    rows: Tensor,  # [nnz] int64, of each positive
    labels: Tensor,  # [nnz] int64, minus the tile's first label
    rate: float,
) -> Tensor:  # [B, D]
    """d_x of binary cross-entropy's mean over rows; SGD on weight and bias in place."""
    g = F.linear(x, weight, bias).sigmoid_()
    here = (labels >= 0) & (labels < len(weight))
    at = rows * len(weight) + labels.clamp(0, len(weight) - 1)
    g.view(-1).scatter_add_(0, at, -here.to(g.dtype))
    g /= len(x)
    d_x = g @ weight
    weight.addmm_(g.T, x, alpha=-rate)
    bias.sub_(g.sum(0), alpha=rate)
    return d_x


def dense_jobs(
    inputs: Inputs, dtype: torch.dtype, device: str, operations: tuple[str, ...], *, compiled: bool
) -> Iterator[Job]:
    """The same with a dense matrix, by tiles of labels; `compiled` adds torch.compile's step."""
    shape = inputs.shape
    weight = torch.empty(shape.L, shape.D, device=device, dtype=dtype)
    weight.normal_(std=shape.D**-0.5)
    bias = torch.full((shape.L,), -5.0, device=device, dtype=dtype)
    tiles = [slice(start, start + _TILE) for start in range(0, shape.L, _TILE)]
    macs, read = float(shape.B) * weight.numel(), num_bytes(weight, bias)
    about = asdict(shape) | {"F": shape.D, "fan_in_wanted": None, "G": 1, "rule": "sgd"}
    about |= {"dtype": dtype_name(dtype), "x_dtype": dtype_name(dtype), "backend": "torch"}

    def trainer(one: Callable[..., Tensor]) -> Callable[[int], object]:
        def step(number: int) -> Tensor:
            x, labels = inputs.x(number, dtype), inputs.indices[number].long()
            parts = [
                one(x, weight[tile], bias[tile], inputs.rows, labels - tile.start, LR)
                for tile in tiles
            ]
            return functools.reduce(torch.add, parts)

        return step

    def topk(number: int) -> object:
        x = inputs.x(number, dtype)
        best = [F.linear(x, weight[tile], bias[tile]).topk(K, dim=1).values for tile in tiles]
        return best[0] if len(best) == 1 else torch.cat(best, 1).topk(K, dim=1).values

    name = f"dense {dtype_name(dtype)}"
    if "step" in operations:
        yield Job("step", name, trainer(dense_step), about, 6 * macs, 2 * read)
        if compiled:
            fast = trainer(torch.compile(dense_step, dynamic=False))
            what = f"dense compiled {dtype_name(dtype)}"
            yield Job("step", what, fast, about, 6 * macs, 2 * read)
    if "top-k" in operations:
        yield Job("top-k", name, topk, about, 2 * macs, read)
    if shape.L * shape.B * 4 > SCORE_BYTES:
        return
    if "forward" in operations:
        yield Job(
            "forward",
            name,
            lambda number: F.linear(inputs.x(number, dtype), weight, bias),
            about,
            2 * macs,
            read,
        )
    if "forward+backward" in operations:
        grad = torch.randn(shape.B, shape.L, device=device).to(dtype)

        def both(number: int) -> object:
            x = inputs.x(number, dtype).detach().requires_grad_()
            own = (weight.detach().requires_grad_(), bias.detach().requires_grad_())
            return torch.autograd.grad(F.linear(x, *own), (x, *own), grad)

        yield Job("forward+backward", name, both, about, 6 * macs, 2 * read)


def dense_fits(shape: Shape, dtype: torch.dtype, gib: float) -> bool:
    """Whether a dense matrix stays within a size worth timing."""
    return math.prod((shape.L, shape.D, dtype.itemsize)) <= gib * 2**30
