"""The three products of a unit: G labels that share F features, a tile of B examples.

For one label they are sums on vector units; for more, `tl.dot` on tensor cores, which wants at
least 16 labels (BLOCK_G is padded).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xmc_kernels._triton.float8 import decode
from xmc_kernels._triton.layers import load_columns


@triton.jit
def load_inputs(
    x_t_ptr,
    index_ptr,
    group_row,
    start_f,
    width,
    offs_b,
    fan_in,
    BLOCK_F: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    """Offsets of F rows of x_t [F, 1], their mask, and the rows themselves [F, B]."""
    offs_f = start_f + tl.arange(0, BLOCK_F)
    mask_f = offs_f < fan_in
    index = load_columns(index_ptr, group_row, offs_f, mask_f, fan_in, N_KEEP, M_BLOCK)
    rows = index.to(tl.int64)[:, None] * width
    mask = mask_f[:, None]
    x = tl.load(x_t_ptr + rows + offs_b[None, :], mask=mask, other=0.0)
    return rows, mask, x


@triton.jit
def load_weight(weight_ptr, scale_ptr, label, mask_g, start_f, fan_in, BLOCK_F: tl.constexpr):
    """Offsets, mask and values of weights [G, F]; float8 ones as float32."""
    offs_f = start_f + tl.arange(0, BLOCK_F)
    offs = label.to(tl.int64)[:, None] * fan_in + offs_f[None, :]
    mask = mask_g[:, None] & (offs_f < fan_in)[None, :]
    weight = tl.load(weight_ptr + offs, mask=mask, other=0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + label, mask=mask_g, other=0.0)
        weight = decode(weight) * scale[:, None]
    return offs, mask, weight


@triton.jit
def scores(weight, x, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`weight [G, F] @ x [F, B]`, float32."""
    if weight.shape[0] == 1:
        column = tl.trans(weight).to(tl.float32)
        return tl.sum(column * x.to(tl.float32), axis=0)[None, :]
    else:
        return tl.dot(weight.to(DOT_DTYPE), x.to(DOT_DTYPE), input_precision=PRECISION)


@triton.jit
def weight_gradient(grad, x, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`grad [G, B] @ x [F, B].T`, float32."""
    if grad.shape[0] == 1:
        return tl.sum(grad * x.to(tl.float32), axis=1)[None, :]
    else:
        transposed = tl.trans(x.to(DOT_DTYPE))
        return tl.dot(grad.to(DOT_DTYPE), transposed, input_precision=PRECISION)


@triton.jit
def input_gradient(grad, weight, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`weight [G, F].T @ grad [G, B]`, float32."""
    if grad.shape[0] == 1:
        return tl.trans(weight).to(tl.float32) * grad
    else:
        transposed = tl.trans(weight.to(DOT_DTYPE))
        return tl.dot(transposed, grad.to(DOT_DTYPE), input_precision=PRECISION)


@triton.jit
def scatter_add(d_x_t_ptr, rows, offs_b, mask, value, DETERMINISTIC: tl.constexpr):
    """Add [F, B] to rows of d_x_t: by atomics, or into a buffer that only this program writes.

    Rows are distinct within one call. The barriers order one call after another, and the loads of
    all threads before the stores of any (a small tile is held by several threads).
    """
    pointers = d_x_t_ptr + rows + offs_b[None, :]
    if DETERMINISTIC:
        tl.debug_barrier()
        before = tl.load(pointers, mask=mask, other=0.0)
        tl.debug_barrier()
        tl.store(pointers, before + value, mask=mask)
        tl.debug_barrier()
    else:
        whole = mask & (offs_b >= 0)[None, :]
        tl.atomic_add(pointers, value, mask=whole, sem="relaxed")
