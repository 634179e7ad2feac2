"""Tiles of `S = scale * q @ k.T`: their log-sum-exps, and the gradient of a loss in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._triton.launch import INTERPRETED, Launch, cdiv
from xmc_kernels._triton.losses import log1p
from xmc_kernels._triton.similarity_pairs import counted, find_pairs, read_pairs, row_pairs
from xmc_kernels._triton.tiles import ProductTiles
from xmc_kernels.pairs import Pairs


class Part(NamedTuple):
    """Some queries and some keys, and the pairs among all of them."""

    q: Tensor  # [rows, D] contiguous
    k: Tensor  # [keys, D] contiguous
    scale: Tensor  # [] float32
    indptr: Tensor  # [rows + 1], positions in all indices
    indices: Tensor  # [nnz], of all rows and keys
    first_key: int
    query_ids: Tensor | None  # [rows]
    key_ids: Tensor | None  # [keys]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, scale: Tensor, pairs: Pairs, rows: slice, keys: slice
    ) -> Part:
        """These rows and keys of all."""
        return cls(
            *(q[rows], k[keys], scale),
            *(pairs.indptr[rows.start : rows.stop + 1], pairs.indices, keys.start),
            None if pairs.query_ids is None else pairs.query_ids[rows],
            None if pairs.key_ids is None else pairs.key_ids[keys],
        )

    def arguments(self) -> dict[str, Any]:
        """As the kernels here take it."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "scale_ptr": self.scale,
            "indptr_ptr": self.indptr,
            "indices_ptr": self.indices,
            "query_ids_ptr": self.query_ids,
            "key_ids_ptr": self.key_ids,
            "num_rows": len(self.q),
            "num_keys": len(self.k),
            "first_key": self.first_key,
            "features": self.q.shape[1],
        }

    def num_tiles(self, tiles: ProductTiles) -> int:
        """Programs, one for each tile of scores."""
        return cdiv(len(self.q), tiles.m) * cdiv(len(self.k), tiles.n)

    def constants(self, tiles: ProductTiles, without_pairs: bool) -> dict[str, Any]:
        """Block sizes, and how tensor cores multiply: halves as they are, float32 as 3 x TF32."""
        halves = self.q.dtype.itemsize == 2 and not INTERPRETED
        dtype = {"bfloat16": tl.bfloat16, "float16": tl.float16}
        name = str(self.q.dtype).removeprefix("torch.")
        return {
            "BLOCK_M": tiles.m,
            "BLOCK_N": tiles.n,
            "BLOCK_D": tiles.k,
            "DOT_DTYPE": dtype[name] if halves else tl.float32,
            "PRECISION": "tf32" if halves else "tf32x3",
            "WITHOUT_PAIRS": without_pairs,
        }


