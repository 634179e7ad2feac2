"""Fixed fan-in linear layer in plain torch: build a dense tile of labels, multiply."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any argument is, float32 otherwise."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def label_tiles(num_labels: int, num_rows: int, in_features: int) -> Iterator[tuple[int, int]]:
    """Ranges of labels so small that [B, tile] and [tile, D] hold at most 2^20 numbers."""
    width = max(1, 2**20 // max(num_rows, in_features))
    for start in range(0, num_labels, width):
        yield start, min(start + width, num_labels)


def tile_index(index: Tensor, num_labels: int, start: int, stop: int) -> Tensor:
    """The index rows of labels start..stop, [stop - start, F] int64."""
    group = num_labels // index.shape[0]
    rows = torch.arange(start, stop, device=index.device) // group
    return index[start // group : (stop - 1) // group + 1].long()[rows - start // group]


def dense_tile(
    weight: Tensor,  # [L, F]
    index: Tensor | None,  # [L/G, F], None where weight is dense
    start: int,
    stop: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:  # [stop - start, D]
    """Rows start..stop of the dense matrix that weight and index stand for."""
    rows = weight[start:stop].to(dtype)
    if index is None:
        return rows
    dense = rows.new_zeros(stop - start, in_features)
    return dense.scatter_(1, tile_index(index, weight.shape[0], start, stop), rows)


def fan_in_linear(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F]
    bias: Tensor | None,  # [L]
) -> Tensor:  # [B, L]
    """`x @ dense(weight, index).T + bias`."""
    dtype = compute_dtype(x, weight, bias)
    wide = x.to(dtype)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start, stop in label_tiles(weight.shape[0], *x.shape):
        scores = wide @ dense_tile(weight, index, start, stop, x.shape[1], dtype).T
        out[:, start:stop] = scores if bias is None else scores + bias[start:stop].to(dtype)
    return out


def fan_in_linear_backward(
    grad: Tensor,  # [B, L]
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F]
) -> tuple[Tensor, Tensor]:  # [B, D], [L, F]
    """`grad @ dense(weight, index)` and the entries of `grad.T @ x` that index names."""
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    d_x = torch.zeros_like(wide)
    d_weight = torch.empty_like(weight)
    for start, stop in label_tiles(weight.shape[0], *x.shape):
        g = grad[:, start:stop].to(dtype)
        d_x += g @ dense_tile(weight, index, start, stop, x.shape[1], dtype)
        rows = tile_index(index, weight.shape[0], start, stop)
        d_weight[start:stop] = (g.T @ wide).gather(1, rows)
    return d_x.to(x.dtype), d_weight
