"""Weighted sums of bags of rows: the gradient of an embedding table without its zero rows."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels._reference import bag_sum as reference


def bag_sum(
    x: Tensor,  # [N, D]
    ids: Tensor,  # [nnz] int64, rows of x
    offsets: Tensor,  # [U+1] int64, from 0 to nnz
    weights: Tensor,  # [nnz], x's dtype
) -> Tensor:  # [U, D]
    """`out[u] = sum of weights[e] * x[ids[e]]` over `offsets[u] <= e < offsets[u + 1]`.

    `F.embedding_bag` in mode "sum", for many small bags over few rows: the transposed bag of an
    encoder's backward. An empty bag gives zeros. Not differentiable. On the CPU float32 runs
    compiled, 3 to 7 times as fast as embedding_bag on 28,000 bags of 512 numbers.

    Raises ValueError or TypeError on shapes and dtypes that do not fit, or an id out of range.
    """
    _check(x, ids, offsets, weights)
    return _bag_sum(x, ids, offsets, weights)


@torch.library.custom_op("xmc::bag_sum", mutates_args=())
def _bag_sum(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return reference.bag_sum(x, ids, offsets, weights)


@_bag_sum.register_fake
def _(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1])


@_bag_sum.register_kernel("cpu")
def _(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return reference.bag_sum(x, ids, offsets, weights)
    from xmc_kernels._cpu import bag_sum as cpu

    return cpu.bag_sum(x, ids, offsets, weights)


def _check(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"expected x [N, D], got {list(x.shape)}")
    if ids.dtype != torch.int64 or offsets.dtype != torch.int64:
        raise TypeError(f"expected ids and offsets int64, got {ids.dtype} and {offsets.dtype}")
    if ids.dim() != 1 or weights.shape != ids.shape or weights.dtype != x.dtype:
        raise ValueError(
            f"expected weights {x.dtype} {list(ids.shape)} to match x and ids, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"expected offsets [U+1], got {list(offsets.shape)}")
    ends = (int(offsets[0]), int(offsets[-1]))
    if ends != (0, ids.shape[0]) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"expected offsets that never fall, from 0 to {ids.shape[0]} (the number of ids), "
            f"got {ends[0]} to {ends[1]}"
        )
    if ids.shape[0]:
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"expected ids in [0, {x.shape[0]}), got {low} to {high}")
