"""What a stored part of the gradient in the scores gives: `dq += G @ k` and `dk += G.T @ q`."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._triton.launch import INTERPRETED, Launch, cdiv
from xmc_kernels._triton.tiles import PARTIAL_BYTES, ProductTiles, product_tiles

_PROGRAMS = 128
"""About as many as run at once: fewer tiles share out the inner dimension."""
_PART_BLOCKS = 2
"""Of the inner dimension, at least for each."""


@triton.jit
def _add_product(
    program,
    grad_ptr,  # [M, K] of these strides, up to whole tiles
    other_ptr,  # [num_inner, D]
    out_ptr,  # [parts, num_outer, D] float32
    num_outer,
    num_inner,
    features,
    span,
    stride_part,
    stride_outer,
    stride_inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of `grad @ other`, over one part of the inner dimension, to a tile of out."""
    pieces = tl.cdiv(features, BLOCK_N)
    blocks = tl.cdiv(num_outer, BLOCK_M)
    offs_n = program % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
    row = program // pieces % blocks * BLOCK_M
    part = program // pieces // blocks
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = row + offs_m < num_outer
    mask_n = offs_n < features
    grad_ptr += tl.cast(row, tl.int64) * stride_outer
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * span, min((part + 1) * span, num_inner), BLOCK_K):
        mask_k = start + offs_k < num_inner
        at = tl.cast(start, tl.int64) * stride_inner + offs_k[None, :] * stride_inner
        grad = tl.load(grad_ptr + at + offs_m[:, None] * stride_outer)
        at = tl.cast(start, tl.int64) * features + offs_k[:, None] * features
        mask = mask_k[:, None] & mask_n[None, :]
        other = tl.load(other_ptr + at + offs_n[None, :], mask=mask, other=0.0)
        total = tl.dot(grad.to(DOT_DTYPE), other.to(DOT_DTYPE), total, input_precision=PRECISION)
    out_ptr += tl.cast(part, tl.int64) * stride_part + tl.cast(row, tl.int64) * features
    out = out_ptr + offs_m[:, None] * features + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    # No two programs add to the same number: this is a sum in registers without a read, in order.
    tl.atomic_add(out, total, mask=mask, sem="relaxed")


