"""The fused training step: one pass over the labels, scores and gradients in registers.

Activations are feature-major, [tiles, D, width]: an index of a label names a row of `width`
neighbouring numbers. A label's weights are read once for all: scores -> loss gradient -> gradient
of the weights and of x -> update in place. A batch wider than a tile goes tile by tile over a
chunk of labels whose weights stay in the cache; the update follows the last tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.gradients import label_gradient
from xmc_kernels._cpu.jit import compiled
from xmc_kernels._cpu.losses import bce, squared_hinge
from xmc_kernels._cpu.scores import label_score, make_layer, out_of_range, raise_bad_index
from xmc_kernels._cpu.tiles import chunk_labels, flat, from_tiles, tile_width, to_tiles
from xmc_kernels._cpu.vector import (
    fill,
    fma,
    greater,
    hsum,
    load,
    mul,
    negative_abs,
    pointer,
    splat,
)
from xmc_kernels.update import RULES, ClassifierState, UpdateRule

LOSSES = ("bce", "squared_hinge")
_BCE = LOSSES.index("bce")
_MOMENTUM, _ADAMW, _ADAGRAD = (RULES.index(rule) for rule in ("momentum", "adamw", "adagrad"))
_ZERO, _ONE = np.float32(0), np.float32(1)


class Rows(NamedTuple):
    """The batch: activations, gradient scale (0 in padding) and positives sorted by tile, label."""

    x: np.ndarray  # [tiles, D * width]
    scale: np.ndarray  # [tiles * width]
    keys: np.ndarray  # [nnz], tile * L + label
    columns: np.ndarray  # [nnz], row within the tile


class Memory(NamedTuple):
    """Flat views of the optimizer's tensors, empty where absent: those of weight, those of bias."""

    weight: tuple[np.ndarray, np.ndarray, np.ndarray]  # m, v, accumulated gradient
    bias: tuple[np.ndarray, np.ndarray, np.ndarray]


class Scratch(NamedTuple):
    """A share's own buffers. `target` is all zeros between labels."""

    target: np.ndarray  # [width]
    partial: np.ndarray  # [16 * 16]
    grad: np.ndarray  # [chunk * F]
    grad_bias: np.ndarray  # [chunk]

    @classmethod
    def make(cls, width: int, chunk: int, fan_in: int) -> Scratch:
        sizes = (width, 256, chunk * fan_in, chunk)
        return cls(*(np.zeros(size, np.float32) for size in sizes))


class Constants(NamedTuple):
    """The update rule as float32 numbers, differences taken in float64 before rounding."""

    lr: np.float32
    momentum: np.float32
    beta1: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    eps: np.float32
    mean_scale: np.float32  # 1 / (1 - beta1^step)
    root_scale: np.float32  # 1 / sqrt(1 - beta2^step)

    @classmethod
    def of(cls, rule: UpdateRule, lr: float, step: int) -> Constants:
        beta1, beta2 = rule.betas
        values = (
            lr,
            rule.momentum,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            rule.eps,
            1 / (1 - beta1**step),
            (1 - beta2**step) ** -0.5,
        )
        return cls(*(np.float32(value) for value in values))


@compiled
def update(rule, c, decay, param, grad, m, v):
    """One optimizer step on slices of equal length, in place."""
    if rule == _ADAMW:
        keep = np.float32(1) - c.lr * decay
        rate = c.lr * c.mean_scale
        for i in range(param.size):
            m[i] = c.beta1 * m[i] + c.one_minus_beta1 * grad[i]
            v[i] = c.beta2 * v[i] + c.one_minus_beta2 * (grad[i] * grad[i])
            param[i] = keep * param[i] - rate * m[i] / (np.sqrt(v[i]) * c.root_scale + c.eps)
    elif rule == _ADAGRAD:
        for i in range(param.size):
            g = grad[i] + decay * param[i]
            v[i] += g * g
            param[i] -= c.lr * g / (np.sqrt(v[i]) + c.eps)
    elif rule == _MOMENTUM:
        for i in range(param.size):
            m[i] = c.momentum * m[i] + (grad[i] + decay * param[i])
            param[i] -= c.lr * m[i]
    else:
        for i in range(param.size):
            param[i] -= c.lr * (grad[i] + decay * param[i])


@compiled
def keep_or_apply(apply, rule, c, decay, param, grad, memory, first, last):
    """Add what was accumulated and update param[first:last], or accumulate grad."""
    m, v, kept = memory
    if kept.size > 0:
        for i in range(last - first):
            grad[i] += kept[first + i]
            if not apply:
                kept[first + i] = grad[i]
    if apply:
        update(
            rule, c, decay, param[first:last], grad[: last - first], m[first:last], v[first:last]
        )


