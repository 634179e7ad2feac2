"""Fixed fan-in linear layer, forward and backward, on feature-major tiles of the batch."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray
from torch import Tensor

from xmc_kernels._cpu import labels, threads
from xmc_kernels._cpu.blocks import repeat
from xmc_kernels._cpu.gradients import block_gradients, store_gradients
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.labels import (
    block_stop,
    chains_of,
    copy_biases,
    index_rows,
    refused,
    share_range,
    weight_rows,
)
from xmc_kernels._cpu.scores import block_scores
from xmc_kernels._cpu.tiles import NARROW, from_tiles, tile_width, to_tiles, transpose
from xmc_kernels._cpu.vector import at_address, next_share, splat
from xmc_kernels.layer import Layer

_ZERO = np.float32(0)
_BLOCK = 64  # labels whose scores are transposed at once
FORWARD = threads.record_type(
    addresses=f"{labels.ADDRESSES} scores out", integers=f"{labels.INTEGERS} num_rows"
)
BACKWARD = threads.record_type(
    addresses=f"{labels.ADDRESSES} grads grad sums d_weight d_x",
    integers=f"{labels.INTEGERS} num_rows",
)


@functools.cache
def _forward_kernel(W, kind, weight_kind, T):
    CHAINS = chains_of(W)

    @kernel(FORWARD)
    def forward_shares(arguments):
        a = carray(arguments, 1)[0]
        num_labels, chunk = a.num_labels, a.chunk
        weight = at_address(weight_kind, a.weight)
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        out, bad = at_address(np.float32, a.out), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)
        several, chains = repeat(T, zero), repeat(CHAINS, zero)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            scores = at_address(np.float32, a.scores + share * 4 * _BLOCK * W)
            biases = at_address(np.float32, a.biases + share * 4 * chunk)
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                copy_biases(a, biases, c0, c1)
                for tile in range(a.num_tiles):
                    base = tile * a.features * W
                    for t0 in range(c0, c1, _BLOCK):
                        t1 = min(t0 + _BLOCK, c1)
                        b0 = t0
                        while b0 < t1:
                            b1 = block_stop(a, b0, t1)
                            rows, row, step = index_rows(a, index, share, b0, b1 - b0)
                            wide, w = weight_rows(a, weight, share, b0, b1 - b0)
                            if not refused(a, rows, row, step, b1 - b0, bad, share, b0):
                                block_scores(
                                    *(several, chains, a, x, base, wide, w),
                                    *(rows, row, step, biases, b0 - c0, b1 - b0),
                                    *(scores, (b0 - t0) * W),
                                )
                            b0 = b1
                        count = min(W, a.num_rows - tile * W)
                        to = tile * W * num_labels + t0
                        transpose(scores, 0, W, t1 - t0, count, out, to, num_labels)
            share = next_share(arguments)

    return forward_shares


@functools.cache
def _backward_kernel(W, kind, weight_kind, T):
    @kernel(BACKWARD)
    def backward_shares(arguments):
        a = carray(arguments, 1)[0]
        num_labels, fan_in, chunk = a.num_labels, a.fan_in, a.chunk
        weight, d_weight = at_address(weight_kind, a.weight), at_address(weight_kind, a.d_weight)
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        grad, bad = at_address(np.float32, a.grad), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)
        several, one = repeat(T, zero), repeat(1, zero)
        stride = a.features * W

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            grads = at_address(np.float32, a.grads + share * 4 * _BLOCK * W)
            d_x = at_address(np.float32, a.d_x + share * 4 * a.num_tiles * stride)
            sums = at_address(np.float32, a.sums + share * 4 * chunk * fan_in)
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                for i in range((c1 - c0) * fan_in):
                    sums[i] = _ZERO
                for tile in range(a.num_tiles):
                    for t0 in range(c0, c1, _BLOCK):
                        t1 = min(t0 + _BLOCK, c1)
                        # Columns beyond the last row stay as they are: x is zero there.
                        count = min(W, a.num_rows - tile * W)
                        at = tile * W * num_labels + t0
                        transpose(grad, at, num_labels, count, t1 - t0, grads, 0, W)
                        b0 = t0
                        while b0 < t1:
                            b1 = block_stop(a, b0, t1)
                            rows, row, step = index_rows(a, index, share, b0, b1 - b0)
                            wide, w = weight_rows(a, weight, share, b0, b1 - b0)
                            if not refused(a, rows, row, step, b1 - b0, bad, share, b0):
                                block_gradients(
                                    *(several, one, a, x, d_x, tile * stride, wide, w),
                                    *(rows, row, step, grads, (b0 - t0) * W, b1 - b0),
                                    *(sums, (b0 - c0) * fan_in),
                                )
                            b0 = b1
                store_gradients(sums, (c1 - c0) * fan_in, d_weight, c0 * fan_in)
            share = next_share(arguments)

    return backward_shares


def fan_in_linear(
    x: Tensor,  # [B, D] float32 or bfloat16
    layer: Layer,  # float32, contiguous
) -> Tensor:  # [B, L]
    """`x @ dense(weight, index).T + bias` in x's dtype."""
    width = tile_width(len(x), NARROW)
    shares = threads.num_shares(layer.num_labels)
    fields = labels.layer_fields(to_tiles(x, width), layer, shares)
    # numpy's large arrays come in huge pages, torch's in small ones that each cost a fault.
    out = np.empty((len(x), layer.num_labels), np.float32)
    scores = threads.zeros(shares, _BLOCK, width)
    arguments = threads.record(FORWARD, **fields, scores=scores, out=out, num_rows=len(x))
    threads.launch(_forward_kernel(width, *labels.kinds(layer, width)), arguments)
    labels.raise_bad_index(layer, fields)
    return torch.from_numpy(out).to(x.dtype)


def fan_in_linear_backward(
    grad: Tensor,  # [B, L]
    x: Tensor,  # [B, D]
    layer: Layer,
) -> tuple[Tensor, Tensor]:  # [B, D], [L, F]
    """Gradients in x and weight; the shares' parts of d_x are added in a fixed order."""
    width = tile_width(len(x))
    tiles = to_tiles(x, width)
    shares = threads.num_shares(layer.num_labels)
    fields = labels.layer_fields(tiles, layer, shares)
    grad = grad.float().contiguous()
    d_weight = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
    sums = threads.zeros(shares, fields["chunk"] * layer.fan_in)
    d_x = threads.zeros(shares, *tiles.shape, at=threads.PAGE // 2)
    grads = threads.zeros(shares, _BLOCK, width)
    arguments = threads.record(
        BACKWARD,
        **fields,
        grads=grads,
        sums=sums,
        grad=grad,
        d_weight=d_weight,
        d_x=d_x,
        num_rows=len(x),
    )
    threads.launch(_backward_kernel(width, *labels.kinds(layer, width)), arguments)
    labels.raise_bad_index(layer, fields)
    return from_tiles(d_x, len(x)).to(x.dtype), d_weight