@triton.jit
def _similarity_products_kernel(
    grad_ptr,  # [num_rows, num_keys] up to whole tiles
    q_ptr,  # [num_rows, D]
    k_ptr,  # [num_keys, D]
    d_q_ptr,  # [parts, num_rows, D] float32, added to, or None
    d_k_ptr,  # [parts, num_keys, D] float32, added to, or None
    num_rows,
    num_keys,
    features,
    stride_gm,
    programs_q,
    span_q,
    span_k,
    stride_qp,
    stride_kp,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    if d_q_ptr is not None and program < programs_q:
        _add_product(
            program,
            grad_ptr,
            k_ptr,
            d_q_ptr,
            num_rows,
            num_keys,
            features,
            span_q,
            stride_qp,
            stride_gm,
            1,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DOT_DTYPE,
            PRECISION,
        )
    if d_k_ptr is not None and program >= programs_q:
        _add_product(
            program - programs_q,
            grad_ptr,
            q_ptr,
            d_k_ptr,
            num_keys,
            num_rows,
            features,
            span_k,
            stride_kp,
            1,
            stride_gm,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DOT_DTYPE,
            PRECISION,
        )


def products_launch(
    grad: Tensor,  # [rows, keys] up to whole tiles, zeros beyond rows and keys
    q: Tensor,  # [rows, D]
    k: Tensor,  # [keys, D]
    d_q: Tensor | None,  # [parts, rows, D] float32
    d_k: Tensor | None,  # [parts, keys, D] float32
    tiles: ProductTiles,
) -> Launch:
    """`d_q += grad @ k` and `d_k += grad.T @ q` where wanted; parts share the inner dimension.

    One launch for both: programs of dq have up to twice the work of those of dk and come first, so
    that the last wave is short. A number of the results belongs to one program.
    """
    bfloat16 = grad.dtype == torch.bfloat16
    programs_q = 0 if d_q is None else d_q.shape[0] * _num_tiles(d_q, tiles)
    programs_k = 0 if d_k is None else d_k.shape[0] * _num_tiles(d_k, tiles)
    arguments = {
        "grad_ptr": grad,
        "q_ptr": q,
        "k_ptr": k,
        "d_q_ptr": d_q,
        "d_k_ptr": d_k,
        "num_rows": len(q),
        "num_keys": len(k),
        "features": q.shape[1],
        "stride_gm": grad.stride(0),
        "programs_q": programs_q,
        "span_q": 0 if d_q is None else _span(len(k), d_q, tiles),
        "span_k": 0 if d_k is None else _span(len(q), d_k, tiles),
        "stride_qp": 0 if d_q is None else d_q.stride(0),
        "stride_kp": 0 if d_k is None else d_k.stride(0),
    }
    values = {
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_K": tiles.k,
        "DOT_DTYPE": tl.bfloat16 if bfloat16 else tl.float32,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    kernel, grid = _similarity_products_kernel, programs_q + programs_k
    return Launch(kernel, grid, arguments, values, tiles.num_warps, tiles.num_stages)


def _num_tiles(out: Tensor, tiles: ProductTiles) -> int:
    return cdiv(out.shape[1], tiles.m) * cdiv(out.shape[2], tiles.n)


def _span(num_inner: int, out: Tensor, tiles: ProductTiles) -> int:
    """Of the inner dimension, what a part has: whole blocks."""
    return cdiv(cdiv(num_inner, tiles.k), len(out)) * tiles.k


class Products:
    """Room for the gradient in a part of the scores, and sums of what it gives."""

    def __init__(
        self,
        q: Tensor,  # [Bq, D]
        k: Tensor,  # [Bk, D]
        size: tuple[int, int],  # most rows and keys of a part
        tiles: ProductTiles,
        want_q: bool,
        want_k: bool,
    ) -> None:
        dtype = torch.bfloat16 if stores_bfloat16(q) else torch.float32
        rows, keys = min(size[0], len(q)), min(size[1], len(k))
        self.tiles = tiles
        self.room = None
        if want_q or want_k:
            self.room = torch.empty(size[0] * size[1], dtype=dtype, device=q.device)
        self.d_q = self._zeros(rows, rows, keys, q) if want_q else None
        self.d_k = self._zeros(keys, len(k), rows, k) if want_k else None

    def _zeros(self, num_rows: int, all_rows: int, num_inner: int, like: Tensor) -> Tensor:
        """[parts, all_rows, D] float32, to which [num_rows, num_inner] @ [num_inner, D] is added.

        Few tiles fill a GPU, too, where parts share out the inner dimension.
        """
        features = like.shape[1]
        blocks = cdiv(num_rows, self.tiles.m) * cdiv(features, self.tiles.n)
        most = PARTIAL_BYTES // max(1, 4 * all_rows * features)
        inner = cdiv(num_inner, _PART_BLOCKS * self.tiles.k)
        parts = max(1, min(_PROGRAMS // max(1, blocks), most, inner))
        return torch.zeros(parts, all_rows, features, device=like.device)

    def gradient(self, num_rows: int, num_keys: int) -> Tensor | None:
        """Where the gradient in so many scores goes, or None: nothing is wanted of it."""
        if self.room is None:
            return None
        return self.room[: num_rows * num_keys].view(num_rows, num_keys)

    def add(self, grad: Tensor, q: Tensor, k: Tensor, keys: slice) -> None:
        """Add to d_q [rows, D] and to these keys' d_k; the first keys start d_q anew."""
        if self.d_q is not None and keys.start == 0:
            self.d_q.zero_()
        d_q = None if self.d_q is None else self.d_q[:, : len(q)]
        d_k = None if self.d_k is None else self.d_k[:, keys]
        products_launch(grad, q, k, d_q, d_k, self.tiles).run()


def stores_bfloat16(q: Tensor) -> bool:
    """Whether the gradient in scores is stored and multiplied in bfloat16, else in float32.

    float16 would flush its small numbers.
    """
    return q.dtype == torch.bfloat16 and not INTERPRETED


def tiles_of_products(q: Tensor, k: Tensor, scores: ProductTiles) -> ProductTiles:
    """Tiles whose blocks of the inner dimension end where tiles of scores do, or before.

    So they read numbers that were written, and no others.
    """
    wide, inner = not stores_bfloat16(q), min(scores.m, scores.n)
    sizes = (max(len(q), len(k)), q.shape[1], inner)
    tiles = product_tiles("products", wide, q.device, *sizes)
    return replace(tiles, k=min(tiles.k, inner))


def total(parts: Tensor, num_rows: int, like: Tensor) -> Tensor:
    """Sums [parts, n, D or more] added up in order, like [n or more, D] and in its dtype."""
    whole = parts[0] if len(parts) == 1 else parts.sum(0)
    return whole[:num_rows, : like.shape[1]].to(like.dtype).contiguous()
