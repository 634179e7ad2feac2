"""The k best labels of each row of a dense layer: one look at a tile's scores, then at few groups.

Torch's GEMM makes the scores. Ranking all of them by (score, lower label) would take several times
as long as the GEMM, so a tile is first cut into groups of neighbouring labels: what is among the k
best lies in one of the k groups of largest maximum, equal maxima in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels._reference.topk import NOTHING, from_key, order_key
from xmc_kernels.layer import Layer

_GROUP = 32
_ROWS = 512
_SCORES = 1 << 23  # of a tile


def dense_topk(
    x: Tensor,  # [B, D] float32
    layer: Layer,  # index None, weight [L, D] float32
    k: int,
    exclude: tuple[Tensor, Tensor] | None,  # CSR of label ids that a row never gets
    label_offset: int,
) -> tuple[Tensor, Tensor]:  # [B, k] float32, [B, k] int64
    """As `_reference.topk.fan_in_topk`; a score of -inf counts as none."""
    # Tiles of many groups, of as many rows as then fit.
    height = max(1, min(_ROWS, _SCORES // (4 * _GROUP * k)))
    parts = []
    for first in range(0, len(x), height):
        part = x[first : first + height]
        own = None
        if exclude is not None:
            indptr = exclude[0][first : first + len(part) + 1]
            rows = torch.repeat_interleave(torch.arange(len(part)), indptr.diff())
            own = rows, exclude[1][int(indptr[0]) : int(indptr[-1])].long() - label_offset
        parts.append(_best_keys(part, layer, k, own))
    best = torch.cat(parts) if parts else torch.empty(0, k, dtype=torch.int64)
    found, labels = from_key(best)
    return found, labels.where(labels < 0, labels + label_offset)


def _best_keys(x: Tensor, layer: Layer, k: int, exclude: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B, k] int64, see `order_key`; `exclude` are pairs of row and label."""
    best = torch.full((len(x), k), NOTHING, dtype=torch.int64)
    size = min(_SCORES // (_GROUP * len(x)), -(-layer.num_labels // _GROUP)) * _GROUP
    buffer = torch.empty(len(x), size)
    for start in range(0, layer.num_labels, size):
        stop = min(start + size, layer.num_labels)
        scores = buffer[:, : stop - start]
        torch.mm(x, layer.weight[start:stop].T, out=scores)
        if layer.bias is not None:
            scores += layer.bias[start:stop]
        buffer[:, stop - start :] = -torch.inf
        if exclude is not None:
            rows, labels = exclude
            here = (labels >= start) & (labels < stop)
            scores[rows[here], labels[here] - start] = -torch.inf
        best = torch.cat([best, _tile_keys(buffer, start, k)], 1).topk(k, dim=1).values
    return best


def _tile_keys(scores: Tensor, start: int, k: int) -> Tensor:
    """The keys of the k best labels of each row of a tile, or of somewhat more; [B, k']."""
    groups = scores.view(len(scores), -1, _GROUP)
    most = groups.amax(2)
    keys = order_key(most, torch.arange(most.shape[1]))
    chosen = keys.topk(min(k, most.shape[1]), dim=1).indices
    values = groups.gather(1, chosen[..., None].expand(-1, -1, _GROUP))
    labels = start + chosen[..., None] * _GROUP + torch.arange(_GROUP)
    keys = order_key(values, labels).masked_fill_(values == -torch.inf, NOTHING).flatten(1)
    return keys.topk(min(k, keys.shape[1]), dim=1).values