@triton.jit
def _dots(
    q_ptr,
    k_ptr,
    row,
    column,
    mask_m,
    mask_n,
    features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`q @ k.T` of a tile; offsets within it fit 32 bits, where it begins needs 64."""
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += tl.cast(row, tl.int64) * features
    k_ptr += tl.cast(column, tl.int64) * features
    at_q = q_ptr + tl.arange(0, BLOCK_M)[:, None] * features + offs_d[None, :]
    at_k = k_ptr + tl.arange(0, BLOCK_N)[None, :] * features + offs_d[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_D):
        mask_d = start + offs_d < features
        q = tl.load(at_q + start, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        k = tl.load(at_k + start, mask=mask_d[:, None] & mask_n[None, :], other=0.0)
        total = tl.dot(q.to(DOT_DTYPE), k.to(DOT_DTYPE), total, input_precision=PRECISION)
    return total


@triton.jit
def _log(total):
    """-inf of 0, without a look at it."""
    return tl.where(total > 0.0, tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit
def _log_sum_exp(score, AXIS: tl.constexpr):
    highest = tl.max(score, axis=AXIS)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    return highest + _log(tl.sum(tl.exp(score - tl.expand_dims(highest, AXIS)), axis=AXIS))


@triton.jit
def _similarity_statistics_kernel(
    q_ptr,  # [num_rows, D]
    k_ptr,  # [num_keys, D]
    scale_ptr,  # []
    indptr_ptr,  # [num_rows + 1] int64
    indices_ptr,  # [nnz] int32
    query_ids_ptr,  # [num_rows] int64 or None
    key_ids_ptr,  # [num_keys]
    row_lse_ptr,  # [blocks of keys, num_rows]
    column_lse_ptr,  # [blocks of rows, num_keys] or None
    pair_dots_ptr,  # [nnz]
    num_rows,
    num_keys,
    first_key,
    features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WITHOUT_PAIRS: tl.constexpr,
):
    blocks = tl.cdiv(num_rows, BLOCK_M)
    block, number = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    columns = number * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = columns < num_keys
    keys = first_key + columns
    dots = _dots(
        q_ptr,
        k_ptr,
        block * BLOCK_M,
        number * BLOCK_N,
        mask_m,
        mask_n,
        features,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        DOT_DTYPE,
        PRECISION,
    )
    of_rows = row_pairs(indptr_ptr, indices_ptr, rows, mask_m)
    stop = first_key + min((number + 1) * BLOCK_N, num_keys)
    pairs = find_pairs(of_rows, indices_ptr, first_key + number * BLOCK_N, stop)
    read_pairs(dots, pairs, keys, pair_dots_ptr)
    counts = counted(
        rows,
        columns,
        keys,
        mask_m,
        mask_n,
        query_ids_ptr,
        key_ids_ptr,
        pairs,
        WITHOUT_PAIRS,
    )
    score = tl.where(counts, dots * tl.load(scale_ptr), float("-inf"))
    out = row_lse_ptr + tl.cast(number, tl.int64) * num_rows + rows
    tl.store(out, _log_sum_exp(score, 1), mask=mask_m)
    if column_lse_ptr is not None:
        out = column_lse_ptr + tl.cast(block, tl.int64) * num_keys + columns
        tl.store(out, _log_sum_exp(score, 0), mask=mask_n)


def statistics_launch(
    part: Part,
    tiles: ProductTiles,
    without_pairs: bool,
    row_lse: Tensor,  # [blocks of keys, rows]
    column_lse: Tensor | None,  # [blocks of rows, keys]
    pair_dots: Tensor,  # [nnz]
) -> Launch:
    """Log-sum-exps of rows and of columns over a tile each, for all tiles of a part.

    Designated pairs' `q @ k.T` goes to pair_dots: a sum in another order would not cancel with
    those that are in the log-sum-exps. Every number has one writer, so merging them has an order.
    """
    arguments = {
        **part.arguments(),
        "row_lse_ptr": row_lse,
        "column_lse_ptr": column_lse,
        "pair_dots_ptr": pair_dots,
    }
    values = part.constants(tiles, without_pairs)
    grid = part.num_tiles(tiles)
    return Launch(
        _similarity_statistics_kernel, grid, arguments, values, tiles.num_warps, tiles.num_stages
    )


@triton.jit
def _similarity_gradient_kernel(
    q_ptr,  # [num_rows, D]
    k_ptr,  # [num_keys, D]
    scale_ptr,  # []
    bias_ptr,  # [] of the sigmoid loss, or None: softmax
    indptr_ptr,  # [num_rows + 1] int64
    indices_ptr,  # [nnz] int32
    query_ids_ptr,  # [num_rows] int64 or None
    key_ids_ptr,  # [num_keys]
    row_weight_ptr,  # [num_rows]
    row_lse_ptr,  # [num_rows] of the softmax loss
    column_weight_ptr,  # [num_keys up to whole tiles: masks cost registers], or None
    column_lse_ptr,  # the same
    grad_ptr,  # [blocks of rows * BLOCK_M, stride_gm], or None: not wanted
    sums_ptr,  # [programs, 3] float64, added to: of G * (q @ k.T), G, the loss
    num_rows,
    num_keys,
    first_key,
    features,
    stride_gm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WITHOUT_PAIRS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(num_rows, BLOCK_M)
    block, number = program % blocks, program // blocks
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    columns = number * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = columns < num_keys
    keys = first_key + columns
    stop = first_key + min((number + 1) * BLOCK_N, num_keys)
    scale = tl.load(scale_ptr)
    row_weight = tl.load(row_weight_ptr + rows, mask=mask_m, other=0.0)
    dots = _dots(
        q_ptr,
        k_ptr,
        block * BLOCK_M,
        number * BLOCK_N,
        mask_m,
        mask_n,
        features,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        DOT_DTYPE,
        PRECISION,
    )
    pairs = (False, 0, 0, None, 0)
    if WITHOUT_PAIRS or query_ids_ptr is not None:
        of_rows = row_pairs(indptr_ptr, indices_ptr, rows, mask_m)
        pairs = find_pairs(of_rows, indices_ptr, first_key + number * BLOCK_N, stop)
    counts = counted(
        rows,
        columns,
        keys,
        mask_m,
        mask_n,
        query_ids_ptr,
        key_ids_ptr,
        pairs,
        WITHOUT_PAIRS,
    )
    score = tl.where(counts, dots * scale, float("-inf"))
    if bias_ptr is None:
        row_lse = tl.load(row_lse_ptr + rows, mask=mask_m, other=0.0)
        grad = row_weight[:, None] * tl.exp(score - row_lse[:, None])
        if column_lse_ptr is not None:
            column_weight = tl.load(column_weight_ptr + columns)
            column_lse = tl.load(column_lse_ptr + columns)
            grad += column_weight[None, :] * tl.exp(score - column_lse[None, :])
    else:
        logit = score + tl.load(bias_ptr)
        small = tl.exp(-tl.abs(logit))  # 0 where masked
        value = row_weight[:, None] * (tl.maximum(logit, 0.0) + log1p(small))
        _add_sum(sums_ptr + program * 3 + 2, value)
        grad = row_weight[:, None] * (tl.where(logit >= 0, 1.0, small) / (1.0 + small))
        _add_sum(sums_ptr + program * 3 + 1, grad)
    _add_sum(sums_ptr + program * 3, grad * dots)
    if grad_ptr is not None:
        out = grad_ptr + tl.cast(block * BLOCK_M, tl.int64) * stride_gm + number * BLOCK_N
        out += tl.arange(0, BLOCK_M)[:, None] * stride_gm + tl.arange(0, BLOCK_N)[None, :]
        tl.store(out, (grad * scale).to(grad_ptr.dtype.element_ty))


@triton.jit
def _add_sum(sum_ptr, tile):
    """Add the sum of a tile to a float64 that no other program has."""
    tl.store(sum_ptr, tl.load(sum_ptr) + tl.sum(tile).to(tl.float64))


class Weights(NamedTuple):
    """What the gradient tile of a loss is made of, for some rows and keys."""

    row_weight: Tensor  # [rows]
    row_lse: Tensor | None = None  # [rows] of the softmax loss
    column_weight: Tensor | None = None  # [keys]; memory goes on up to whole tiles
    column_lse: Tensor | None = None  # [keys], the same
    bias: Tensor | None = None  # [] of the sigmoid loss

    def padded(self, unit: int) -> Weights:
        """Those of columns with zeros up to a multiple of unit."""
        weight, lse = (
            None if t is None else F.pad(t, (0, -len(t) % unit))
            for t in (self.column_weight, self.column_lse)
        )
        return self._replace(column_weight=weight, column_lse=lse)

    def of_part(self, rows: slice, keys: slice) -> Weights:
        """Those of these rows and keys."""
        row_weight, *others, bias = self
        row_lse, column_weight, column_lse = (
            None if tensor is None else tensor[part]
            for tensor, part in zip(others, (rows, keys, keys), strict=True)
        )
        return Weights(row_weight[rows], row_lse, column_weight, column_lse, bias)


def gradient_launch(
    part: Part,
    tiles: ProductTiles,
    without_pairs: bool,
    weights: Weights,
    grad: Tensor | None,  # [rows, keys] up to whole tiles
    sums: Tensor,  # [programs or more, 3] float64
) -> Launch:
    """`scale * G` of a part into grad, zeros beyond its rows and keys; sums added to `sums`.

    `sums.sum(0)` is `<G, q @ k.T>`, and of the sigmoid loss also G's sum and the loss: with
    designated pairs as if they were none, or without them.
    """
    arguments = {
        **part.arguments(),
        "bias_ptr": weights.bias,
        "row_weight_ptr": weights.row_weight,
        "row_lse_ptr": weights.row_lse,
        "column_weight_ptr": weights.column_weight,
        "column_lse_ptr": weights.column_lse,
        "grad_ptr": grad,
        "sums_ptr": sums,
        "stride_gm": 0 if grad is None else grad.stride(0),
    }
    grid = part.num_tiles(tiles)
    values = part.constants(tiles, without_pairs)
    return Launch(
        _similarity_gradient_kernel, grid, arguments, values, tiles.num_warps, tiles.num_stages
    )
