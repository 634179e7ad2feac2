"""Argument checks of the operations: each error names the rule and the values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xmc_kernels import float8, quantized
from xmc_kernels.layer import Layer
from xmc_kernels.packing import BLOCKS, check_pattern, packed_bytes, pattern_fan_in, unpack_index

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.uint16, torch.int32)


def check_layer(x: Tensor, layer: Layer) -> None:
    """Shapes, dtypes and devices of a layer and its input; reads no values, so it can be traced."""
    weight, bias = layer.weight, layer.bias
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        scaled = name == "weight" and layer.scale is not None
        if tensor is not None and not scaled and tensor.dtype not in FLOATS:
            raise TypeError(
                f"expected {name} of float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"expected {name} on {x.device} like x, got {tensor.device}")
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"expected x [B, D] and weight [L, F], got {list(x.shape)} and {list(weight.shape)}"
        )
    num_labels, fan_in = layer.num_labels, layer.fan_in
    if num_labels == 0 or fan_in == 0:
        raise ValueError(
            f"expected at least one label and one input, got weight [{num_labels}, {fan_in}]"
        )
    if bias is not None and bias.shape != (num_labels,):
        raise ValueError(
            f"expected bias of shape [{num_labels}] to match weight, got {list(bias.shape)}"
        )
    if layer.scale is not None:
        _check_scale(x, weight, layer.scale)
    if layer.index is not None:
        _check_index(x, layer, layer.index)
        return
    if layer.pattern is not None:
        raise ValueError(f"expected an index for pattern {layer.pattern}, got None")
    if x.shape[1] != fan_in:
        raise ValueError(
            f"expected x with {fan_in} features to match the dense weight, got {x.shape[1]}"
        )


def check_floats(layer: Layer) -> None:
    """Raise TypeError for a layer of integers, which has no gradient."""
    if layer.quantized:
        raise TypeError(
            "expected weights of floats, as layers of int8 and int4 weights only predict "
            f"(fan_in_topk), got {layer.weight.dtype}"
        )


def _check_scale(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    if weight.dtype not in (float8.DTYPE, *quantized.DTYPES) or scale.dtype != torch.float32:
        raise TypeError(
            "expected weight of float8_e4m3fn, int8 or uint8 and scale of float32, "
            f"got {weight.dtype} and {scale.dtype}"
        )
    if scale.shape != (len(weight),) or scale.device != x.device:
        raise ValueError(
            f"expected scale of shape [{len(weight)}] on {x.device} to match weight, "
            f"got {list(scale.shape)} on {scale.device}"
        )


def _check_index(x: Tensor, layer: Layer, index: Tensor) -> None:
    num_labels, fan_in = layer.num_labels, layer.fan_in
    width = fan_in
    if layer.pattern is not None:
        check_pattern(layer.pattern, fan_in, x.shape[1])
        width = packed_bytes(fan_in, layer.pattern)
        if index.dtype != torch.uint8:
            raise TypeError(
                f"expected index of uint8 for pattern {layer.pattern}, got {index.dtype}"
            )
    elif index.dtype not in INDEX_DTYPES:
        raise TypeError(f"expected index of uint16 or int32, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"expected index on {x.device} like x, got {index.device}")
    if index.dim() != 2 or index.shape[1] != width or index.shape[0] == 0:
        raise ValueError(
            f"expected index of shape [{num_labels}, {width}] to match weight, "
            f"got {list(index.shape)}"
        )
    if num_labels % index.shape[0]:
        raise ValueError(
            f"expected a number of index rows that divides {num_labels} labels, "
            f"got {index.shape[0]}"
        )
    if fan_in > x.shape[1]:
        raise ValueError(f"expected fan-in of at most {x.shape[1]} features, got {fan_in}")


def compiled_on_cpu(x: Tensor, layer: Layer, *others: Tensor | None) -> bool:
    """Whether the CPU kernels take this: a sparse layer, but none of float8.

    x, weight (if it is of floats) and bias are float32 or bfloat16 each, all others float32.
    """
    floats = (x, layer.bias) if layer.quantized else (x, layer.weight, layer.bias)
    narrow = all(t is None or t.dtype in (torch.float32, torch.bfloat16) for t in floats)
    wide = all(t is None or t.dtype == torch.float32 for t in others)
    return narrow and wide and layer.index is not None


def compiled_on_cuda(x: Tensor, layer: Layer, *others: Tensor | None) -> bool:
    """Whether the Triton kernels take this: neither float64 nor the forms of compressed models."""
    if layer.quantized or (layer.pattern is not None and layer.pattern[1] not in BLOCKS):
        return False
    tensors = (x, layer.weight, layer.bias, *others)
    return all(t is None or t.dtype != torch.float64 for t in tensors)


def written_in_place(layer: Layer, *others: Tensor | None) -> bool:
    """Whether a compiled step can write into these: everything it updates is contiguous."""
    tensors = (layer.weight, layer.bias, layer.scale, *others)
    return all(t is None or t.is_contiguous() for t in tensors)


def check_finite(x: Tensor, name: str = "features") -> None:
    """Raise ValueError that names the first row of x [B, D] with a NaN or an infinity."""
    if x.device.type == "cpu" and x.dtype != torch.bfloat16:
        # On one thread: waking torch's pool for this costs more, and its idle threads spin.
        finite = bool(np.isfinite(x.detach().numpy()).all())
    else:
        finite = bool(torch.isfinite(x).all())
    if finite:
        return
    row = int((~torch.isfinite(x).all(1)).nonzero()[0])
    what = "NaN" if bool(torch.isnan(x[row]).any()) else "an infinity"
    raise ValueError(f"expected finite {name}, row {row} has {what}")


def check_rows(indptr: Tensor, indices: Tensor, num_rows: int, name: str = "labels") -> None:
    """Dtypes and shapes of CSR rows of labels: indptr [B+1] int64, indices [nnz] int32."""
    if indptr.dtype != torch.int64 or indices.dtype != torch.int32:
        raise TypeError(
            f"expected {name} as indptr int64 and indices int32, "
            f"got {indptr.dtype} and {indices.dtype}"
        )
    if indptr.shape != (num_rows + 1,) or indices.dim() != 1:
        raise ValueError(
            f"expected {name} with indptr of shape [{num_rows + 1}] and flat indices, "
            f"got {list(indptr.shape)} and {list(indices.shape)}"
        )


def check_rows_values(indptr: Tensor, indices: Tensor, name: str = "labels") -> None:
    """The values of CSR rows: indptr starts at 0, never falls and ends at the number of indices."""
    ends = (int(indptr[0]), int(indptr[-1]))
    if ends != (0, indices.shape[0]):
        raise ValueError(
            f"expected {name} with an indptr from 0 to {indices.shape[0]} (the number of indices), "
            f"got {ends[0]} to {ends[1]}"
        )
    if bool((indptr[1:] < indptr[:-1]).any()):
        raise ValueError(f"expected {name} with a non-decreasing indptr")


def check_label_range(indices: Tensor, num_labels: int) -> None:
    """Raise ValueError unless every label id lies in [0, num_labels)."""
    if indices.shape[0] == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= num_labels:
        raise ValueError(f"expected labels in [0, {num_labels}), got {low} to {high}")


def validate_index(
    index: Tensor,  # [L/G, F], or [L/G, P] uint8 with a pattern
    in_features: int,
    pattern: tuple[int, int] | None = None,
) -> None:
    """Raise unless each row of index is sorted, distinct and in [0, in_features).

    The operations rely on this and do not repeat it: call it where an index enters the program.
    """
    if pattern is None and index.dtype not in INDEX_DTYPES:
        raise TypeError(f"expected index of uint16 or int32, got {index.dtype}")
    if pattern is not None and index.dtype != torch.uint8:
        raise TypeError(f"expected index of uint8 for pattern {pattern}, got {index.dtype}")
    if index.dim() != 2 or 0 in index.shape:
        raise ValueError(f"expected a non-empty index of shape [L/G, F], got {list(index.shape)}")
    fan_in = index.shape[1]
    if pattern is not None:
        fan_in = pattern_fan_in(pattern, in_features)
        check_pattern(pattern, fan_in, in_features)
        if index.shape[1] != packed_bytes(fan_in, pattern):
            raise ValueError(
                f"expected rows of {packed_bytes(fan_in, pattern)} bytes for pattern {pattern} of "
                f"{in_features} features, got {index.shape[1]}"
            )
    if index.device.type == "cpu" and index.is_contiguous():
        from xmc_kernels._cpu.valid import index_is_valid

        if index_is_valid(index, in_features, pattern, fan_in):
            return
    # On another device, or to say which row it is.
    step = max(1, 2**22 // fan_in)
    for start in range(0, index.shape[0], step):
        rows = index[start : start + step]
        wide = rows.to(torch.int32) if pattern is None else unpack_index(rows, pattern, fan_in)
        low, high = (int(v) for v in torch.aminmax(wide))
        if low < 0 or high >= in_features:
            raise ValueError(f"expected index values in [0, {in_features}), got {low} to {high}")
        rising = (wide[:, 1:] > wide[:, :-1]).all(1)
        if not bool(rising.all()):
            row = start + int((~rising).nonzero()[0])
            raise ValueError(
                f"expected sorted, distinct values in each row of index, row {row} has not"
            )
