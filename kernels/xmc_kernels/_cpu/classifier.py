"""The fused training step: one pass over the labels, scores and gradients in registers.

Activations are feature-major, [tiles, D, width]: an index of a label names a row of `width`
neighbouring numbers. A label's weights are read once for all: scores -> loss gradient -> gradient
of the weights and of x -> update in place. A batch wider than a tile goes tile by tile over a
chunk of labels whose weights stay in the cache; the update follows the last tile.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray
from torch import Tensor

from xmc_kernels._cpu import scores, threads
from xmc_kernels._cpu.gradients import label_gradient
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.losses import bce, squared_hinge
from xmc_kernels._cpu.scores import label_score, out_of_range, share_range
from xmc_kernels._cpu.tiles import from_tiles, lower_bound, tile_width, to_tiles
from xmc_kernels._cpu.update import CONSTANTS, apply_or_keep, constants
from xmc_kernels._cpu.vector import (
    at_address,
    fill,
    fma,
    greater,
    hsum,
    load,
    mul,
    negative_abs,
    next_share,
    splat,
)
from xmc_kernels.layer import Layer
from xmc_kernels.update import RULES, ClassifierState, UpdateRule

LOSSES = ("bce", "squared_hinge")
_BCE = LOSSES.index("bce")
_ZERO, _ONE = np.float32(0), np.float32(1)
ARGUMENTS = threads.record_type(
    addresses=f"{scores.ADDRESSES} scale keys columns weight_m weight_v bias_m bias_v "
    "grad_weight grad_bias scratch d_x value",
    integers=f"{scores.INTEGERS} scratch_bytes num_keys loss apply rule",
    floats=CONSTANTS,
)


def _scratch_size(width: int, chunk: int, fan_in: int) -> int:
    """Floats of a share's buffers, in cache lines: target, grad, grad_bias."""
    return -(-(width + chunk * fan_in + chunk) // 16) * 16


@functools.cache
def _kernel(W, kind):
    @kernel(ARGUMENTS)
    def classifier_shares(arguments):
        a = carray(arguments, 1)[0]
        num_labels, fan_in, group, chunk = a.num_labels, a.fan_in, a.group, a.chunk
        num_tiles, features, num_keys, loss = a.num_tiles, a.features, a.num_keys, a.loss
        stride = features * W
        weight, bias = at_address(np.float32, a.weight), at_address(np.float32, a.bias)
        has_bias = a.bias != 0
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        keys, columns = at_address(np.int64, a.keys), at_address(np.int64, a.columns)
        scales = at_address(np.float32, a.scale)
        values, bad = at_address(np.float64, a.value), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            # The tile's targets, all zeros between labels, and the gradient of a chunk.
            at = a.scratch + share * a.scratch_bytes
            target, grad = at_address(np.float32, at), at_address(np.float32, at + 4 * W)
            grad_bias = at_address(np.float32, at + 4 * (W + chunk * fan_in))
            d_x = at_address(np.float32, a.d_x + share * 4 * num_tiles * stride)
            value = 0.0
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                for tile in range(num_tiles):
                    base = tile * stride
                    total = zero
                    scale = load(zero, scales, tile * W)
                    p = lower_bound(keys, 0, num_keys, tile * num_labels + c0)
                    for label in range(c0, c1):
                        w = label * fan_in
                        row = (label // group) * fan_in
                        if out_of_range(index, row, fan_in, features):
                            if bad[share] < 0:
                                bad[share] = label
                            continue
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

                        r = label - c0
                        grad_bias[r] = hsum(g) + (grad_bias[r] if tile > 0 else _ZERO)
                        if loss != _BCE and greater(zero, negative_abs(g)) == 0:
                            if tile == 0:
                                for k in range(fan_in):
                                    grad[r * fan_in + k] = _ZERO
                            continue
                        label_gradient(
                            *(g, x, base, weight, w, index, row, fan_in),
                            *(tile > 0, grad, r * fan_in, d_x),
                        )
                    value += hsum(total)
                apply_or_keep(
                    *(a, a.decay, weight, grad),
                    at_address(np.float32, a.weight_m),
                    at_address(np.float32, a.weight_v),
                    at_address(np.float32, a.grad_weight),
                    *(a.grad_weight != 0, c0 * fan_in, c1 * fan_in),
                )
                if has_bias:
                    apply_or_keep(
                        *(a, _ZERO, bias, grad_bias),
                        at_address(np.float32, a.bias_m),
                        at_address(np.float32, a.bias_v),
                        at_address(np.float32, a.grad_bias),
                        *(a.grad_bias != 0, c0, c1),
                    )
            values[share] = value
            share = next_share(arguments)

    return classifier_shares


def _positives(indptr: Tensor, indices: Tensor, num_labels: int, width: int) -> tuple:
    """The positives by tile and label: tile * L + label, and the row's column in its tile."""
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr.numpy()))
    keys = rows // width * num_labels + indices.numpy()
    order = np.argsort(keys, kind="stable")
    return keys[order], (rows % width)[order]


def classifier_step(
    x: Tensor,  # [B, D] float32 or bfloat16
    layer: Layer,  # float32, contiguous
    indptr: Tensor,  # [B+1]
    indices: Tensor,  # [nnz]
    state: ClassifierState,
    loss: str,
    rule: UpdateRule,
    lr: float,
    step: int,
    grad_scale: float,
    update: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's."""
    num_rows = len(x)
    width = tile_width(num_rows)
    tiles = to_tiles(x, width)
    scale = np.zeros(len(tiles) * width, np.float32)  # 0 in padding
    scale[:num_rows] = grad_scale
    keys, columns = _positives(indptr, indices, layer.num_labels, width)
    shares = threads.num_shares(layer.num_labels)
    fields = scores.layer_fields(tiles, layer, shares)
    scratch = threads.zeros(shares, _scratch_size(width, fields["chunk"], fields["fan_in"]))
    d_x = threads.zeros(shares, *tiles.shape)
    value = np.zeros(shares)
    arguments = threads.record(
        ARGUMENTS,
        **fields,
        **vars(state),
        **constants(rule, lr, step),
        scale=scale,
        keys=keys,
        columns=columns,
        scratch=scratch,
        scratch_bytes=scratch.strides[0],
        d_x=d_x,
        value=value,
        num_keys=len(keys),
        loss=LOSSES.index(loss),
        apply=update,
        rule=RULES.index(rule.kind),
    )
    threads.launch(_kernel(width, scores.index_kind(layer)), arguments)
    scores.raise_bad_index(layer, fields)
    total = torch.tensor(value.sum(), dtype=torch.float32)
    return total, from_tiles(d_x, num_rows).to(x.dtype)
