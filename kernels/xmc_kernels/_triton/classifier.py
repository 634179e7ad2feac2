"""The fused training step, unit by unit: one label, or a group that shares an index row.

A program walks over some units. For each it gathers the unit's F rows of x_t, computes scores,
the gradient of the loss, adds to d_x, and updates weights and bias in place; [B, L] scores and an
[L, F] gradient never exist. Where the whole batch fits one tile and F fits one block, the gathered
rows stay in registers for all three products. A wider batch goes tile by tile and keeps the unit's
weight gradient in a buffer of the program's own until the last tile.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._triton import blocks, densify
from xmc_kernels._triton.float8 import quantize_rows
from xmc_kernels._triton.launch import (
    Launch,
    batch_major,
    cdiv,
    dot_settings,
    feature_major,
    input_gradient_buffer,
)
from xmc_kernels._triton.layers import layer_arguments, pattern_constants
from xmc_kernels._triton.losses import Objective, loss_and_gradient
from xmc_kernels._triton.moments import (
    Room,
    as_bytes,
    is_narrow,
    make_room,
    moment_arguments,
)
from xmc_kernels._triton.positives import Positives, sort_by_label, targets
from xmc_kernels._triton.products import (
    input_gradient,
    load_inputs,
    load_weight,
    scatter_add,
    scores,
    weight_gradient,
)
from xmc_kernels._triton.tiles import deterministic_programs, num_units, strategy, unit_tiles
from xmc_kernels._triton.update import apply, constants, keys
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, UpdateRule

_MAX_PROGRAMS = 1024
"""Programs where each needs a buffer for its unit's weight gradient."""


