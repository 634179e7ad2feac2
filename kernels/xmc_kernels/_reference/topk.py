"""The k best labels of each row in plain torch, streamed over label tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels._reference.fan_in import compute_dtype, dense_tile, label_tiles
from xmc_kernels.layer import Layer

_LOW = 0xFFFFFFFF
NOTHING = torch.iinfo(torch.int64).min


def order_key(scores: Tensor, labels: Tensor) -> Tensor:
    """int64 that sorts like (score, then lower label first); scores float32, labels < 2^32.

    A float's bits order like its value once the magnitude bits of negative ones are flipped.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two zeros tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW - labels)


def from_key(key: Tensor) -> tuple[Tensor, Tensor]:
    """The score and label behind a key; -inf and -1 for "nothing"."""
    ordered = (key >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = key == NOTHING
    return scores.masked_fill(nothing, -torch.inf), (_LOW - (key & _LOW)).masked_fill(nothing, -1)


def fan_in_topk(
    x: Tensor,  # [B, D]
    layer: Layer,
    k: int,
    exclude: tuple[Tensor, Tensor] | None,  # CSR of label ids that a row never gets
    label_offset: int,
) -> tuple[Tensor, Tensor]:  # [B, k] float32, [B, k] int64
    """Scores and ids (label + label_offset), best first, ties to the lower label."""
    dtype = compute_dtype(x, layer.weight)
    wide = x.to(dtype)
    best = torch.full((len(x), k), NOTHING, dtype=torch.int64, device=x.device)
    if exclude is not None:
        excluded = exclude[1].long() - label_offset
        rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), exclude[0].diff())
    for start, stop in label_tiles(layer.num_labels, *x.shape):
        scores = wide @ dense_tile(layer, start, stop, x.shape[1], dtype).T
        if layer.bias is not None:
            scores += layer.bias[start:stop]
        keys = order_key(scores.float(), torch.arange(start, stop, device=x.device))
        if exclude is not None:
            here = (excluded >= start) & (excluded < stop)
            keys[rows[here], excluded[here] - start] = NOTHING
        tile_best = keys.topk(min(k, stop - start), dim=1).values
        best = torch.cat([best, tile_best], 1).topk(k, dim=1).values
    scores, labels = from_key(best)
    return scores, labels.where(labels < 0, labels + label_offset)
