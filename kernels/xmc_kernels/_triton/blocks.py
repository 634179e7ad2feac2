"""Layer and training step of an N:M pattern by matrix products on pieces built in registers.

Slot k of a label lies in block k // n of m inputs, so the slots of BLOCK_D consecutive inputs are
known without a look at the index: a piece [labels, BLOCK_D] of the dense matrix is put together in
registers from packed indices and weights, and multiplied with a contiguous tile of x_t. Nothing is
gathered from memory or scattered to it, and no dense weight is ever stored.

A training step goes through the labels in chunks and holds the loss gradient of one chunk,
`tiles.SCRATCH_BYTES`. Three kernels a chunk: scores and loss gradient, a program per block of
labels; d_x, a program per piece of the features and run of labels, which stays in registers over
the run (a float32 atomic per number and run, or a part of its own that is added up in order); and
the weight gradient, of which a program picks the entries that exist and updates them in place.
One kernel for all three would send d_x to memory once per block of labels: at a million labels of
768 features that is more time than the products take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._reference.fan_in import gradient_like
from xmc_kernels._triton.densify import round_weights, update_launch, wide_rows
from xmc_kernels._triton.float8 import decode
from xmc_kernels._triton.launch import (
    Launch,
    batch_major,
    cdiv,
    dot_settings,
    feature_major,
    input_gradient_buffer,
    power_of_2,
)
from xmc_kernels._triton.layers import layer_arguments, load_columns, pattern_constants
from xmc_kernels._triton.losses import Objective, loss_and_gradient
from xmc_kernels._triton.moments import (
    Room,
    as_bytes,
    make_room,
    moment_arguments,
    room_rows,
    round_moments,
)
from xmc_kernels._triton.positives import Positives, targets
from xmc_kernels._triton.products import scatter_add
from xmc_kernels._triton.tiles import (
    BlockTiles,
    block_tiles,
    deterministic_programs,
    gradient_labels,
)
from xmc_kernels._triton.update import apply, constants, keys
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, UpdateRule


@triton.jit
def _dense_piece(
    layer,  # pointers of weights, of float8 weights' scales and of indices; fan-in, group
    label,
    mask_l,
    first_d,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weights of labels on inputs from first_d on, [BLOCK_L, BLOCK_D], zeros in between."""
    weight_ptr, scale_ptr, index_ptr, fan_in, group = layer
    BLOCKS: tl.constexpr = BLOCK_D // M_BLOCK
    first = (first_d // M_BLOCK + tl.arange(0, BLOCKS)) * N_KEEP
    row = (label // group).to(tl.int64)[:, None]
    at = label.to(tl.int64)[:, None] * fan_in
    local = tl.arange(0, M_BLOCK)[None, None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + label, mask=mask_l, other=0.0)[:, None]
    piece = tl.zeros((BLOCK_L, BLOCKS, M_BLOCK), DTYPE)
    # Unrolled whole, the addresses of all slots would be held at once.
    for k in tl.range(N_KEEP, loop_unroll_factor=2, num_stages=1):
        slot = (first + k)[None, :]
        mask = mask_l[:, None] & (slot < fan_in)
        column = load_columns(index_ptr, row, slot, mask, fan_in, N_KEEP, M_BLOCK)
        weight = tl.load(weight_ptr + at + slot, mask=mask, other=0)
        if scale_ptr is not None:
            weight = decode(weight) * scale
        weight = weight.to(DTYPE)
        here = (column & (M_BLOCK - 1))[:, :, None] == local
        piece = tl.where(here, weight[:, :, None], piece)
    return tl.reshape(piece, (BLOCK_L, BLOCK_D))


@triton.jit
def _load_x(x_t_ptr, offs_d, offs_b, features, width, DTYPE: tl.constexpr):
    """A tile [BLOCK_D, BLOCK_B] of x_t."""
    at = offs_d.to(tl.int64)[:, None] * width + offs_b[None, :]
    return tl.load(x_t_ptr + at, mask=(offs_d < features)[:, None], other=0.0).to(DTYPE)


@triton.jit
def _load_grad(grad_ptr, column, mask_l, offs_b, num_rows, stride_gb, DTYPE: tl.constexpr):
    """A tile [BLOCK_L, BLOCK_B] of the gradient of scores, which is stored [B, stride_gb]."""
    at = offs_b.to(tl.int64)[None, :] * stride_gb + column[:, None]
    mask = mask_l[:, None] & (offs_b < num_rows)[None, :]
    return tl.load(grad_ptr + at, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _blocks_fwd_kernel(
    x_t_ptr,  # [D, width]
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, P]
    bias_ptr,  # [L] or None
    positive_label_ptr,  # [nnz + 1] int32 rising, or None: scores are wanted
    positive_row_ptr,  # [nnz + 1] int32
    first_positive_ptr,  # [units] int64
    out_ptr,  # [B, stride_ob]: scores of labels from start on, or their loss gradient
    d_bias_ptr,  # [tiles, stop - start]
    loss_ptr,  # [tiles, stop - start]
    positive_weight_ptr,  # [L] or None
    start,
    stop,
    num_rows,
    features,
    width,
    fan_in,
    group,
    stride_ob,
    grad_scale,
    smoothing,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    layer = (weight_ptr, scale_ptr, index_ptr, fan_in, group)
    num_tiles = width // BLOCK_B
    unit, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    column = unit * BLOCK_L + tl.arange(0, BLOCK_L)
    label = start + column
    mask_l = label < stop
    offs_b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    score = tl.zeros((BLOCK_L, BLOCK_B), tl.float32)
    for first_d in range(0, features, BLOCK_D):
        piece = _dense_piece(
            layer, label, mask_l, first_d, BLOCK_L, BLOCK_D, N_KEEP, M_BLOCK, DOT_DTYPE
        )
        offs_d = first_d + tl.arange(0, BLOCK_D)
        x = _load_x(x_t_ptr, offs_d, offs_b, features, width, DOT_DTYPE)
        score = tl.dot(piece, x, score, input_precision=PRECISION)
    if bias_ptr is not None:
        score += tl.load(bias_ptr + label, mask=mask_l, other=0.0).to(tl.float32)[:, None]
    counts = mask_l[:, None] & (offs_b < num_rows)[None, :]
    if positive_label_ptr is not None:
        position = tl.load(first_positive_ptr + unit)
        last = min(start + (unit + 1) * BLOCK_L, stop)
        target, _ = targets(
            positive_label_ptr, positive_row_ptr, position, last, label, offs_b, BLOCK_L, BLOCK_B
        )
        value, grad = loss_and_gradient(
            score,
            target,
            positive_weight_ptr,
            label[:, None],
            mask_l[:, None],
            smoothing,
            LOSS,
            SMOOTH,
        )
        score = tl.where(counts, grad * grad_scale, 0.0)
        # A second sum, over labels, of what lies in tensor memory stops Triton 3.7 on sm_100.
        of_tile = tile.to(tl.int64) * (stop - start) + column
        tl.store(d_bias_ptr + of_tile, tl.sum(score, axis=1), mask=mask_l)
        value = tl.where(counts, value * grad_scale, 0.0)
        tl.store(loss_ptr + of_tile, tl.sum(value, axis=1), mask=mask_l)
    out = out_ptr + offs_b.to(tl.int64)[None, :] * stride_ob + column[:, None]
    tl.store(out, score, mask=counts)


@triton.jit
def _blocks_input_kernel(
    grad_ptr,  # [B, stride_gb], of labels from start on
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, P]
    d_x_t_ptr,  # [D, width], or [runs, D, width] where deterministic
    start,
    stop,
    num_rows,
    features,
    width,
    fan_in,
    group,
    run,
    stride_gb,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):
    layer = (weight_ptr, scale_ptr, index_ptr, fan_in, group)
    num_tiles = width // BLOCK_B
    pieces = (features + BLOCK_D - 1) // BLOCK_D
    offs_b = tl.program_id(0) % num_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    first_d = tl.program_id(0) // num_tiles % pieces * BLOCK_D
    part = tl.program_id(0) // num_tiles // pieces
    if DETERMINISTIC:
        d_x_t_ptr += part.to(tl.int64) * features * width
    d_x = tl.zeros((BLOCK_D, BLOCK_B), tl.float32)
    for first in range(part * run, min((part + 1) * run, stop - start), BLOCK_L):
        column = first + tl.arange(0, BLOCK_L)
        label = start + column
        mask_l = label < stop
        piece = _dense_piece(
            layer, label, mask_l, first_d, BLOCK_L, BLOCK_D, N_KEEP, M_BLOCK, DOT_DTYPE
        )
        grad = _load_grad(grad_ptr, column, mask_l, offs_b, num_rows, stride_gb, DOT_DTYPE)
        d_x = tl.dot(tl.trans(piece), grad, d_x, input_precision=PRECISION)
    offs_d = first_d + tl.arange(0, BLOCK_D)
    rows = offs_d.to(tl.int64)[:, None] * width
    scatter_add(d_x_t_ptr, rows, offs_b, (offs_d < features)[:, None], d_x, DETERMINISTIC)


@triton.jit
def _blocks_weight_kernel(
    grad_ptr,  # [B, stride_gb], of labels from start on
    x_t_ptr,  # [D, width]
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, P]
    d_weight_ptr,  # [L, F], or None: the weights are updated
    wide_ptr,  # [stop - start, F] float32, where new float8 weights go; None for all others
    m_ptr,
    v_ptr,
    kept_ptr,
    m_scale_ptr,  # [L] of float8 moments, or None
    v_scale_ptr,
    m_room_ptr,  # [stop - start, F] float32 for new float8 moments
    v_room_ptr,
    start,
    stop,
    num_rows,
    features,
    width,
    fan_in,
    group,
    run,
    stride_gb,
    key,
    mean_key,
    root_key,
    decay,
    lr,
    momentum,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    mean_scale,
    root_scale,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_ROOM: tl.constexpr,  # N_KEEP, up to a power of two
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
):
    pieces = (features + BLOCK_D - 1) // BLOCK_D
    first_d = tl.program_id(0) % pieces * BLOCK_D
    part = tl.program_id(0) // pieces
    offs_d = first_d + tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_D // M_BLOCK * N_ROOM)
    slot = (first_d // M_BLOCK + offs_s // N_ROOM) * N_KEEP + offs_s % N_ROOM
    mask_s = (slot < fan_in) & (offs_s % N_ROOM < N_KEEP)
    averages = (momentum, beta1, one_minus_beta1, beta2, one_minus_beta2)
    scales = (eps, mean_scale, root_scale)
    narrow = (m_scale_ptr, v_scale_ptr, m_room_ptr, v_room_ptr, mean_key, root_key)
    for first in range(part * run, min((part + 1) * run, stop - start), BLOCK_L):
        column = first + tl.arange(0, BLOCK_L)
        label = start + column
        mask_l = label < stop
        d_piece = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        for first_b in range(0, width, BLOCK_B):
            offs_b = first_b + tl.arange(0, BLOCK_B)
            grad = _load_grad(grad_ptr, column, mask_l, offs_b, num_rows, stride_gb, DOT_DTYPE)
            x = _load_x(x_t_ptr, offs_d, offs_b, features, width, DOT_DTYPE)
            d_piece = tl.dot(grad, tl.trans(x), d_piece, input_precision=PRECISION)

        mask = mask_l[:, None] & mask_s[None, :]
        row = (label // group).to(tl.int64)[:, None]
        inputs = load_columns(index_ptr, row, slot[None, :], mask, fan_in, N_KEEP, M_BLOCK)
        d_weight = tl.gather(d_piece, tl.where(mask, inputs - first_d, 0), 1)
        at = label.to(tl.int64)[:, None] * fan_in + slot[None, :]
        if d_weight_ptr is not None:
            tl.store(d_weight_ptr + at, d_weight, mask=mask)
        else:
            weight = tl.load(weight_ptr + at, mask=mask, other=0)
            out = weight_ptr + at
            at_room = column.to(tl.int64)[:, None] * fan_in + slot[None, :]
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + label, mask=mask_l, other=0.0)
                weight = decode(weight) * scale[:, None]
                out = wide_ptr + at_room
            apply(
                weight,
                out,
                None,
                (m_ptr, v_ptr, kept_ptr),
                narrow,
                (at, at_room, mask, label[:, None], mask_l[:, None], slot[None, :]),
                d_weight,
                key,
                decay,
                lr,
                averages,
                scales,
                RULE,
                UPDATE,
            )


def forward_launch(
    x_t: Tensor,
    layer: Layer,
    out: Tensor,
    num_rows: int,
    start: int = 0,
    stop: int | None = None,
    positives: Positives | None = None,
    first_positive: Tensor | None = None,
    d_bias: Tensor | None = None,
    losses: Tensor | None = None,
    objective: Objective | None = None,
    grad_scale: float = 0.0,
) -> Launch:
    """Scores of labels start..stop into out [B, stop - start], or with positives their gradient."""
    stop = layer.num_labels if stop is None else stop
    objective = objective or Objective("")
    tiles = block_tiles(num_rows, layer, x_t.dtype)
    arguments = {
        "x_t_ptr": x_t,
        **layer_arguments(layer),
        "positive_label_ptr": None if positives is None else positives.labels,
        "positive_row_ptr": None if positives is None else positives.rows,
        "first_positive_ptr": first_positive,
        "out_ptr": out,
        "d_bias_ptr": d_bias,
        "loss_ptr": losses,
        **objective.arguments(),
        **_sizes(x_t, layer, num_rows, start, stop),
        "stride_ob": out.stride(0),
        "grad_scale": float(grad_scale),
    }
    values = {**_tile_constants(tiles, x_t, layer), **objective.constants()}
    grid = cdiv(stop - start, tiles.block_l) * (x_t.shape[1] // tiles.block_b)
    return Launch(_blocks_fwd_kernel, grid, arguments, values, tiles.num_warps)


def input_launch(
    grad: Tensor,
    x_t: Tensor,
    layer: Layer,
    d_x_t: Tensor,
    num_rows: int,
    start: int = 0,
    stop: int | None = None,
) -> Launch:
    """d_x_t [D, width] added to, from grad [B, stop - start]; [parts, D, width]: deterministic."""
    stop = layer.num_labels if stop is None else stop
    tiles = block_tiles(num_rows, layer, x_t.dtype)
    units = cdiv(stop - start, tiles.block_l)
    deterministic = d_x_t.dim() == 3
    walk = cdiv(units, len(d_x_t)) if deterministic else tiles.walk
    arguments = {
        "grad_ptr": grad,
        **layer_arguments(layer, bias=False),
        "d_x_t_ptr": d_x_t,
        **_sizes(x_t, layer, num_rows, start, stop),
        "run": walk * tiles.block_l,
        "stride_gb": grad.stride(0),
    }
    values = {**_tile_constants(tiles, x_t, layer), "DETERMINISTIC": deterministic}
    grid = cdiv(units, walk) * cdiv(x_t.shape[0], tiles.block_d) * (x_t.shape[1] // tiles.block_b)
    return Launch(_blocks_input_kernel, grid, arguments, values, tiles.num_warps)


def weight_launch(
    grad: Tensor,
    x_t: Tensor,
    layer: Layer,
    d_weight: Tensor | None,
    num_rows: int,
    start: int = 0,
    stop: int | None = None,
    state: ClassifierState | None = None,
    rule: UpdateRule | None = None,
    numbers: dict[str, float] | None = None,
    key: dict[str, int] | None = None,
    update: bool = True,
    wide: Tensor | None = None,
    room: Room | None = None,
) -> Launch:
    """d_weight [L, F] written from grad [B, stop - start]; or, where it is None, applied.

    New float8 weights go to `wide` [stop - start, F] float32, new float8 moments to `room`.
    """
    stop = layer.num_labels if stop is None else stop
    state, rule = state or ClassifierState(), rule or UpdateRule("sgd")
    key = key or keys(0, 1)
    tiles = block_tiles(num_rows, layer, x_t.dtype)
    units = cdiv(stop - start, tiles.block_l)
    arguments = {
        "grad_ptr": grad,
        "x_t_ptr": x_t,
        **layer_arguments(layer, bias=False),
        "d_weight_ptr": d_weight,
        "wide_ptr": wide,
        "m_ptr": as_bytes(state.weight_m),
        "v_ptr": as_bytes(state.weight_v),
        "kept_ptr": state.grad_weight,
        **moment_arguments(state, room or Room(), key),
        **_sizes(x_t, layer, num_rows, start, stop),
        "run": tiles.walk * tiles.block_l,
        "stride_gb": grad.stride(0),
        "key": key["weight_key"],
        "decay": float(rule.weight_decay),
        **(numbers or constants(rule, 0.0, 1)),
    }
    values = _tile_constants(tiles, x_t, layer)
    values |= {"N_ROOM": power_of_2(values["N_KEEP"]), "RULE": rule.kind, "UPDATE": update}
    grid = cdiv(units, tiles.walk) * cdiv(x_t.shape[0], tiles.block_d)
    return Launch(_blocks_weight_kernel, grid, arguments, values, tiles.num_warps)


def _sizes(x_t: Tensor, layer: Layer, num_rows: int, start: int, stop: int) -> dict[str, int]:
    features, width = x_t.shape
    return {
        "start": start,
        "stop": stop,
        "num_rows": num_rows,
        "features": features,
        "width": width,
        "fan_in": layer.fan_in,
        "group": layer.group,
    }


def _tile_constants(tiles: BlockTiles, x_t: Tensor, layer: Layer) -> dict[str, Any]:
    """Those that all three kernels take."""
    return {
        "BLOCK_L": tiles.block_l,
        "BLOCK_D": tiles.block_d,
        "BLOCK_B": tiles.block_b,
        **dot_settings(x_t, layer.weight),
        **pattern_constants(layer),
    }


def backward(
    grad: Tensor,  # [B, L]
    x: Tensor,  # [B, D]
    layer: Layer,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # [B, D], [L, F]
    """Gradients of `fan_in_linear` in x and weight."""
    tiles = block_tiles(len(x), layer, x.dtype)
    x_t = feature_major(x, tiles.block_b)
    units = cdiv(layer.num_labels, tiles.block_l)
    parts = deterministic_programs(x_t, units) if deterministic else 0
    d_x_t = input_gradient_buffer(x_t, parts)
    d_weight = gradient_like(layer.weight)
    input_launch(grad, x_t, layer, d_x_t, len(x)).run()
    weight_launch(grad, x_t, layer, d_weight, len(x)).run()
    return batch_major(d_x_t, len(x), x.dtype), d_weight


def classifier_step(
    x: Tensor,  # [B, D]
    layer: Layer,
    positives: Positives,
    state: ClassifierState,
    objective: Objective,
    rule: UpdateRule,
    lr: float,
    step: int,
    seed: int,
    grad_scale: float,
    update: bool,
    row_offset: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's."""
    num_rows, num_labels, bias = len(x), layer.num_labels, layer.bias
    tiles = block_tiles(num_rows, layer, x.dtype)
    x_t = feature_major(x, tiles.block_b)
    num_tiles = x_t.shape[1] // tiles.block_b
    half = dot_settings(x, layer.weight)["DOT_DTYPE"] == tl.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    room_bytes = 4 * layer.fan_in * ((layer.scale is not None) + room_rows(state))
    label_bytes = num_rows * dtype.itemsize + room_bytes
    width = gradient_labels(num_labels, label_bytes, tiles.block_l)
    first = positives.first(torch.arange(0, num_labels, tiles.block_l, device=x.device))
    units = cdiv(width, tiles.block_l)
    parts = deterministic_programs(x_t, units) if deterministic else 0
    d_x_t = input_gradient_buffer(x_t, parts)
    numbers, key = constants(rule, lr, step), keys(seed, step, row_offset)
    scratch = torch.empty(num_rows * width, dtype=dtype, device=x.device)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, num_labels, width):
        stop = min(start + width, num_labels)
        units = cdiv(stop - start, tiles.block_l)
        grad = scratch[: num_rows * (stop - start)].view(num_rows, stop - start)
        d_bias = torch.empty(num_tiles, stop - start, device=x.device)
        losses = torch.empty_like(d_bias)
        pairs = (positives, first[start // tiles.block_l :][:units])
        common, wide = (num_rows, start, stop), wide_rows(layer, start, stop)
        room = make_room(state, stop - start, layer.fan_in)
        forward_launch(
            *(x_t, layer, grad, *common, *pairs, d_bias, losses, objective, grad_scale)
        ).run()
        total += losses.sum(dtype=torch.float64)
        input_launch(grad, x_t, layer, d_x_t, *common).run()
        weight_launch(
            *(grad, x_t, layer, None, *common, state, rule, numbers, key, update, wide, room)
        ).run()
        if update:
            round_weights(layer, wide, start, key)
            round_moments(state, room, start, key)
        if bias is not None:
            m, v, kept = (
                None if t is None else t[start:stop]
                for t in (state.bias_m, state.bias_v, state.grad_bias)
            )
            d_bias = d_bias.sum(0) if num_tiles > 1 else d_bias
            tensors = (d_bias.view(-1, 1), None, (bias[start:stop], m, v, kept))
            update_launch(*tensors, start, rule, numbers, key["bias_key"], 0.0, update).run()
    return total.to(torch.float32), batch_major(d_x_t, num_rows, x.dtype)
