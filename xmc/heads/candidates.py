"""Exact scores of chosen labels, a few hundred a row, out of very many."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xmc.nn.fan_in import FixedFanInLinear
from xmc_kernels.checks import check_label_range
from xmc_kernels.layer import stored_numbers
from xmc_kernels.packing import unpack_index

_NUMBERS = 1 << 22  # weights gathered at a time


@torch.no_grad()
def candidate_scores(
    layer: FixedFanInLinear | nn.Linear,
    reps: Tensor,  # [B, D]
    labels: Tensor,  # [B, C] int64, -1 for padding
    *,
    columns: Tensor | None = None,  # [in_features] int32, the column of reps that each input is
) -> Tensor:  # [B, C] float32
    """`layer(reps).gather(1, labels)` without the scores of other labels; -inf for padding.

    Gathers the weights of the labels, a few rows of `labels` at a time: costs B C F, not B L F.
    Raises ValueError on labels out of range.
    """
    if labels.dim() != 2 or len(labels) != len(reps):
        raise ValueError(
            f"expected labels of shape [{len(reps)}, C] to match reps, got {list(labels.shape)}"
        )
    padding = labels < 0
    chosen = labels.masked_fill(padding, 0)
    check_label_range(chosen.flatten(), layer.out_features)
    inputs = layer.fan_in if isinstance(layer, FixedFanInLinear) else layer.in_features
    width = max(labels.shape[1] * inputs, 1)
    size = max(_NUMBERS // width, 1)
    parts = [
        _scores(layer, part.float(), own, columns)
        for part, own in zip(reps.split(size), chosen.split(size), strict=True)
    ]
    scores = torch.cat(parts) if parts else reps.new_empty(labels.shape, dtype=torch.float32)
    return scores.masked_fill(padding, -torch.inf)


def _scores(
    layer: FixedFanInLinear | nn.Linear, x: Tensor, labels: Tensor, columns: Tensor | None
) -> Tensor:
    """[b, C] float32, from b rows x [b, D] and labels [b, C]."""
    weight = _rows(layer.weight, labels)  # [b, C, F], or [b, C, D] of a dense layer
    if isinstance(layer, FixedFanInLinear):
        scale = None if layer.weight_scale is None else layer.weight_scale[labels].flatten()
        weight = stored_numbers(weight.flatten(0, 1), scale, layer.fan_in).float()
        weight = weight.view(*labels.shape, layer.fan_in)
        index = _rows(layer.index, labels // layer.group_size)
        if layer.pattern is not None:
            index = unpack_index(index.flatten(0, 1), layer.pattern, layer.fan_in)
        inside = index.reshape(len(x), -1).long()
        inside = inside if columns is None else columns[inside].long()
        inputs = x.gather(1, inside).view(weight.shape)
        scores = (weight * inputs).sum(-1)
    else:
        scores = torch.einsum("bcd,bd->bc", weight.float(), x)
    return scores if layer.bias is None else scores + layer.bias[labels].float()


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]`, also for the dtypes that torch does not index on every device."""
    plain = {torch.uint16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(table.dtype)
    return table[rows] if plain is None else table.view(plain)[rows].view(table.dtype)
