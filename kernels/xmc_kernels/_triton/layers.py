"""How kernels are handed a layer: its tensors, its pattern as constants, some of its labels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels.layer import Layer


@triton.jit
def load_columns(index_ptr, row, slot, mask, fan_in, N_KEEP: tl.constexpr, M_BLOCK: tl.constexpr):
    """The inputs (int32) that slots of index rows name; row is int64 and broadcasts with slot.

    N_KEEP of every M_BLOCK inputs, rows packed as in `packing.py`; M_BLOCK = 0: stored as they are.
    """
    if M_BLOCK == 0:
        return tl.load(index_ptr + row * fan_in + slot, mask=mask, other=0).to(tl.int32)
    else:
        BITS: tl.constexpr = 2 + (M_BLOCK > 4) + (M_BLOCK > 8) + (M_BLOCK > 16)
        row_bytes = (fan_in * BITS + 7) // 8
        at = slot * BITS // 8
        shift = slot * BITS % 8
        first = index_ptr + row * row_bytes + at
        word = tl.load(first, mask=mask, other=0).to(tl.int32)
        if 8 % BITS != 0:
            # Slots of 3 or 5 bits may end in the next byte; behind the last there is none to read.
            word |= tl.load(first + 1, mask=mask & (at + 1 < row_bytes), other=0).to(tl.int32) << 8
        return slot // N_KEEP * M_BLOCK + ((word >> shift) & (M_BLOCK - 1))


def layer_arguments(layer: Layer, *, bias: bool = True) -> dict[str, Tensor | None]:
    """The pointers of a kernel on a sparse layer; bytes stand for float8 weights."""
    weight = layer.weight if layer.scale is None else layer.weight.view(torch.uint8)
    return {
        "weight_ptr": weight,
        "scale_ptr": layer.scale,
        "index_ptr": layer.index,
        **({"bias_ptr": layer.bias} if bias else {}),
    }


def pattern_constants(layer: Layer) -> dict[str, Any]:
    """N_KEEP and M_BLOCK of `load_columns`."""
    n, m = layer.pattern or (0, 0)
    return {"N_KEEP": n, "M_BLOCK": m}


def label_range(layer: Layer, start: int, stop: int) -> Layer:
    """Labels start..stop, whole groups, as a layer."""

    def part(tensor: Tensor | None, unit: int = 1) -> Tensor | None:
        return None if tensor is None else tensor[start // unit : stop // unit]

    return Layer(
        layer.weight[start:stop],
        part(layer.index, layer.group),
        part(layer.bias),
        layer.pattern,
        part(layer.scale),
    )
