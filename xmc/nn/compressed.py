"""Layers stored for prediction: narrow weights, packed indices. They cannot be trained any more.

Numbers are spelt out where they are used, a few at a time; no decompressed copy exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.nn.encoder import BagEncoder
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import Bag
from xmc_kernels import quantized
from xmc_kernels.layer import stored_numbers
from xmc_kernels.packing import one_block, pack_index

WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": quantized.INT8,
    "int4": quantized.INT4,
}


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

    Raises ValueError for int4 weights of an N:M pattern with an odd fan-in: their bytes do not
    tell it from the next.
    """
    for layer in module.modules():
        if isinstance(layer, FixedFanInLinear):
            _compress_layer_(layer, storage)
        elif isinstance(layer, nn.Linear):
            dtype = torch.float32 if storage.weight_dtype == "float32" else torch.bfloat16
            layer.weight = _frozen(layer.weight.to(dtype))


class CompressedBagEncoder(nn.Module):
    """`xmc.nn.encoder.BagEncoder` for prediction, whose table is stored like a classifier's rows.

    Spells out the vectors of the features that a batch has.
    """

    table: Tensor  # [V, D], or [V, ceil(D / 2)] of int4
    scale: Tensor | None  # [V] float32, of int8 and int4

    def __init__(self, encoder: BagEncoder, storage: Storage) -> None:
        super().__init__()
        self.out_features = encoder.out_features
        table, scale = _stored(encoder.table.weight.detach(), storage)
        self.register_buffer("table", table)
        self.register_buffer("scale", scale)
        self.bias = _frozen(encoder.bias.detach())

    @property
    def num_features(self) -> int:
        return self.table.shape[0]

    def forward(self, bag: Bag) -> Tensor:  # [B, D]
        present, ids = bag.ids.unique(return_inverse=True)
        scale = None if self.scale is None else self.scale[present]
        vectors = stored_numbers(self.table[present], scale, self.out_features).float()
        total = F.embedding_bag(
            ids,
            vectors,
            bag.offsets,
            mode="sum",
            per_sample_weights=bag.weights.to(vectors.dtype),
            include_last_offset=True,
        )
        return F.relu(total + self.bias)

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, out_features={self.out_features}, "
            f"dtype={self.table.dtype}"
        )


def _compress_layer_(layer: FixedFanInLinear, storage: Storage) -> None:
    if storage.weight_dtype == "int4" and layer.pattern is not None and layer.fan_in % 2:
        raise ValueError(
            f"expected an even fan-in for int4 weights of pattern {layer.pattern}, "
            f"got {layer.fan_in}"
        )
    weight, layer.weight_scale = _stored(layer.matrix.numbers(), storage)
    layer.weight = _frozen(weight)
    pattern = one_block(layer.fan_in, layer.in_features)
    if storage.packed and layer.pattern is None and pattern is not None:
        layer.index_bytes = pack_index(layer.index, pattern)
        layer.pattern = pattern


def _stored(numbers: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """Rows [R, F] in the dtype that is wanted, and their scales [R] where it needs such."""
    dtype, (rows, columns) = _DTYPES[storage.weight_dtype], numbers.shape
    if dtype not in quantized.DTYPES:
        return numbers.to(dtype), None
    if not numbers.is_meta:
        return quantized.quantize(numbers, dtype)
    width = -(-columns // 2) if dtype == quantized.INT4 else columns
    return numbers.new_empty(rows, width, dtype=dtype), numbers.new_empty(rows).float()


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