@functools.cache
def _kernel(W):
    @compiled
    def classifier_range(
        start, stop, chunk, layer, rows, loss, apply, rule, c, decay, memory, scratch, d_x_t
    ):
        """Labels start..stop; returns the first label with a bad index or -1, and the loss."""
        num_labels, fan_in, group = layer.num_labels, layer.fan_in, layer.group
        weight, index, bias = pointer(layer.weight), pointer(layer.indices), pointer(layer.bias)
        has_bias = layer.bias.size > 0
        x, d_x, scales = pointer(rows.x), pointer(d_x_t), pointer(rows.scale)
        target, partial = pointer(scratch.target), pointer(scratch.partial)
        grad, grad_bias = pointer(scratch.grad), pointer(scratch.grad_bias)
        keys, columns, num_keys = pointer(rows.keys), pointer(rows.columns), rows.keys.size
        num_tiles, stride = rows.x.shape
        features = stride // W
        zero = splat(W, _ZERO)
        value = 0.0
        d_x_t[:] = 0
        for c0 in range(start, stop, chunk):
            c1 = min(c0 + chunk, stop)
            for tile in range(num_tiles):
                base = tile * stride
                total = zero
                scale = load(zero, scales, tile * W)
                p = np.searchsorted(rows.keys, tile * num_labels + c0)
                for label in range(c0, c1):
                    w = label * fan_in
                    row = (label // group) * fan_in
                    if out_of_range(index, row, fan_in, features):
                        return label, value

                    score = fill(zero, bias[label] if has_bias else _ZERO)
                    score = label_score(score, x, base, weight, w, index, row, fan_in)

                    first = p
                    while p < num_keys and keys[p] == tile * num_labels + label:
                        target[columns[p]] = _ONE
                        p += 1
                    if loss == _BCE:
                        g, v = bce(score, load(zero, target, 0))
                    else:
                        g, v = squared_hinge(score, load(zero, target, 0))
                    for i in range(first, p):
                        target[columns[i]] = _ZERO
                    g = mul(g, scale)
                    total = fma(v, scale, total)

                    r = (label - c0) * fan_in
                    if tile == 0:
                        grad_bias[label - c0] = hsum(g)
                    else:
                        grad_bias[label - c0] += hsum(g)
                    if loss != _BCE and greater(zero, negative_abs(g)) == 0:
                        if tile == 0:
                            for k in range(fan_in):
                                grad[r + k] = _ZERO
                        continue
                    add_up = tile > 0
                    label_gradient(
                        g, x, base, weight, w, index, row, fan_in, add_up, grad, r, d_x, partial
                    )
                value += hsum(total)
            keep_or_apply(
                *(apply, rule, c, decay, layer.weight, scratch.grad, memory.weight),
                *(c0 * fan_in, c1 * fan_in),
            )
            if has_bias:
                keep_or_apply(
                    apply, rule, c, _ZERO, layer.bias, scratch.grad_bias, memory.bias, c0, c1
                )
        return -1, value

    return classifier_range


def _positives(indptr: Tensor, indices: Tensor, num_labels: int, width: int) -> tuple:
    """(keys, columns) of `Rows`."""
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr.numpy()))
    keys = rows // width * num_labels + indices.numpy()
    order = np.argsort(keys, kind="stable")
    return keys[order], (rows % width)[order]


def classifier_step(
    x: Tensor,  # [B, D] float32 or bfloat16
    weight: Tensor,  # [L, F] float32, contiguous
    index: Tensor,  # [L/G, F]
    bias: Tensor | None,  # [L] float32
    indptr: Tensor,  # [B+1]
    indices: Tensor,  # [nnz]
    state: ClassifierState,
    loss: str,
    rule: UpdateRule,
    lr: float,
    step: int,
    grad_scale: float,
    update: bool,
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's."""
    num_rows, features = x.shape
    num_labels, fan_in = weight.shape
    width = tile_width(num_rows)
    tiles = to_tiles(x, width)
    scale = np.zeros(len(tiles) * width, np.float32)
    scale[:num_rows] = grad_scale
    rows = Rows(tiles, scale, *_positives(indptr, indices, num_labels, width))
    layer = make_layer(weight, index, bias)
    memory = Memory(
        (flat(state.weight_m), flat(state.weight_v), flat(state.grad_weight)),
        (flat(state.bias_m), flat(state.bias_v), flat(state.grad_bias)),
    )
    shares = threads.shares(num_labels)
    d_x = np.empty((len(shares), tiles.size), np.float32)
    chunk = chunk_labels(fan_in, len(tiles))
    common = (
        chunk,
        layer,
        rows,
        LOSSES.index(loss),
        update,
        RULES.index(rule.kind),
        Constants.of(rule, lr, step),
        np.float32(rule.weight_decay),
        memory,
    )
    calls = [
        (*share, *common, Scratch.make(width, chunk, fan_in), own)
        for share, own in zip(shares, d_x, strict=True)
    ]
    results = threads.run(_kernel(width), calls)
    raise_bad_index(index, num_labels, features, [bad for bad, _ in results])
    value = torch.tensor(sum(part for _, part in results), dtype=torch.float32)
    return value, from_tiles(d_x, num_rows, features, width, x.dtype)
