"""Fixed fan-in linear layer, forward and backward, on feature-major activations x_t [D, width].

Forward: one label per index row goes block of labels by block of labels, one fan-in slot at a
time; labels that share an index row gather F rows of x_t once and use tensor cores. Backward goes
unit by unit (`products.py`) and scatters d_x by atomics, or into private buffers added up in a
fixed order under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._reference.fan_in import gradient_like
from xmc_kernels._triton import blocks
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
from xmc_kernels._triton.products import (
    input_gradient,
    load_inputs,
    load_weight,
    scatter_add,
    scores,
    weight_gradient,
)
from xmc_kernels._triton.tiles import (
    block_tiles,
    deterministic_programs,
    layer_strategy,
    num_units,
    unit_tiles,
)
from xmc_kernels.layer import Layer


@triton.jit
def _fan_in_fwd_kernel(
    x_t_ptr,  # [D, width]
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, F], or packed
    bias_ptr,  # [L]
    out_ptr,  # [B, stride_ob]
    num_rows,
    width,
    num_labels,
    fan_in,
    group,
    stride_ob,
    BLOCK_L: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UNROLL: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    num_tiles = width // BLOCK_B
    offs_l = tl.program_id(0) // num_tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_b = tl.program_id(0) % num_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_l = offs_l < num_labels
    at_weight = offs_l.to(tl.int64) * fan_in
    row = (offs_l // group).to(tl.int64)
    total = tl.zeros((BLOCK_L, BLOCK_B), tl.float32)
    for start in range(0, fan_in, UNROLL):
        for step in tl.static_range(UNROLL):
            k = start + step
            mask = mask_l & (k < fan_in)
            weight = tl.load(weight_ptr + at_weight + k, mask=mask, other=0)
            if scale_ptr is not None:
                weight = decode(weight)
            weight = weight.to(tl.float32)
            column = load_columns(index_ptr, row, k, mask, fan_in, N_KEEP, M_BLOCK)
            x_row = x_t_ptr + column.to(tl.int64) * width
            x = tl.load(x_row[:, None] + offs_b[None, :], mask=mask[:, None], other=0.0)
            total += weight[:, None] * x.to(tl.float32)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + offs_l, mask=mask_l, other=0.0)[:, None]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + offs_b.to(tl.int64)[None, :] * stride_ob + offs_l[:, None]
    tl.store(out, total, mask=mask_l[:, None] & (offs_b < num_rows)[None, :])


@triton.jit
def _fan_in_shared_fwd_kernel(
    x_t_ptr,  # [D, width]
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, F], or packed
    bias_ptr,  # [L]
    out_ptr,  # [B, stride_ob]
    num_rows,
    width,
    num_labels,
    fan_in,
    group,
    stride_ob,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    num_tiles = width // BLOCK_B
    unit = tl.program_id(0) // num_tiles
    offs_b = tl.program_id(0) % num_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    parts = (group + BLOCK_G - 1) // BLOCK_G
    offs_g = unit % parts * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = offs_g < group
    row = (unit // parts).to(tl.int64)
    label = unit // parts * group + offs_g
    total = tl.zeros((BLOCK_G, BLOCK_B), tl.float32)
    for start in range(0, fan_in, BLOCK_F):
        _, _, x = load_inputs(
            x_t_ptr, index_ptr, row, start, width, offs_b, fan_in, BLOCK_F, N_KEEP, M_BLOCK
        )
        _, _, weight = load_weight(weight_ptr, scale_ptr, label, mask_g, start, fan_in, BLOCK_F)
        total += scores(weight, x, DOT_DTYPE, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + label, mask=mask_g, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + offs_b.to(tl.int64)[None, :] * stride_ob + label[:, None]
    tl.store(out, total, mask=mask_g[:, None] & (offs_b < num_rows)[None, :])


@triton.jit
def _fan_in_bwd_kernel(
    grad_ptr,  # [B, stride_gb]
    x_t_ptr,  # [D, width]
    weight_ptr,  # [L, F]
    scale_ptr,  # [L] of float8 weights, or None
    index_ptr,  # [L/G, F], or packed
    d_x_t_ptr,  # [D, width], or [programs, D, width] where deterministic
    d_weight_ptr,  # [L, F]
    num_rows,
    features,
    width,
    fan_in,
    group,
    units,
    walk,
    stride_gb,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    N_KEEP: tl.constexpr,
    M_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if DETERMINISTIC:
        d_x_t_ptr += program.to(tl.int64) * features * width
    parts = (group + BLOCK_G - 1) // BLOCK_G
    for unit in range(program * walk, min((program + 1) * walk, units)):
        offs_g = unit % parts * BLOCK_G + tl.arange(0, BLOCK_G)
        mask_g = offs_g < group
        row = (unit // parts).to(tl.int64)
        label = unit // parts * group + offs_g
        for start in range(0, fan_in, BLOCK_F):
            at, mask_w, weight = load_weight(
                weight_ptr, scale_ptr, label, mask_g, start, fan_in, BLOCK_F
            )
            d_weight = tl.zeros((BLOCK_G, BLOCK_F), tl.float32)
            for first in range(0, width, BLOCK_B):
                offs_b = first + tl.arange(0, BLOCK_B)
                rows, mask_x, x = load_inputs(
                    x_t_ptr, index_ptr, row, start, width, offs_b, fan_in, BLOCK_F, N_KEEP, M_BLOCK
                )
                at_grad = offs_b.to(tl.int64)[None, :] * stride_gb + label[:, None]
                mask = mask_g[:, None] & (offs_b < num_rows)[None, :]
                grad = tl.load(grad_ptr + at_grad, mask=mask, other=0.0).to(tl.float32)
                d_weight += weight_gradient(grad, x, DOT_DTYPE, PRECISION)
                d_x = input_gradient(grad, weight, DOT_DTYPE, PRECISION)
                scatter_add(d_x_t_ptr, rows, offs_b, mask_x, d_x, DETERMINISTIC)
            tl.store(d_weight_ptr + at, d_weight, mask=mask_w)


def forward_launch(x_t: Tensor, layer: Layer, out: Tensor, num_rows: int) -> Launch:
    """Scores of all labels into out [B, L] (rows may be strided)."""
    num_labels, group = layer.num_labels, layer.group
    tiles = unit_tiles(num_rows, layer, x_t.dtype)
    num_tiles = x_t.shape[1] // tiles.block_b
    arguments = {
        "x_t_ptr": x_t,
        **layer_arguments(layer),
        "out_ptr": out,
        "num_rows": num_rows,
        "width": x_t.shape[1],
        "num_labels": num_labels,
        "fan_in": layer.fan_in,
        "group": group,
        "stride_ob": out.stride(0),
    }
    if group < 8:
        block_l = min(32, power_of_2(num_labels))
        constants = {
            "BLOCK_L": block_l,
            "BLOCK_B": tiles.block_b,
            "UNROLL": 4,
            **pattern_constants(layer),
        }
        grid = cdiv(num_labels, block_l) * num_tiles
        return Launch(_fan_in_fwd_kernel, grid, arguments, constants)
    constants = {
        "BLOCK_G": tiles.block_g,
        "BLOCK_F": tiles.block_f,
        "BLOCK_B": tiles.block_b,
        **dot_settings(x_t, layer.weight),
        **pattern_constants(layer),
    }
    grid = num_units(num_labels, group, tiles.block_g) * num_tiles
    return Launch(_fan_in_shared_fwd_kernel, grid, arguments, constants, tiles.num_warps)


def backward_launch(
    grad: Tensor,
    x_t: Tensor,
    layer: Layer,
    d_x_t: Tensor,
    d_weight: Tensor,
    num_rows: int,
) -> Launch:
    """d_weight written, d_x_t [parts, D, width] added to; parts > 1 or 0 mean deterministic."""
    tiles = unit_tiles(num_rows, layer, x_t.dtype)
    units = num_units(layer.num_labels, layer.group, tiles.block_g)
    deterministic = d_x_t.dim() == 3
    walk = cdiv(units, len(d_x_t)) if deterministic else tiles.walk
    arguments = {
        "grad_ptr": grad,
        "x_t_ptr": x_t,
        **layer_arguments(layer, bias=False),
        "d_x_t_ptr": d_x_t,
        "d_weight_ptr": d_weight,
        "num_rows": num_rows,
        "features": x_t.shape[0],
        "width": x_t.shape[1],
        "fan_in": layer.fan_in,
        "group": layer.group,
        "units": units,
        "walk": walk,
        "stride_gb": grad.stride(0),
    }
    constants = {
        "BLOCK_G": tiles.block_g,
        "BLOCK_F": tiles.block_f,
        "BLOCK_B": tiles.block_b,
        **dot_settings(x_t, layer.weight),
        "DETERMINISTIC": deterministic,
        **pattern_constants(layer),
    }
    grid = cdiv(units, walk)
    return Launch(_fan_in_bwd_kernel, grid, arguments, constants, tiles.num_warps)


def scorer(x: Tensor, layer: Layer, by: str | None = None) -> Callable[[Layer, Tensor], None]:
    """`write(part, out)`: scores of a part of the layer (whole groups) into out [B, its labels].

    `by` is the strategy of `tiles.py` unless given.
    """
    in_blocks = (by or layer_strategy(layer)) == "blocks"
    tiles = (block_tiles if in_blocks else unit_tiles)(len(x), layer, x.dtype)
    x_t = feature_major(x, tiles.block_b)

    def write(part: Layer, out: Tensor) -> None:
        launch = blocks.forward_launch if in_blocks else forward_launch
        launch(x_t, part, out, len(x)).run()

    return write


def fan_in_linear(x: Tensor, layer: Layer, *, by: str | None = None) -> Tensor:
    """`x @ dense(layer).T + bias` [B, L], in x's dtype."""
    out = x.new_empty(x.shape[0], layer.num_labels)
    if x.shape[0] > 0:
        layer = layer.contiguous()
        scorer(x, layer, by)(layer, out)
    return out


def fan_in_linear_backward(
    grad: Tensor,  # [B, L]
    x: Tensor,  # [B, D]
    layer: Layer,
    deterministic: bool | None = None,
    *,
    by: str | None = None,
) -> tuple[Tensor, Tensor]:  # [B, D], [L, F]
    """Gradients in x and weight.

    `deterministic` is torch's setting and `by` the strategy of `tiles.py` unless given.
    """
    layer, grad = layer.contiguous(), grad.contiguous()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if x.shape[0] == 0:
        return torch.zeros_like(x), gradient_like(layer.weight).zero_()
    if (by or layer_strategy(layer)) == "blocks":
        return blocks.backward(grad, x, layer, deterministic)
    tiles = unit_tiles(x.shape[0], layer, x.dtype)
    units = num_units(layer.num_labels, layer.group, tiles.block_g)
    x_t = feature_major(x, tiles.block_b)
    parts = deterministic_programs(x_t, units) if deterministic else 0
    d_x_t = input_gradient_buffer(x_t, parts)
    d_weight = gradient_like(layer.weight)
    backward_launch(grad, x_t, layer, d_x_t, d_weight, x.shape[0]).run()
    return batch_major(d_x_t, x.shape[0], x.dtype), d_weight
