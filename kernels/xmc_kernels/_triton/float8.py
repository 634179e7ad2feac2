"""float8 numbers (e4m3 under a scale per label) in registers: `float8.py`'s numbers, bit for bit.

Codes travel as bytes and are decoded by integers, because sm_80 has no e4m3. Experimental.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._triton.launch import Launch, cdiv, power_of_2
from xmc_kernels._triton.noise import noise

_ROWS = 16
_BLOCK = 128


@triton.jit
def decode(code):
    """The float32 behind e4m3 codes (uint8): their bits, moved and given float32's exponents."""
    bits = code.to(tl.int32)
    raw = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
    return raw.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def row_scale(largest):
    """The smallest power of two under which `largest` >= 0 stays within 448 = 1.75 * 2^8."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return (tl.maximum(exponent, 27) << 23).to(tl.float32, bitcast=True)  # at least 2^-100


@triton.jit
def encode(value, scale, bits, VANISH: tl.constexpr):
    """`value / scale` (float32, scale a power of two) as codes, rounded by the high 20 of bits.

    Without VANISH nothing but zero becomes zero.
    """
    inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    raw = (value * inverse * 7.52316384526264e-37).to(tl.int32, bitcast=True)  # 2^-120
    raised = (raw & 0x7FFFFFFF) + (bits >> 12).to(tl.int32)
    size = raised >> 20
    if not VANISH:
        size = tl.maximum(size, (value != 0).to(tl.int32))
    return (size | ((raw >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_rows(
    out,  # pointers to the codes of whole rows [G, F]
    scale_ptr,  # [L]
    value,  # float32
    mask,
    rows,  # [G, 1]
    mask_rows,
    columns,  # [1, F]
    key,
    VANISH: tl.constexpr,
):
    """Write the scales and codes of rows that a program holds."""
    value = tl.where(mask, value, 0.0)
    scale = row_scale(tl.max(tl.abs(value), axis=1, keep_dims=True))
    tl.store(scale_ptr + rows, scale, mask=mask_rows)
    tl.store(out, encode(value, scale, noise(key, rows, columns), VANISH), mask=mask)


@triton.jit
def quantize_rows(
    value_ptr,
    at_value,  # [G] int64, where the labels' rows of F float32 begin
    weight_ptr,  # [L, F] uint8
    scale_ptr,  # [L]
    label,  # [G]
    mask_g,
    fan_in,
    key,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
    VANISH: tl.constexpr,
):
    """Write the scales and codes of labels, of any fan-in: once for the largest, once to round."""
    largest = tl.zeros((BLOCK_G, BLOCK_F), tl.float32)
    for start in range(0, fan_in, BLOCK_F):
        offs_f = (start + tl.arange(0, BLOCK_F))[None, :]
        mask = mask_g[:, None] & (offs_f < fan_in)
        value = tl.load(value_ptr + at_value[:, None] + offs_f, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.abs(value))
    scale = row_scale(tl.max(largest, axis=1))
    tl.store(scale_ptr + label, scale, mask=mask_g)
    at = label.to(tl.int64)[:, None] * fan_in
    for start in range(0, fan_in, BLOCK_F):
        offs_f = (start + tl.arange(0, BLOCK_F))[None, :]
        mask = mask_g[:, None] & (offs_f < fan_in)
        value = tl.load(value_ptr + at_value[:, None] + offs_f, mask=mask, other=0.0)
        code = encode(value, scale[:, None], noise(key, label[:, None], offs_f), VANISH)
        tl.store(weight_ptr + at + offs_f, code, mask=mask)


@triton.jit
def _quantize_kernel(
    value_ptr,  # [stop - start, F] float32
    weight_ptr,  # [L, F] uint8
    scale_ptr,  # [L]
    start,
    stop,
    fan_in,
    key,
    BLOCK_G: tl.constexpr,
    BLOCK_F: tl.constexpr,
    VANISH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    label = start + row
    at_value = row.to(tl.int64) * fan_in
    quantize_rows(
        value_ptr,
        at_value,
        weight_ptr,
        scale_ptr,
        label,
        label < stop,
        fan_in,
        key,
        BLOCK_G,
        BLOCK_F,
        VANISH,
    )


def quantize_launch(
    value: Tensor, weight: Tensor, scale: Tensor, start: int, key: int, *, vanish: bool = True
) -> Launch:
    """Labels from `start` on of weight [L, F] uint8 and scale [L], from value [C, F] float32."""
    arguments = {
        "value_ptr": value,
        "weight_ptr": weight,
        "scale_ptr": scale,
        "start": start,
        "stop": start + len(value),
        "fan_in": value.shape[1],
        "key": key,
    }
    constants = {"BLOCK_G": _ROWS, "BLOCK_F": min(_BLOCK, power_of_2(value.shape[1]))}
    constants["VANISH"] = vanish
    return Launch(_quantize_kernel, cdiv(len(value), _ROWS), arguments, constants)
