"""Fixed fan-in linear layer in plain torch: build a dense tile of labels, multiply."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xmc_kernels.layer import Layer, stored_numbers
from xmc_kernels.packing import unpack_index


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any argument is, float32 otherwise."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def label_tiles(num_labels: int, num_rows: int, in_features: int) -> Iterator[tuple[int, int]]:
    """Ranges of labels so small that [B, tile] and [tile, D] hold at most 2^20 numbers."""
    width = max(1, 2**20 // max(num_rows, in_features))
    for start in range(0, num_labels, width):
        yield start, min(start + width, num_labels)


def tile_index(layer: Layer, start: int, stop: int) -> Tensor:
    """The index rows of labels start..stop, [stop - start, F] int64."""
    assert layer.index is not None
    group = layer.group
    rows = layer.index[start // group : (stop - 1) // group + 1]
    if layer.pattern is not None:
        rows = unpack_index(rows, layer.pattern, layer.fan_in)
    labels = torch.arange(start, stop, device=rows.device)
    return rows.long()[labels // group - start // group]


def tile_weight(layer: Layer, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The weights of labels start..stop as numbers, [stop - start, F]."""
    scale = None if layer.scale is None else layer.scale[start:stop]
    return stored_numbers(layer.weight[start:stop], scale, layer.fan_in, dtype).to(dtype)


def dense_tile(
    layer: Layer, start: int, stop: int, in_features: int, dtype: torch.dtype
) -> Tensor:  # [stop - start, D]
    """Rows start..stop of the dense matrix that the layer stands for."""
    rows = tile_weight(layer, start, stop, dtype)
    if layer.index is None:
        return rows
    dense = rows.new_zeros(stop - start, in_features)
    return dense.scatter_(1, tile_index(layer, start, stop), rows)


def fan_in_linear(x: Tensor, layer: Layer) -> Tensor:  # [B, D] -> [B, L]
    """`x @ dense(layer).T + bias`."""
    dtype = compute_dtype(x, layer.weight, layer.bias)
    wide = x.to(dtype)
    out = x.new_empty(x.shape[0], layer.num_labels)
    for start, stop in label_tiles(layer.num_labels, *x.shape):
        scores = wide @ dense_tile(layer, start, stop, x.shape[1], dtype).T
        out[:, start:stop] = (
            scores if layer.bias is None else scores + layer.bias[start:stop].to(dtype)
        )
    return out


def fan_in_linear_backward(
    grad: Tensor,  # [B, L]
    x: Tensor,  # [B, D]
    layer: Layer,
) -> tuple[Tensor, Tensor]:  # [B, D], [L, F]
    """`grad @ dense(layer)` and the entries of `grad.T @ x` that index names."""
    dtype = compute_dtype(x, layer.weight)
    wide = x.to(dtype)
    d_x = torch.zeros_like(wide)
    d_weight = gradient_like(layer.weight)
    for start, stop in label_tiles(layer.num_labels, *x.shape):
        g = grad[:, start:stop].to(dtype)
        d_x += g @ dense_tile(layer, start, stop, x.shape[1], dtype)
        d_weight[start:stop] = (g.T @ wide).gather(1, tile_index(layer, start, stop))
    return d_x.to(x.dtype), d_weight


def gradient_like(weight: Tensor) -> Tensor:
    """Room for a weight's gradient: of its dtype, float32 for float8."""
    return torch.empty_like(weight, dtype=torch.float32 if weight.itemsize == 1 else weight.dtype)
