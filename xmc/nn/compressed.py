"""Layers stored for prediction: narrow weights, packed indices. They cannot be trained any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xmc.nn.fan_in import FixedFanInLinear
from xmc_kernels import quantized
from xmc_kernels.packing import one_block, pack_index, packed_bytes

WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": quantized.INT8,
    "int4": quantized.INT4,
}
_TILE = 2**16  # index rows packed at a time


@dataclass(frozen=True)
class Storage:
    """How the classifier of an exported model is stored.

    int8 and int4 weights have a float32 scale per label. Packed indices take ceil(log2 D) bits;
    those of N:M patterns are packed anyhow, and from D = 32,769 up they stay as they are.
    """

    weight_dtype: WeightDtype = "float32"
    packed: bool = False

    def __post_init__(self) -> None:
        if self.weight_dtype not in _DTYPES:
            raise ValueError(
                f"expected weight_dtype of {', '.join(_DTYPES)}, got {self.weight_dtype!r}"
            )


@torch.no_grad()
def compress_(module: nn.Module, storage: Storage) -> None:
    """Store every fixed fan-in layer of a module this way, in place; meta tensors stay meta.

    Dense layers take bfloat16 for any dtype but float32: their labels are few or the model is not
    meant to be small.
    """
    for layer in module.modules():
        if isinstance(layer, FixedFanInLinear):
            _compress_layer_(layer, storage)
        elif isinstance(layer, nn.Linear):
            dtype = torch.float32 if storage.weight_dtype == "float32" else torch.bfloat16
            layer.weight = _frozen(layer.weight.to(dtype))


def _compress_layer_(layer: FixedFanInLinear, storage: Storage) -> None:
    dtype = _DTYPES[storage.weight_dtype]
    if layer.weight.is_meta:
        columns = -(-layer.fan_in // 2) if dtype == quantized.INT4 else layer.fan_in
        weight = layer.weight.new_empty(layer.out_features, columns, dtype=dtype)
        scale = layer.weight.new_empty(layer.out_features, dtype=torch.float32)
    else:
        numbers = layer.matrix.numbers().float()
        if dtype in quantized.DTYPES:
            weight, scale = quantized.quantize(numbers, dtype)
        else:
            weight, scale = numbers.to(dtype), numbers
    layer.weight = _frozen(weight)
    layer.weight_scale = scale if dtype in quantized.DTYPES else None
    pattern = one_block(layer.fan_in, layer.in_features)
    if storage.packed and layer.pattern is None and pattern is not None:
        layer.index_bytes = _packed(layer.index, layer.fan_in, pattern)
        layer.pattern = pattern


def _packed(index: Tensor, fan_in: int, pattern: tuple[int, int]) -> Tensor:  # [L/G, P] uint8
    packed = torch.empty(
        len(index), packed_bytes(fan_in, pattern), dtype=torch.uint8, device=index.device
    )
    if not index.is_meta:
        for rows, into in zip(index.split(_TILE), packed.split(_TILE), strict=True):
            into.copy_(pack_index(rows.int(), pattern))
    return packed


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
