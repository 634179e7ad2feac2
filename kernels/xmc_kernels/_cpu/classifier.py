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

from xmc_kernels import rounding
from xmc_kernels._cpu import labels, threads
from xmc_kernels._cpu.blocks import repeat
from xmc_kernels._cpu.gradients import block_gradients
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
from xmc_kernels._cpu.losses import bce, squared_hinge
from xmc_kernels._cpu.scores import block_scores
from xmc_kernels._cpu.tiles import from_tiles, lower_bound, tile_width, to_tiles
from xmc_kernels._cpu.update import CONSTANTS, constants, update_biases, update_weights
from xmc_kernels._cpu.vector import (
    at_address,
    fma,
    greater,
    hsum,
    load,
    mul,
    negative_abs,
    next_share,
    splat,
    store,
)
from xmc_kernels.layer import Layer
from xmc_kernels.update import RULES, ClassifierState, UpdateRule

LOSSES = ("bce", "squared_hinge")
_BCE = LOSSES.index("bce")
_MASK = 0xFFFFFFFF  # 32 bits, unsigned
_ZERO, _ONE = np.float32(0), np.float32(1)
ARGUMENTS = threads.record_type(
    addresses=f"{labels.ADDRESSES} scale keys columns weight_m weight_v bias_m bias_v "
    "grad_weight grad_bias weight_m_scale weight_v_scale scratch d_x value",
    integers=f"{labels.INTEGERS} scratch_bytes num_keys loss apply rule weight_key bias_key",
    floats=CONSTANTS,
)


def _scratch_size(width: int, block: int, chunk: int, fan_in: int) -> int:
    """Floats of a share's buffers: target and scores of a block, gradients of a chunk."""
    return -(-(2 * width * block + chunk * fan_in + chunk) // 16) * 16


@functools.cache
def _kernel(W, kind, weight_kind, T):
    CHAINS = chains_of(W)

    @kernel(ARGUMENTS)
    def classifier_shares(arguments):
        a = carray(arguments, 1)[0]
        num_labels, fan_in, chunk, num_keys = a.num_labels, a.fan_in, a.chunk, a.num_keys
        stride = a.features * W
        weight = at_address(weight_kind, a.weight)
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        keys, columns = at_address(np.int64, a.keys), at_address(np.int64, a.columns)
        scales = at_address(np.float32, a.scale)
        values, bad = at_address(np.float64, a.value), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)
        one, several, chains = repeat(1, zero), repeat(T, zero), repeat(CHAINS, zero)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            # A block's targets, all zeros between blocks; its scores, then their gradients.
            at = a.scratch + share * a.scratch_bytes
            target, g = at_address(np.float32, at), at_address(np.float32, at + 4 * W * a.block)
            at += 8 * W * a.block
            # The gradients of a chunk.
            grad, grad_bias = (
                at_address(np.float32, at),
                at_address(np.float32, at + 4 * chunk * fan_in),
            )
            biases = at_address(np.float32, a.biases + share * 4 * chunk)
            d_x = at_address(np.float32, a.d_x + share * 4 * a.num_tiles * stride)
            value = 0.0
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                copy_biases(a, biases, c0, c1)
                for i in range((c1 - c0) * fan_in):
                    grad[i] = _ZERO
                for i in range(c1 - c0):
                    grad_bias[i] = _ZERO
                for tile in range(a.num_tiles):
                    base = tile * stride
                    total = zero
                    scale = load(zero, scales, tile * W)
                    p = lower_bound(keys, 0, num_keys, tile * num_labels + c0)
                    b0 = c0
                    while b0 < c1:
                        b1 = block_stop(a, b0, c1)
                        count = b1 - b0
                        rows, row, step = index_rows(a, index, share, b0, b1 - b0)
                        wide, w = weight_rows(a, weight, share, b0, b1 - b0)
                        if refused(a, rows, row, step, count, bad, share, b0):
                            b0 = b1
                            continue
                        block_scores(
                            *(several, chains, a, x, base, wide, w, rows, row, step),
                            *(biases, b0 - c0, count, g, 0),
                        )
                        first, origin = p, tile * num_labels + b0
                        while p < num_keys and keys[p] < origin + count:
                            target[(keys[p] - origin) * W + columns[p]] = _ONE
                            p += 1
                        any_gradient = np.uint64(0)
                        for i in range(count):
                            score, wanted = load(zero, g, i * W), load(zero, target, i * W)
                            if a.loss == _BCE:
                                of_score, v = bce(score, wanted)
                            else:
                                of_score, v = squared_hinge(score, wanted)
                            of_score = mul(of_score, scale)
                            total = fma(v, scale, total)
                            store(g, i * W, of_score)
                            grad_bias[b0 - c0 + i] += hsum(of_score)
                            if a.loss != _BCE:
                                any_gradient |= greater(zero, negative_abs(of_score))
                        for i in range(first, p):
                            target[(keys[i] - origin) * W + columns[i]] = _ZERO
                        if a.loss == _BCE or any_gradient != 0:
                            block_gradients(
                                *(several, one, a, x, d_x, base, wide, w, rows, row, step),
                                *(g, 0, count, grad, (b0 - c0) * fan_in),
                            )
                        b0 = b1
                    value += hsum(total)
                update_weights(a, weight, share, grad, c0, c1)
                if a.bias != 0:
                    update_biases(a, biases, grad_bias, c0, c1)
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
    fields = labels.layer_fields(tiles, layer, shares)
    scratch = threads.zeros(
        shares, _scratch_size(width, fields["block"], fields["chunk"], fields["fan_in"])
    )
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
        weight_key=rounding.stream_key(seed, step, rounding.WEIGHT) & _MASK,
        bias_key=rounding.stream_key(seed, step, rounding.BIAS) & _MASK,
    )
    threads.launch(_kernel(width, *labels.kinds(layer, width)), arguments)
    labels.raise_bad_index(layer, fields)
    total = torch.tensor(value.sum(), dtype=torch.float32)
    return total, from_tiles(d_x, num_rows).to(x.dtype)