@triton.jit
def _classifier_step_kernel(
    x_t_ptr,  # [D, width]
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, F], or packed
    bias_ptr,  # [L] or None
    positive_label_ptr,  # [nnz + 1] int32 rising, L at the end
    positive_row_ptr,  # [nnz + 1] int32
    first_positive_ptr,  # [programs] int64
    d_x_t_ptr,  # [D, width], or [programs, D, width] where deterministic
    loss_ptr,  # [programs]
    weight_m_ptr,
    weight_v_ptr,
    weight_kept_ptr,
    m_scale_ptr,  # [L] of float8 moments, or None
    v_scale_ptr,
    m_room_ptr,  # [programs, BLOCK_G, F] for new float8 moments, or None: in registers
    v_room_ptr,
    bias_m_ptr,
    bias_v_ptr,
    bias_kept_ptr,
    positive_weight_ptr,  # [L] or None
    unit_grad_ptr,  # [programs, BLOCK_G, F], unused in registers
    num_rows,
    features,
    width,
    fan_in,
    group,
    units,
    walk,
    grad_scale,
    smoothing,
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
    weight_key,
    bias_key,
    mean_key,
    root_key,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # F <= BLOCK_F
    IN_REGISTERS: tl.constexpr,  # width == BLOCK_B, and for float8 numbers F <= BLOCK_F too
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if DETERMINISTIC:
        d_x_t_ptr += program.to(tl.int64) * features * width
    own_room = program.to(tl.int64) * BLOCK_G * fan_in
    unit_grad_ptr += own_room
    if m_room_ptr is not None:
        m_room_ptr += own_room
    if v_room_ptr is not None:
        v_room_ptr += own_room
    averages = (momentum, beta1, one_minus_beta1, beta2, one_minus_beta2)
    scales = (eps, mean_scale, root_scale)
    weight_memory = (weight_m_ptr, weight_v_ptr, weight_kept_ptr)
    narrow = (m_scale_ptr, v_scale_ptr, m_room_ptr, v_room_ptr, mean_key, root_key)
    bias_memory = (bias_m_ptr, bias_v_ptr, bias_kept_ptr)
    parts = (group + BLOCK_G - 1) // BLOCK_G
    columns_of_bias = tl.zeros((BLOCK_G,), tl.int32)
    position = tl.load(first_positive_ptr + program)
    total = tl.zeros((BLOCK_B,), tl.float32)

    for unit in range(program * walk, min((program + 1) * walk, units)):
        offs_g = unit % parts * BLOCK_G + tl.arange(0, BLOCK_G)
        mask_g = offs_g < group
        row = (unit // parts).to(tl.int64)
        label = unit // parts * group + offs_g
        stop = unit // parts * group + min((unit % parts + 1) * BLOCK_G, group)
        bias = tl.zeros((BLOCK_G,), tl.float32)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + label, mask=mask_g, other=0.0).to(tl.float32)
        d_bias = tl.zeros((BLOCK_G,), tl.float32)
        first = position

        for start_b in range(0, width, BLOCK_B):
            offs_b = start_b + tl.arange(0, BLOCK_B)
            score = tl.zeros((BLOCK_G, BLOCK_B), tl.float32) + bias[:, None]
            if ONE_BLOCK:
                rows, mask_x, x = load_inputs(
                    x_t_ptr, index_ptr, row, 0, width, offs_b, fan_in, BLOCK_F, N_KEEP, M_BLOCK
                )
                at, mask_w, weight = load_weight(
                    weight_ptr, scale_ptr, label, mask_g, 0, fan_in, BLOCK_F
                )
                score += scores(weight, x, DOT_DTYPE, PRECISION)
            else:
                for start in range(0, fan_in, BLOCK_F):
                    _, _, x = load_inputs(
                        x_t_ptr,
                        index_ptr,
                        row,
                        start,
                        width,
                        offs_b,
                        fan_in,
                        BLOCK_F,
                        N_KEEP,
                        M_BLOCK,
                    )
                    _, _, weight = load_weight(
                        weight_ptr, scale_ptr, label, mask_g, start, fan_in, BLOCK_F
                    )
                    score += scores(weight, x, DOT_DTYPE, PRECISION)

            target, position = targets(
                positive_label_ptr, positive_row_ptr, first, stop, label, offs_b, BLOCK_G, BLOCK_B
            )
            value, grad = loss_and_gradient(
                score,
                target,
                positive_weight_ptr,
                label[:, None],
                mask_g[:, None],
                smoothing,
                LOSS,
                SMOOTH,
            )
            counts = mask_g[:, None] & (offs_b < num_rows)[None, :]
            total += tl.sum(tl.where(counts, value, 0.0), axis=0)
            grad = tl.where(counts, grad * grad_scale, 0.0)
            d_bias += tl.sum(grad, axis=1)

            for start in range(0, fan_in, BLOCK_F):
                if not ONE_BLOCK:
                    rows, mask_x, x = load_inputs(
                        x_t_ptr,
                        index_ptr,
                        row,
                        start,
                        width,
                        offs_b,
                        fan_in,
                        BLOCK_F,
                        N_KEEP,
                        M_BLOCK,
                    )
                    at, mask_w, weight = load_weight(
                        weight_ptr, scale_ptr, label, mask_g, start, fan_in, BLOCK_F
                    )
                d_x = input_gradient(grad, weight, DOT_DTYPE, PRECISION)
                scatter_add(d_x_t_ptr, rows, offs_b, mask_x, d_x, DETERMINISTIC)
                d_weight = weight_gradient(grad, x, DOT_DTYPE, PRECISION)
                offs_f = start + tl.arange(0, BLOCK_F)
                local = tl.arange(0, BLOCK_G)[:, None] * fan_in + offs_f[None, :]
                if IN_REGISTERS:
                    apply(
                        weight,
                        weight_ptr + at,
                        scale_ptr,
                        weight_memory,
                        narrow,
                        (at, local, mask_w, label[:, None], mask_g[:, None], offs_f[None, :]),
                        d_weight,
                        weight_key,
                        decay,
                        lr,
                        averages,
                        scales,
                        RULE,
                        UPDATE,
                    )
                else:
                    tl.debug_barrier()
                    if start_b > 0:
                        d_weight += tl.load(unit_grad_ptr + local, mask=mask_w, other=0.0)
                    tl.debug_barrier()
                    tl.store(unit_grad_ptr + local, d_weight, mask=mask_w)

        if not IN_REGISTERS:
            tl.debug_barrier()
            for start in range(0, fan_in, BLOCK_F):
                offs_f = start + tl.arange(0, BLOCK_F)
                at, mask_w, weight = load_weight(
                    weight_ptr, scale_ptr, label, mask_g, start, fan_in, BLOCK_F
                )
                local = tl.arange(0, BLOCK_G)[:, None] * fan_in + offs_f[None, :]
                d_weight = tl.load(unit_grad_ptr + local, mask=mask_w, other=0.0)
                out = weight_ptr + at if scale_ptr is None else unit_grad_ptr + local
                apply(
                    weight,
                    out,
                    None,
                    weight_memory,
                    narrow,
                    (at, local, mask_w, label[:, None], mask_g[:, None], offs_f[None, :]),
                    d_weight,
                    weight_key,
                    decay,
                    lr,
                    averages,
                    scales,
                    RULE,
                    UPDATE,
                )
            tl.debug_barrier()
            if UPDATE:
                at_room = tl.arange(0, BLOCK_G).to(tl.int64) * fan_in
                if scale_ptr is not None:
                    quantize_rows(
                        unit_grad_ptr,
                        at_room,
                        weight_ptr,
                        scale_ptr,
                        label,
                        mask_g,
                        fan_in,
                        weight_key,
                        BLOCK_G,
                        BLOCK_F,
                        True,
                    )
                if m_room_ptr is not None:
                    quantize_rows(
                        m_room_ptr,
                        at_room,
                        weight_m_ptr,
                        m_scale_ptr,
                        label,
                        mask_g,
                        fan_in,
                        mean_key,
                        BLOCK_G,
                        BLOCK_F,
                        True,
                    )
                if v_room_ptr is not None:
                    quantize_rows(
                        v_room_ptr,
                        at_room,
                        weight_v_ptr,
                        v_scale_ptr,
                        label,
                        mask_g,
                        fan_in,
                        root_key,
                        BLOCK_G,
                        BLOCK_F,
                        False,
                    )
                if scale_ptr is not None or m_room_ptr is not None:
                    tl.debug_barrier()
        if bias_ptr is not None:
            apply(
                bias,
                bias_ptr + label,
                None,
                bias_memory,
                (None, None, None, None, 0, 0),
                (label, label, mask_g, label, mask_g, columns_of_bias),
                d_bias,
                bias_key,
                0.0,
                lr,
                averages,
                scales,
                RULE,
                UPDATE,
            )
    tl.store(loss_ptr + program, tl.sum(total) * grad_scale)


