"""The fused training step: one pass over the labels, scores and gradients in registers.

Activations are feature-major, [tiles, D, width]: an index of a label names a row of `width`
neighbouring numbers. A label's weights are read once for all: scores -> loss gradient -> gradient
of the weights and of x -> update in place. A batch wider than a tile goes tile by tile over a
chunk of labels whose weights stay in the cache; the update follows the last tile. Labels that share
an index row are taken several at a time, and their scores pass through the first-level cache.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from xmc_kernels import rounding
from xmc_kernels._cpu import labels, positives, threads
from xmc_kernels._cpu.blocks import repeat
from xmc_kernels._cpu.gradients import block_gradients, label_gradients
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
from xmc_kernels._cpu.losses import bce, settled, squared_hinge, sum_of_value
from xmc_kernels._cpu.positives import (
    BCE,
    first_positive,
    is_positive,
    take_out,
)
from xmc_kernels._cpu.scores import block_scores, label_score
from xmc_kernels._cpu.tiles import from_tiles, tile_width, to_tiles
from xmc_kernels._cpu.update import CONSTANTS, constants, update_biases, update_weights
from xmc_kernels._cpu.vector import (
    add,
    advance,
    at_address,
    fill,
    greater,
    hsum,
    load,
    mul,
    negative_abs,
    next_share,
    splat,
    store,
    width_of,
)
from xmc_kernels.layer import Layer
from xmc_kernels.update import RULES, ClassifierState, UpdateRule

_MASK = 0xFFFFFFFF  # 32 bits, unsigned
_ZERO = np.float32(0)
ARGUMENTS = threads.record_type(
    addresses=f"{labels.ADDRESSES} {positives.ADDRESSES} scale weight_m weight_v bias_m bias_v "
    "grad_weight grad_bias weight_m_scale weight_v_scale scratch d_x value",
    integers=f"{labels.INTEGERS} {positives.INTEGERS} scratch_bytes apply rule weight_key bias_key",
    floats=f"{CONSTANTS} {positives.FLOATS}",
)


def _scratch_size(width: int, block: int, chunk: int, fan_in: int) -> int:
    """Floats of a share's buffers: two vectors, scores of a block, gradients of a chunk."""
    return -(-(width * (2 + block) + chunk * fan_in + chunk) // 16) * 16


@njit(forceinline=True)
def _loss(a, score, value, scale, position, tile, label, room):
    """Gradient of a label's scores and `value` with the loss of its negatives.

    Also the loss of its positives, which begin at a position, and the position after them.
    """
    first, of_positives = position, 0.0
    gradients = advance(room, width_of(score))
    if is_positive(a, position, tile, label):
        store(room, 0, score)
        store(gradients, 0, fill(score, _ZERO))
        of_positives, position = take_out(a, position, tile, label, room, gradients)
        score = load(score, room, 0)
    if a.loss == BCE:
        gradient, value = bce(score, value)
    else:
        gradient, value = squared_hinge(score, value)
    if position > first:
        gradient = add(gradient, load(score, gradients, 0))
    return mul(gradient, scale), value, of_positives, position


@functools.cache
def _kernel(W, kind, weight_kind, T):
    CHAINS = chains_of(W)

    @kernel(ARGUMENTS)
    def classifier_shares(arguments):
        a = carray(arguments, 1)[0]
        fan_in, chunk = a.fan_in, a.chunk
        stride = a.features * W
        weight = at_address(weight_kind, a.weight)
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        scales = at_address(np.float32, a.scale)  # that of row 0 is that of every row
        values, bad = at_address(np.float64, a.value), at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)
        one, several, chains = repeat(1, zero), repeat(T, zero), repeat(CHAINS, zero)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            # Room for two vectors; scores of a block, then their gradients.
            at = a.scratch + share * a.scratch_bytes
            room, g = at_address(np.float32, at), at_address(np.float32, at + 8 * W)
            # The gradients of a chunk.
            at += 4 * W * (2 + a.block)
            grad, grad_bias = (
                at_address(np.float32, at),
                at_address(np.float32, at + 4 * chunk * fan_in),
            )
            biases = at_address(np.float32, a.biases + share * 4 * chunk)
            d_x = at_address(np.float32, a.d_x + share * 4 * a.num_tiles * stride)
            total = 0.0
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                copy_biases(a, biases, c0, c1)
                for i in range((c1 - c0) * fan_in):
                    grad[i] = _ZERO
                for i in range(c1 - c0):
                    grad_bias[i] = _ZERO
                for tile in range(a.num_tiles):
                    base = tile * stride
                    scale = load(zero, scales, tile * W)
                    value = repeat(2, zero)
                    p = first_positive(a, tile, c0)
                    b0 = c0
                    while b0 < c1:
                        b1 = block_stop(a, b0, c1)
                        count = b1 - b0
                        rows, row, step = index_rows(a, index, share, b0, b1 - b0)
                        wide, w = weight_rows(a, weight, share, b0, b1 - b0)
                        if refused(a, rows, row, step, count, bad, share, b0):
                            b0 = b1
                            continue
                        if T > 1:
                            block_scores(
                                *(several, chains, a, x, base, wide, w, rows, row, step),
                                *(biases, b0 - c0, count, g, 0),
                            )
                        any_gradient = False
                        for i in range(count):
                            at, first, own = b0 - c0 + i, w + i * fan_in, row + i * step
                            if T > 1:
                                score = load(zero, g, i * W)
                            else:
                                score = label_score(
                                    *(chains, x, base, wide, first, rows, own, fan_in, biases[at]),
                                )
                            of_score, value, of_positives, p = _loss(
                                *(a, score, value, scale, p, tile, b0 + i, room)
                            )
                            total += scales[0] * of_positives
                            grad_bias[at] += hsum(of_score)
                            # A hinge leaves most labels without a gradient.
                            has_gradient = (
                                a.loss == BCE or greater(zero, negative_abs(of_score)) != 0
                            )
                            if T > 1:
                                store(g, i * W, of_score)
                                any_gradient |= has_gradient
                            elif has_gradient:
                                label_gradients(
                                    *(repeat(1, of_score), x, d_x, base, wide, first, rows, own),
                                    *(fan_in, grad, at * fan_in),
                                )
                        if T > 1 and any_gradient:
                            block_gradients(
                                *(several, one, a, x, d_x, base, wide, w, rows, row, step),
                                *(g, 0, count, grad, (b0 - c0) * fan_in),
                            )
                        value = settled(value)
                        b0 = b1
                    total += hsum(mul(sum_of_value(value), scale))
                update_weights(a, weight, share, grad, c0, c1)
                if a.bias != 0:
                    update_biases(a, biases, grad_bias, c0, c1)
            values[share] = total
            share = next_share(arguments)

    return classifier_shares


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
    smoothing: float,
    positive_weight: Tensor | None,  # [L]
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's."""
    num_rows = len(x)
    width = tile_width(num_rows)
    tiles = to_tiles(x, width)
    scale = np.zeros(len(tiles) * width, np.float32)  # 0 in padding
    scale[:num_rows] = grad_scale
    of_positives = positives.positive_fields(
        indptr, indices, layer.num_labels, width, loss, smoothing, positive_weight
    )
    shares = threads.num_shares(layer.num_labels)
    fields = labels.layer_fields(tiles, layer, shares)
    scratch = threads.zeros(
        shares, _scratch_size(width, fields["block"], fields["chunk"], fields["fan_in"])
    )
    d_x = threads.zeros(shares, *tiles.shape, at=threads.PAGE // 2)
    value = np.zeros(shares)
    arguments = threads.record(
        ARGUMENTS,
        **fields,
        **of_positives,
        **vars(state),
        **constants(rule, lr, step),
        scale=scale,
        scratch=scratch,
        scratch_bytes=scratch.strides[0],
        d_x=d_x,
        value=value,
        apply=update,
        rule=RULES.index(rule.kind),
        weight_key=rounding.stream_key(seed, step, rounding.WEIGHT, row_offset) & _MASK,
        bias_key=rounding.stream_key(seed, step, rounding.BIAS, row_offset) & _MASK,
    )
    threads.launch(_kernel(width, *labels.kinds(layer, width)), arguments)
    labels.raise_bad_index(layer, fields)
    total = torch.tensor(value.sum(), dtype=torch.float32)
    return total, from_tiles(d_x, num_rows).to(x.dtype)
