"""Fixed fan-in linear layer, forward and backward, on feature-major tiles of the batch."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.gradients import label_gradient
from xmc_kernels._cpu.jit import compiled
from xmc_kernels._cpu.scores import label_score, make_layer, out_of_range, raise_bad_index
from xmc_kernels._cpu.tiles import chunk_labels, flat, from_tiles, tile_width, to_tiles, transpose
from xmc_kernels._cpu.vector import fill, load, pointer, splat, store

_ZERO = np.float32(0)
_BLOCK = 64  # labels whose scores are transposed at once


@functools.cache
def _forward_kernel(W):
    @compiled
    def forward_range(start, stop, chunk, layer, tiles, num_rows, block, out):
        """Scores of labels start..stop into out [B * L]; returns a label with a bad index or -1."""
        num_labels, fan_in, group = layer.num_labels, layer.fan_in, layer.group
        weight, index, bias = pointer(layer.weight), pointer(layer.indices), pointer(layer.bias)
        has_bias = layer.bias.size > 0
        x, scores, into = pointer(tiles), pointer(block), pointer(out)
        num_tiles, stride = tiles.shape
        zero = splat(W, _ZERO)
        for c0 in range(start, stop, chunk):
            c1 = min(c0 + chunk, stop)
            for tile in range(num_tiles):
                count = min(W, num_rows - tile * W)
                for b0 in range(c0, c1, _BLOCK):
                    b1 = min(b0 + _BLOCK, c1)
                    for label in range(b0, b1):
                        row = (label // group) * fan_in
                        if out_of_range(index, row, fan_in, stride // W):
                            return label
                        score = fill(zero, bias[label] if has_bias else _ZERO)
                        score = label_score(
                            score, x, tile * stride, weight, label * fan_in, index, row, fan_in
                        )
                        store(scores, (label - b0) * W, score)
                    to = tile * W * num_labels + b0
                    transpose(scores, 0, W, b1 - b0, count, into, to, num_labels)
        return -1

    return forward_range


@functools.cache
def _backward_kernel(W):
    @compiled
    def backward_range(
        start, stop, chunk, layer, tiles, num_rows, block, sums, d_out, d_weight, d_x_t
    ):
        """Gradients of labels start..stop; d_x_t is this share's own [tiles * D * W]."""
        num_labels, fan_in, group = layer.num_labels, layer.fan_in, layer.group
        weight, index, x = pointer(layer.weight), pointer(layer.indices), pointer(tiles)
        grad, grads, partial = pointer(d_out), pointer(block), pointer(sums)
        into, d_x = pointer(d_weight), pointer(d_x_t)
        num_tiles, stride = tiles.shape
        zero = splat(W, _ZERO)
        d_x_t[:] = 0
        for c0 in range(start, stop, chunk):
            c1 = min(c0 + chunk, stop)
            for tile in range(num_tiles):
                base = tile * stride
                count = min(W, num_rows - tile * W)
                for b0 in range(c0, c1, _BLOCK):
                    b1 = min(b0 + _BLOCK, c1)
                    at = tile * W * num_labels + b0
                    block[:] = 0
                    transpose(grad, at, num_labels, count, b1 - b0, grads, 0, W)
                    for label in range(b0, b1):
                        w, row = label * fan_in, (label // group) * fan_in
                        if out_of_range(index, row, fan_in, stride // W):
                            return label
                        g = load(zero, grads, (label - b0) * W)
                        add_up = tile > 0
                        label_gradient(
                            g,
                            x,
                            base,
                            weight,
                            w,
                            index,
                            row,
                            fan_in,
                            add_up,
                            into,
                            w,
                            d_x,
                            partial,
                        )
        return -1

    return backward_range


def fan_in_linear(
    x: Tensor,  # [B, D] float32 or bfloat16
    weight: Tensor,  # [L, F] float32
    index: Tensor,  # [L/G, F]
    bias: Tensor | None,  # [L] float32
) -> Tensor:  # [B, L]
    """`x @ dense(weight, index).T + bias` in x's dtype."""
    num_rows, features = x.shape
    num_labels, fan_in = weight.shape
    width = tile_width(num_rows)
    tiles = to_tiles(x, width)
    layer = make_layer(weight.contiguous(), index, bias if bias is None else bias.contiguous())
    out = torch.empty(num_rows, num_labels)
    common = (chunk_labels(fan_in, len(tiles)), layer, tiles, num_rows)
    calls = [
        (*share, *common, np.empty(_BLOCK * width, np.float32), flat(out))
        for share in threads.shares(num_labels)
    ]
    bad = threads.run(_forward_kernel(width), calls)
    raise_bad_index(index, num_labels, features, bad)
    return out.to(x.dtype)


def fan_in_linear_backward(
    grad: Tensor,  # [B, L]
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F]
) -> tuple[Tensor, Tensor]:  # [B, D], [L, F]
    """Gradients in x and weight; the shares' parts of d_x are added in a fixed order."""
    num_rows, features = x.shape
    num_labels, fan_in = weight.shape
    width = tile_width(num_rows)
    tiles = to_tiles(x, width)
    layer = make_layer(weight.contiguous(), index, None)
    d_weight = torch.empty(weight.shape)
    shares = threads.shares(num_labels)
    d_x = np.empty((len(shares), tiles.size), np.float32)
    common = (chunk_labels(fan_in, len(tiles)), layer, tiles, num_rows)
    gradients = (flat(grad.float().contiguous()), flat(d_weight))
    calls = [
        (
            *(*share, *common),
            np.empty(_BLOCK * width, np.float32),
            np.zeros(256, np.float32),
            *(*gradients, own),
        )
        for share, own in zip(shares, d_x, strict=True)
    ]
    bad = threads.run(_backward_kernel(width), calls)
    raise_bad_index(index, num_labels, features, bad)
    return from_tiles(d_x, num_rows, features, width, x.dtype), d_weight