def step_launch(
    x_t: Tensor,
    layer: Layer,
    positives: Positives,
    d_x_t: Tensor,
    state: ClassifierState,
    objective: Objective,
    rule: UpdateRule,
    lr: float,
    step: int,
    seed: int,
    grad_scale: float,
    update: bool,
    row_offset: int,
    num_rows: int,
) -> tuple[Launch, Tensor]:
    """The step over the whole layer, and the programs' parts of the loss."""
    features, width = x_t.shape
    fan_in, group = layer.fan_in, layer.group
    weighted = objective.positive_weight is not None
    tiles = unit_tiles(num_rows, layer, x_t.dtype, fused=True, weighted=weighted)
    units = num_units(layer.num_labels, group, tiles.block_g)
    one_tile = width == tiles.block_b
    one_block = fan_in <= tiles.block_f
    in_registers = one_tile and (one_block or (layer.scale is None and not is_narrow(state)))
    walk = tiles.walk if in_registers else max(tiles.walk, cdiv(units, _MAX_PROGRAMS))
    deterministic = d_x_t.dim() == 3
    if deterministic:
        walk = cdiv(units, len(d_x_t))
    programs = cdiv(units, walk)
    parts = cdiv(group, tiles.block_g)
    empty = torch.float32
    buffers = (1, 1, 1) if in_registers else (programs, tiles.block_g, fan_in)
    room = Room() if one_block else make_room(state, *buffers)
    loss_parts = torch.empty(programs, dtype=empty, device=x_t.device)
    starts = torch.arange(programs, device=x_t.device) * walk
    arguments = {
        "x_t_ptr": x_t,
        **layer_arguments(layer),
        "positive_label_ptr": positives.labels,
        "positive_row_ptr": positives.rows,
        "first_positive_ptr": positives.first(
            starts // parts * group + starts % parts * tiles.block_g
        ),
        "d_x_t_ptr": d_x_t,
        "loss_ptr": loss_parts,
        "weight_m_ptr": as_bytes(state.weight_m),
        "weight_v_ptr": as_bytes(state.weight_v),
        "weight_kept_ptr": state.grad_weight,
        "bias_m_ptr": state.bias_m,
        "bias_v_ptr": state.bias_v,
        "bias_kept_ptr": state.grad_bias,
        **objective.arguments(),
        "unit_grad_ptr": torch.empty(buffers, dtype=empty, device=x_t.device),
        "num_rows": num_rows,
        "features": features,
        "width": width,
        "fan_in": fan_in,
        "group": group,
        "units": units,
        "walk": walk,
        "grad_scale": float(grad_scale),
        "decay": float(rule.weight_decay),
        **constants(rule, lr, step),
        **keys(seed, step, row_offset),
        **moment_arguments(state, room, keys(seed, step, row_offset)),
    }
    values = {
        "BLOCK_G": tiles.block_g,
        "BLOCK_F": tiles.block_f,
        "BLOCK_B": tiles.block_b,
        "ONE_BLOCK": one_block,
        "IN_REGISTERS": in_registers,
        **dot_settings(x_t, layer.weight),
        "DETERMINISTIC": deterministic,
        **objective.constants(),
        "RULE": rule.kind,
        "UPDATE": update,
        **pattern_constants(layer),
    }
    launch = Launch(_classifier_step_kernel, programs, arguments, values, tiles.num_warps)
    return launch, loss_parts


