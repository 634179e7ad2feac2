"""Streaming top-k: scores of one chunk of labels at a time, reduced to a few candidates per row.

The chunk's scores [B, C] are made by the layer's forward kernels (or a library product where the
layer is dense) in a scratch of `tiles.SCORE_BYTES`. A program then sorts a segment of a row as
64-bit keys, score above label, and keeps its best k; torch merges what the segments keep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._reference.topk import from_key, order_key
from xmc_kernels._triton.densify import dense_block, product, product_dtype
from xmc_kernels._triton.fan_in import scorer
from xmc_kernels._triton.launch import Launch, cdiv, power_of_2
from xmc_kernels._triton.layers import label_range
from xmc_kernels._triton.tiles import score_labels
from xmc_kernels.layer import Layer

NOTHING = torch.iinfo(torch.int64).min
_SEGMENT = 1024
_LARGEST_K = 512
"""Above it torch's own top-k of the chunk's keys takes over."""


@triton.jit
def _topk_kernel(
    scores_ptr,  # [B, C], NaN: not a candidate
    best_ptr,  # [B, segments, K] int64
    start,
    num_labels,  # C
    segments,
    SEGMENT: tl.constexpr,
    K: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    offs = program % segments * SEGMENT + tl.arange(0, SEGMENT)
    mask = offs < num_labels
    score = tl.load(scores_ptr + row * num_labels + offs, mask=mask, other=float("nan"))
    valid = score == score
    score = tl.where(score == 0.0, 0.0, score)  # the two zeros tie
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = 0xFFFFFFFF - (start + offs).to(tl.int64)
    nothing = tl.full((SEGMENT,), -0x8000000000000000, tl.int64)
    key = tl.where(valid, (ordered.to(tl.int64) << 32) | low, nothing)
    best = tl.topk(key, K)
    tl.store(best_ptr + program.to(tl.int64) * K + tl.arange(0, K), best)


def topk_launch(scores: Tensor, best: Tensor, start: int) -> Launch:
    """Keys of the K best of each segment of scores [B, C] into best [B, segments, K]."""
    rows, segments, k = best.shape
    arguments = {
        "scores_ptr": scores,
        "best_ptr": best,
        "start": start,
        "num_labels": scores.shape[1],
        "segments": segments,
    }
    constants = {"SEGMENT": segment_labels(scores.shape[1], k), "K": k}
    return Launch(_topk_kernel, rows * segments, arguments, constants)


def segment_labels(num_labels: int, k: int) -> int:
    """Labels that a program sorts: a power of two, at least k."""
    return max(k, min(power_of_2(num_labels), _SEGMENT))


def chunk_best(scores: Tensor, start: int, k: int) -> Tensor:
    """Keys [B, n], among them those of the k best of scores [B, C], label start + column."""
    if k > _LARGEST_K:
        labels = torch.arange(start, start + scores.shape[1], device=scores.device)
        keys = order_key(scores, labels).masked_fill(scores.isnan(), NOTHING)
        return keys.topk(min(k, scores.shape[1]), dim=1).values
    kept = max(8, power_of_2(k))
    segments = cdiv(scores.shape[1], segment_labels(scores.shape[1], kept))
    best = torch.empty((len(scores), segments, kept), dtype=torch.int64, device=scores.device)
    topk_launch(scores, best, start).run()
    return best.flatten(1)


def fan_in_topk(
    x: Tensor,  # [B, D]
    layer: Layer,
    k: int,
    exclude: tuple[Tensor, Tensor] | None,  # CSR of label ids that a row never gets
    label_offset: int,
) -> tuple[Tensor, Tensor]:  # [B, k] float32, [B, k] int64
    """Scores and ids (label + label_offset), best first, ties to the lower label."""
    num_labels, device = layer.num_labels, x.device
    best = torch.full((len(x), k), NOTHING, dtype=torch.int64, device=device)
    width = score_labels(x, num_labels, layer.group)
    starts = range(0, num_labels, width) if len(x) else range(0)
    score = _scorer(x, layer)
    if exclude is not None:
        rows = torch.arange(len(x), device=device).repeat_interleave(
            exclude[0].diff(), output_size=len(exclude[1])
        )
        labels, order = (exclude[1].long() - label_offset).sort()
        rows = rows[order]
        bounds = torch.tensor([*starts, num_labels], device=device)
        ends = torch.searchsorted(labels, bounds).tolist()
    for number, start in enumerate(starts):
        scores = score(start, min(start + width, num_labels))
        if exclude is not None:
            pairs = slice(ends[number], ends[number + 1])
            scores[rows[pairs], labels[pairs] - start] = torch.nan
        best = torch.cat([best, chunk_best(scores, start, k)], 1).topk(k, dim=1).values
    scores, labels = from_key(best)
    return scores, labels.where(labels < 0, labels + label_offset)


def _scorer(x: Tensor, layer: Layer) -> Callable[[int, int], Tensor]:
    """`score(start, stop)`: float32 scores [B, stop - start] of these labels."""
    layer = layer.contiguous()
    weight, bias = layer.weight, layer.bias
    if layer.index is None:
        dtype = product_dtype(x, weight)
        wide = x.to(dtype)

        def dense(start: int, stop: int) -> Tensor:
            scores = product(wide, dense_block(layer, start, stop, x.shape[1], dtype).T)
            return scores if bias is None else scores.add_(bias[start:stop])

        return dense
    write = scorer(x, layer)

    def sparse(start: int, stop: int) -> Tensor:
        scores = torch.empty(len(x), stop - start, device=x.device)
        write(label_range(layer, start, stop), scores)
        return scores

    return sparse
