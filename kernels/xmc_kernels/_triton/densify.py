"""The training step by torch's matrix products, on one dense block of labels after another.

For one label per index row on matrix units: a block of labels is scattered into a dense [C, D]
scratch, and scores, d_x and the dense weight gradient are library products; small kernels turn
scores into gradients and update the weights that exist. Also the step of a dense layer, which
needs no scratch for its weights. [B, L] never exists; the blocks hold `tiles.SCRATCH_BYTES`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._reference.fan_in import tile_weight
from xmc_kernels._triton.float8 import decode, quantize_launch
from xmc_kernels._triton.launch import Launch, bfloat16_product, cdiv
from xmc_kernels._triton.layers import layer_arguments, load_columns, pattern_constants
from xmc_kernels._triton.losses import Objective, loss_and_gradient
from xmc_kernels._triton.moments import (
    Room,
    as_bytes,
    make_room,
    moment_arguments,
    round_moments,
)
from xmc_kernels._triton.positives import Positives
from xmc_kernels._triton.tiles import dense_labels
from xmc_kernels._triton.update import apply, constants, keys
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, UpdateRule

_BLOCK = 1024
_BLOCK_C = 64
_BLOCK_B = 32


@triton.jit
def _scatter_kernel(
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, F], or packed
    dense_ptr,  # [C, D], zeros
    start,
    size,  # C * F
    features,
    fan_in,
    group,
    BLOCK: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    label, slot = offs // fan_in, offs % fan_in
    row = ((start + label) // group).to(tl.int64)
    column = load_columns(index_ptr, row, slot, mask, fan_in, N_KEEP, M_BLOCK)
    at = (start + label).to(tl.int64) * fan_in + slot
    weight = tl.load(weight_ptr + at, mask=mask, other=0)
    if scale_ptr is not None:
        weight = decode(weight) * tl.load(scale_ptr + start + label, mask=mask, other=0.0)
    weight = weight.to(tl.float32)
    tl.store(dense_ptr + label.to(tl.int64) * features + column, weight, mask=mask)


@triton.jit
def _gradient_kernel(
    scores_ptr,  # [B, C]
    bias_ptr,  # [C] or None
    target_ptr,  # [B, C] uint8
    grad_ptr,  # [B, C]
    d_bias_ptr,  # [C]
    loss_ptr,  # [programs]
    positive_weight_ptr,  # [C] or None
    num_rows,
    num_labels,  # C
    grad_scale,
    smoothing,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_labels
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    d_bias = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, num_rows, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        offs = offs_b.to(tl.int64)[:, None] * num_labels + offs_c[None, :]
        mask = (offs_b < num_rows)[:, None] & mask_c[None, :]
        score = tl.load(scores_ptr + offs, mask=mask, other=0.0) + bias[None, :]
        target = tl.load(target_ptr + offs, mask=mask, other=0).to(tl.float32)
        value, grad = loss_and_gradient(
            score,
            target,
            positive_weight_ptr,
            offs_c[None, :],
            mask_c[None, :],
            smoothing,
            LOSS,
            SMOOTH,
        )
        grad = tl.where(mask, grad * grad_scale, 0.0)
        tl.store(grad_ptr + offs, grad, mask=mask)
        d_bias += tl.sum(grad, axis=0)
        total += tl.sum(tl.where(mask, value, 0.0), axis=0)
    tl.store(d_bias_ptr + offs_c, d_bias, mask=mask_c)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(total) * grad_scale)


@triton.jit
def _update_kernel(
    d_dense_ptr,  # [C, D]
    index_ptr,  # [L/G, F] or packed, or None: entry k is column k
    param_ptr,  # [C, F]
    scale_ptr,  # [C] of float8 parameters, or None
    out_ptr,  # [C, F]: param_ptr, or float32
    m_ptr,
    v_ptr,
    kept_ptr,
    m_scale_ptr,  # [L] of float8 moments, or None
    v_scale_ptr,
    m_room_ptr,  # [C, F] float32 for new float8 moments
    v_room_ptr,
    start,
    size,  # C * F
    features,
    fan_in,
    group,
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
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    label, slot = offs // fan_in, offs % fan_in
    column = slot
    if index_ptr is not None:
        row = ((start + label) // group).to(tl.int64)
        column = load_columns(index_ptr, row, slot, mask, fan_in, N_KEEP, M_BLOCK)
    at = label.to(tl.int64) * features + column
    grad = tl.load(d_dense_ptr + at, mask=mask, other=0.0).to(tl.float32)
    param = tl.load(param_ptr + offs, mask=mask, other=0)
    if scale_ptr is not None:
        param = decode(param) * tl.load(scale_ptr + label, mask=mask, other=0.0)
    averages = (momentum, beta1, one_minus_beta1, beta2, one_minus_beta2)
    scales = (eps, mean_scale, root_scale)
    memory = (m_ptr, v_ptr, kept_ptr)
    narrow = (m_scale_ptr, v_scale_ptr, m_room_ptr, v_room_ptr, mean_key, root_key)
    apply(
        param,
        out_ptr + offs,
        None,
        memory,
        narrow,
        (offs, offs, mask, start + label, mask, slot),
        grad,
        key,
        decay,
        lr,
        averages,
        scales,
        RULE,
        UPDATE,
    )


def scatter_launch(layer: Layer, start: int, stop: int, dense: Tensor) -> Launch:
    """Labels start..stop into zeros [C, D]."""
    size = (stop - start) * layer.fan_in
    arguments = {
        **layer_arguments(layer, bias=False),
        "dense_ptr": dense,
        "start": start,
        "size": size,
        "features": dense.shape[1],
        "fan_in": layer.fan_in,
        "group": layer.group,
    }
    values = {"BLOCK": _BLOCK, **pattern_constants(layer)}
    return Launch(_scatter_kernel, cdiv(size, _BLOCK), arguments, values)


def gradient_launch(
    scores: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad: Tensor,
    d_bias: Tensor,
    loss_parts: Tensor,
    objective: Objective,
    grad_scale: float,
    start: int = 0,
) -> Launch:
    """Loss gradient of a block [B, C], its sum over rows and the programs' parts of the loss.

    The block's labels begin at `start`.
    """
    arguments = {
        "scores_ptr": scores,
        "bias_ptr": bias,
        "target_ptr": target,
        "grad_ptr": grad,
        "d_bias_ptr": d_bias,
        "loss_ptr": loss_parts,
        **objective.arguments(start),
        "num_rows": scores.shape[0],
        "num_labels": scores.shape[1],
        "grad_scale": float(grad_scale),
    }
    values = {"BLOCK_B": _BLOCK_B, "BLOCK_C": _BLOCK_C, **objective.constants()}
    return Launch(_gradient_kernel, cdiv(scores.shape[1], _BLOCK_C), arguments, values)


def update_launch(
    d_dense: Tensor,  # [C, D], or [C, F] without a layer
    layer: Layer | None,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],  # param, m, v, kept [C, F]
    start: int,
    rule: UpdateRule,
    numbers: dict[str, float],
    key: int,
    decay: float,
    update: bool,
    scale: Tensor | None = None,  # [C]
    out: Tensor | None = None,  # [C, F] float32
    narrow: dict[str, Any] | None = None,
) -> Launch:
    """Parameters of labels from `start` on by the entries of their dense gradient.

    New float8 numbers are left in float32: parameters in `out`, moments in the room of `narrow`
    (`moment_arguments`).
    """
    param, m, v, kept = tensors
    param = param if scale is None else param.view(torch.uint8)
    arguments = {
        "d_dense_ptr": d_dense,
        "index_ptr": None if layer is None else layer.index,
        "param_ptr": param,
        "scale_ptr": scale,
        "out_ptr": param if out is None else out,
        "m_ptr": as_bytes(m),
        "v_ptr": as_bytes(v),
        "kept_ptr": kept,
        **(narrow or moment_arguments(ClassifierState(), Room(), keys(0, 1))),
        "start": start,
        "size": param.numel(),
        "features": d_dense.shape[1],
        "fan_in": param.numel() // len(param),
        "group": 1 if layer is None else layer.group,
        "key": key,
        "decay": float(decay),
        **numbers,
    }
    values = {"BLOCK": _BLOCK, "RULE": rule.kind, "UPDATE": update}
    values |= {"N_KEEP": 0, "M_BLOCK": 0} if layer is None else pattern_constants(layer)
    return Launch(_update_kernel, cdiv(param.numel(), _BLOCK), arguments, values)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32; bfloat16 operands are accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def dense_block(layer: Layer, start: int, stop: int, features: int, dtype: torch.dtype) -> Tensor:
    """Labels start..stop as a dense [C, D] block."""
    if layer.index is None:
        return tile_weight(layer, start, stop, dtype)
    dense = torch.zeros(stop - start, features, dtype=dtype, device=layer.weight.device)
    scatter_launch(layer, start, stop, dense).run()
    return dense


def wide_rows(layer: Layer, start: int, stop: int) -> Tensor | None:
    """Room for the new float32 weights of labels, where they are float8: rounded row by row."""
    if layer.scale is None:
        return None
    return torch.empty(stop - start, layer.fan_in, device=layer.weight.device)


def round_weights(layer: Layer, wide: Tensor | None, start: int, keys: dict[str, int]) -> None:
    """float8 weights of labels from `start` on from the room of `wide_rows`."""
    if wide is not None and layer.scale is not None:
        codes = layer.weight.view(torch.uint8)
        quantize_launch(wide, codes, layer.scale, start, keys["weight_key"]).run()


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """bfloat16 where it holds both and a GPU multiplies them, float32 otherwise."""
    return torch.bfloat16 if bfloat16_product(x, weight) and x.is_cuda else torch.float32


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
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's."""
    num_labels, bias = layer.num_labels, layer.bias
    dtype = product_dtype(x, layer.weight)
    wide = x.to(dtype)
    width = dense_labels(x, num_labels)
    starts = torch.arange(0, num_labels, width, device=x.device)
    ends = [*positives.first(starts).tolist(), len(positives.labels) - 1]
    numbers, key = constants(rule, lr, step), keys(seed, step, row_offset)
    d_x = torch.zeros(x.shape, device=x.device)
    parts = []
    for number, start in enumerate(range(0, num_labels, width)):
        stop = min(start + width, num_labels)

        def part(tensor: Tensor | None, first: int = start, last: int = stop) -> Tensor | None:
            return None if tensor is None else tensor[first:last]

        dense = dense_block(layer, start, stop, x.shape[1], dtype)
        target = torch.zeros(len(x), stop - start, dtype=torch.uint8, device=x.device)
        pairs = slice(ends[number], ends[number + 1])
        target[positives.rows[pairs].long(), positives.labels[pairs].long() - start] = 1
        scores = product(wide, dense.T)
        grad = torch.empty_like(scores, dtype=dtype)
        d_bias = scores.new_empty(stop - start, 1)
        parts.append(scores.new_empty(cdiv(stop - start, _BLOCK_C)))
        block = (scores, part(bias), target, grad, d_bias, parts[-1])
        gradient_launch(*block, objective, grad_scale, start).run()
        d_x += product(grad, dense)
        d_dense = product(grad.T, wide)
        memory = (part(state.weight_m), part(state.weight_v), part(state.grad_weight))
        common = (start, rule, numbers)
        scale, out = part(layer.scale), wide_rows(layer, start, stop)
        room = make_room(state, stop - start, layer.fan_in)
        update_launch(
            *(d_dense, layer, (layer.weight[start:stop], *memory), *common),
            *(key["weight_key"], rule.weight_decay, update, scale, out),
            moment_arguments(state, room, key),
        ).run()
        if update:
            round_weights(layer, out, start, key)
            round_moments(state, room, start, key)
        if bias is not None:
            memory = (part(state.bias_m), part(state.bias_v), part(state.grad_bias))
            tensors = (bias[start:stop], *memory)
            update_launch(d_bias, None, tensors, *common, key["bias_key"], 0.0, update).run()
    return torch.cat(parts).sum(dtype=torch.float64).float(), d_x.to(x.dtype)