def classifier_step(
    x: Tensor,  # [B, D] float32, bfloat16 or float16
    layer: Layer,
    indptr: Tensor,  # [B+1]
    indices: Tensor,  # [nnz]
    state: ClassifierState,
    loss: str,
    rule: UpdateRule,
    lr: float,
    step: int,
    grad_scale: float,
    update: bool,
    seed: int = 0,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,  # [L]
    row_offset: int = 0,
    *,
    deterministic: bool | None = None,
    by: str | None = None,
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's.

    `deterministic` is torch's setting and `by` the strategy of `tiles.py` unless given.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    layer = replace(layer, index=None if layer.index is None else layer.index.contiguous())
    positives = sort_by_label(indptr, indices, layer.num_labels)
    if positive_weight is not None:
        positive_weight = positive_weight.float().contiguous()
    objective = Objective(loss, smoothing, positive_weight)
    numbers = (objective, rule, lr, step, seed, grad_scale, update, row_offset)
    by = "densify" if layer.index is None else by or strategy(x, layer, deterministic)
    if by == "blocks":
        return blocks.classifier_step(x, layer, positives, state, *numbers, deterministic)
    if by == "densify":
        return densify.classifier_step(x, layer, positives, state, *numbers)
    weighted = positive_weight is not None
    tiles = unit_tiles(x.shape[0], layer, x.dtype, fused=True, weighted=weighted)
    units = num_units(layer.num_labels, layer.group, tiles.block_g)
    x_t = feature_major(x, tiles.block_b)
    parts = deterministic_programs(x_t, units) if deterministic else 0
    d_x_t = input_gradient_buffer(x_t, parts)
    launch, loss_parts = step_launch(x_t, layer, positives, d_x_t, state, *numbers, x.shape[0])
    launch.run()
    value = loss_parts.sum(dtype=torch.float64).to(torch.float32)
    return value, batch_major(d_x_t, x.shape[0], x.dtype)
