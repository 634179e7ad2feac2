"""Fixed fan-in linear layer, forward and backward, on feature-major tiles of the batch."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray
from torch import Tensor

from xmc_kernels._cpu import scores, threads
from xmc_kernels._cpu.gradients import label_gradient
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.scores import label_score, out_of_range, share_range
from xmc_kernels._cpu.tiles import from_tiles, tile_width, to_tiles, transpose
from xmc_kernels._cpu.vector import at_address, fill, load, next_share, splat, store
from xmc_kernels.layer import Layer

_ZERO = np.float32(0)
_BLOCK = 64  # labels whose scores are transposed at once
FORWARD = threads.record_type(
    addresses=f"{scores.ADDRESSES} block out", integers=f"{scores.INTEGERS} num_rows"
)
BACKWARD = threads.record_type(
    addresses=f"{scores.ADDRESSES} block grad d_weight d_x",
    integers=f"{scores.INTEGERS} num_rows",
)


@functools.cache
def _forward_kernel(W, kind):
    @kernel(FORWARD)
    def forward_shares(arguments):
        a = carray(arguments, 1)[0]
        num_labels, fan_in, group, chunk = a.num_labels, a.fan_in, a.group, a.chunk
        num_tiles, features, num_rows = a.num_tiles, a.features, a.num_rows
        weight, bias = at_address(np.float32, a.weight), at_address(np.float32, a.bias)
        has_bias = a.bias != 0
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        out, bad = at_address(np.float32, a.out), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            block = at_address(np.float32, a.block + share * 4 * _BLOCK * W)
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                for tile in range(num_tiles):
                    for b0 in range(c0, c1, _BLOCK):
                        b1 = min(b0 + _BLOCK, c1)
                        for label in range(b0, b1):
                            w, row = label * fan_in, (label // group) * fan_in
                            if out_of_range(index, row, fan_in, features):
                                if bad[share] < 0:
                                    bad[share] = label
                                continue
                            base = tile * features * W
                            score = fill(zero, bias[label] if has_bias else _ZERO)
                            score = label_score(score, x, base, weight, w, index, row, fan_in)
                            store(block, (label - b0) * W, score)
                        count = min(W, num_rows - tile * W)
                        to = tile * W * num_labels + b0
                        transpose(block, 0, W, b1 - b0, count, out, to, num_labels)
            share = next_share(arguments)

    return forward_shares


@functools.cache
def _backward_kernel(W, kind):
    @kernel(BACKWARD)
    def backward_shares(arguments):
        a = carray(arguments, 1)[0]
        num_labels, fan_in, group, chunk = a.num_labels, a.fan_in, a.group, a.chunk
        num_tiles, features, num_rows = a.num_tiles, a.features, a.num_rows
        weight, d_weight = at_address(np.float32, a.weight), at_address(np.float32, a.d_weight)
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        grad, bad = at_address(np.float32, a.grad), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            block = at_address(np.float32, a.block + share * 4 * _BLOCK * W)
            d_x = at_address(np.float32, a.d_x + share * 4 * num_tiles * features * W)
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                for tile in range(num_tiles):
                    for b0 in range(c0, c1, _BLOCK):
                        b1 = min(b0 + _BLOCK, c1)
                        # Columns beyond the last row stay as they are: x is zero there.
                        count = min(W, num_rows - tile * W)
                        at = tile * W * num_labels + b0
                        transpose(grad, at, num_labels, count, b1 - b0, block, 0, W)
                        for label in range(b0, b1):
                            w, row = label * fan_in, (label // group) * fan_in
                            if out_of_range(index, row, fan_in, features):
                                if bad[share] < 0:
                                    bad[share] = label
                                continue
                            g = load(zero, block, (label - b0) * W)
                            label_gradient(
                                *(g, x, tile * features * W, weight, w, index, row, fan_in),
                                *(tile > 0, d_weight, w, d_x),
                            )
            share = next_share(arguments)

    return backward_shares


def fan_in_linear(
    x: Tensor,  # [B, D] float32 or bfloat16
    layer: Layer,  # float32, contiguous
) -> Tensor:  # [B, L]
    """`x @ dense(weight, index).T + bias` in x's dtype."""
    width = tile_width(len(x))
    shares = threads.num_shares(layer.num_labels)
    fields = scores.layer_fields(to_tiles(x, width), layer, shares)
    # numpy's large arrays come in huge pages, torch's in small ones that each cost a fault.
    out = np.empty((len(x), layer.num_labels), np.float32)
    block = threads.zeros(shares, _BLOCK, width)
    arguments = threads.record(FORWARD, **fields, block=block, out=out, num_rows=len(x))
    threads.launch(_forward_kernel(width, scores.index_kind(layer)), arguments)
    scores.raise_bad_index(layer, fields)
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
    fields = scores.layer_fields(tiles, layer, shares)
    grad = grad.float().contiguous()
    d_weight = torch.empty(layer.weight.shape)
    d_x = threads.zeros(shares, *tiles.shape)
    block = threads.zeros(shares, _BLOCK, width)
    arguments = threads.record(
        BACKWARD,
        **fields,
        block=block,
        grad=grad,
        d_weight=d_weight,
        d_x=d_x,
        num_rows=len(x),
    )
    threads.launch(_backward_kernel(width, scores.index_kind(layer)), arguments)
    scores.raise_bad_index(layer, fields)
    return from_tiles(d_x, len(x)).to(x.dtype), d_weight
