"""Designated pairs: their scores, and what they change in a tile of all pairs.

A tile meets few of them, most tiles none: one look at the first and last key of its rows tells. For
those that do, every row has a cursor into its sorted keys, and one step of all cursors together
changes at most one number a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._triton.launch import Launch, cdiv, power_of_2

_BLOCK_P, _BLOCK_E = 32, 256
NO_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def row_pairs(indptr_ptr, indices_ptr, offs_m, mask_m):
    """(first and last position of each row's pairs, first and last key); no pairs: no key fits."""
    begin = tl.load(indptr_ptr + offs_m, mask=mask_m, other=0)
    end = tl.load(indptr_ptr + offs_m + 1, mask=mask_m, other=0)
    first = tl.load(indices_ptr + begin, mask=begin < end, other=NO_KEY)
    last = tl.load(indices_ptr + end - 1, mask=begin < end, other=-1)
    return begin, end, first, last


@triton.jit
def find_pairs(rows, indices_ptr, start, stop):
    """(whether a row has a pair of a key in [start, stop), each row's first such, ...) of a tile.

    A cursor is a position in the indices, found by bisection; rows are those of `row_pairs`.
    """
    begin, end, first, last = rows
    near = tl.max(((first < stop) & (last >= start)).to(tl.int32), axis=0) > 0
    cursor = begin
    if near:
        high = end
        while tl.max((high - cursor).to(tl.int32), axis=0) > 0:
            middle = (cursor + high) // 2
            searching = cursor < high
            before = tl.load(indices_ptr + middle, mask=searching, other=NO_KEY) < start
            high = tl.where(searching & ~before, middle, high)
            cursor = tl.where(before, middle + 1, cursor)
    return near, cursor, end, indices_ptr, stop


@triton.jit
def counted(
    rows,  # [BLOCK_M], as query_ids count them
    columns,  # [BLOCK_N], as key_ids count them
    keys,  # [BLOCK_N], as indices count them
    mask_m,
    mask_n,
    query_ids_ptr,  # or None, as key_ids_ptr
    key_ids_ptr,
    pairs,  # of `find_pairs`
    WITHOUT_PAIRS: tl.constexpr,
):
    """Which pairs [BLOCK_M, BLOCK_N] exist and are not masked, designated ones or without them."""
    counts = mask_m[:, None] & mask_n[None, :]
    if query_ids_ptr is not None:
        query_id = tl.load(query_ids_ptr + rows, mask=mask_m, other=0)
        key_id = tl.load(key_ids_ptr + columns, mask=mask_n, other=0)
        counts &= query_id[:, None] != key_id[None, :]
    if WITHOUT_PAIRS or query_ids_ptr is not None:
        near, cursor, end, indices_ptr, stop = pairs
        if near:
            key = tl.load(indices_ptr + cursor, mask=cursor < end, other=NO_KEY)
            while tl.min(key, axis=0) < stop:
                here = key < stop
                hit = here[:, None] & (key[:, None] == keys[None, :])
                counts = counts & ~hit if WITHOUT_PAIRS else counts | hit
                cursor += here.to(tl.int64)
                key = tl.load(indices_ptr + cursor, mask=here & (cursor < end), other=NO_KEY)
    return counts


@triton.jit
def read_pairs(
    tile,  # [BLOCK_M, BLOCK_N]
    pairs,  # of `find_pairs`
    keys,  # [BLOCK_N], as indices count them
    values_ptr,  # [nnz]
):
    """Write the tile's numbers at designated pairs to values."""
    near, cursor, end, indices_ptr, stop = pairs
    if near:
        key = tl.load(indices_ptr + cursor, mask=cursor < end, other=NO_KEY)
        while tl.min(key, axis=0) < stop:
            here = key < stop
            values = tl.sum(tl.where(key[:, None] == keys[None, :], tile, 0.0), axis=1)
            tl.store(values_ptr + cursor, values, mask=here)
            cursor += here.to(tl.int64)
            key = tl.load(indices_ptr + cursor, mask=here & (cursor < end), other=NO_KEY)


@triton.jit
def _pair_dots_kernel(
    q_ptr,  # [Bq, D]
    k_ptr,  # [Bk, D]
    queries_ptr,  # [nnz] int64
    indices_ptr,  # [nnz] int32
    dots_ptr,  # [nnz]
    num_pairs,
    features,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = pair < num_pairs
    row = tl.load(queries_ptr + pair, mask=mask_p, other=0) * features
    key = tl.load(indices_ptr + pair, mask=mask_p, other=0).to(tl.int64) * features
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, features, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = mask_p[:, None] & (offs_d < features)[None, :]
        q = tl.load(q_ptr + row[:, None] + offs_d[None, :], mask=mask, other=0.0)
        k = tl.load(k_ptr + key[:, None] + offs_d[None, :], mask=mask, other=0.0)
        total += q.to(tl.float32) * k.to(tl.float32)
    tl.store(dots_ptr + pair, tl.sum(total, axis=1), mask=mask_p)


def dots_launch(q: Tensor, k: Tensor, queries: Tensor, indices: Tensor, dots: Tensor) -> Launch:
    """`dots[e] = q[queries[e]] @ k[indices[e]]` of contiguous q and k, in float32."""
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "queries_ptr": queries,
        "indices_ptr": indices,
        "dots_ptr": dots,
        "num_pairs": len(dots),
        "features": q.shape[1],
    }
    values = {"BLOCK_P": _BLOCK_P, "BLOCK_D": min(64, power_of_2(q.shape[1]))}
    return Launch(_pair_dots_kernel, cdiv(len(dots), _BLOCK_P), arguments, values)


@triton.jit
def _pair_grad_kernel(
    pair_grad_ptr,  # [nnz]
    queries_ptr,  # [nnz] int64
    indices_ptr,  # [nnz] int32
    scale_ptr,  # []
    grad_ptr,  # [num_rows, stride_gm], of queries from first_row on, keys from first_key on
    first_pair,
    stop_pair,
    first_row,
    first_key,
    num_keys,
    stride_gm,
    BLOCK_P: tl.constexpr,
):
    pair = first_pair + tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = pair < stop_pair
    row = tl.load(queries_ptr + pair, mask=mask, other=0) - first_row
    column = tl.load(indices_ptr + pair, mask=mask, other=-1) - first_key
    mask = mask & (column >= 0) & (column < num_keys)
    value = tl.load(scale_ptr) * tl.load(pair_grad_ptr + pair, mask=mask, other=0.0)
    tl.store(grad_ptr + row * stride_gm + column, value.to(grad_ptr.dtype.element_ty), mask=mask)


def pair_grad_launch(
    pair_grad: Tensor,  # [nnz]
    queries: Tensor,
    indices: Tensor,
    scale: Tensor,
    grad: Tensor,  # [rows, keys] or more
    pairs: slice,  # those of the rows
    first_row: int,
    keys: slice,
) -> Launch:
    """Put `scale * pair_grad` over what grad has at designated pairs."""
    arguments = {
        "pair_grad_ptr": pair_grad,
        "queries_ptr": queries,
        "indices_ptr": indices,
        "scale_ptr": scale,
        "grad_ptr": grad,
        "first_pair": pairs.start,
        "stop_pair": pairs.stop,
        "first_row": first_row,
        "first_key": keys.start,
        "num_keys": keys.stop - keys.start,
        "stride_gm": grad.stride(0),
    }
    grid = cdiv(pairs.stop - pairs.start, _BLOCK_E)
    return Launch(_pair_grad_kernel, grid, arguments, {"BLOCK_P": _BLOCK_E})
