"""The k best labels of each row: scores stay in registers unless one beats its row's k-th best."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.jit import compiled
from xmc_kernels._cpu.scores import label_score, make_layer, out_of_range, raise_bad_index
from xmc_kernels._cpu.tiles import chunk_labels, tile_width, to_tiles
from xmc_kernels._cpu.vector import fill, greater, load, pointer, splat, store
from xmc_kernels._reference.topk import from_key, order_key

_ZERO = np.float32(0)


@compiled
def contains(values, start, stop, wanted):
    """Whether sorted values[start:stop] has `wanted`."""
    low, high = start, stop
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low < stop and values[low] == wanted


@compiled
def insert(scores, labels, score, label):
    """Put (score, label) into lists sorted by falling score, behind its equals; drops the last."""
    at = scores.size - 1
    while at > 0 and scores[at - 1] < score:
        scores[at] = scores[at - 1]
        labels[at] = labels[at - 1]
        at -= 1
    scores[at] = score
    labels[at] = label


@functools.cache
def _kernel(W):
    @compiled
    def topk_range(start, stop, chunk, layer, tiles, exclude, offset, thresholds, scores, labels):
        """The best of labels start..stop into scores, labels [B, k]; a bad label or -1.

        A score must be above its row's threshold; behind the thresholds is room for a tile.
        Labels come in rising order, so a score has to be larger to push out an equal one.
        """
        fan_in, group, has_bias = layer.fan_in, layer.group, layer.bias.size > 0
        weight, index, bias = pointer(layer.weight), pointer(layer.indices), pointer(layer.bias)
        indptr, excluded = exclude
        num_tiles, stride = tiles.shape
        x, threshold = pointer(tiles), pointer(thresholds)
        k = scores.shape[1]
        zero = splat(W, _ZERO)
        scores[:] = -np.inf
        labels[:] = -1
        for c0 in range(start, stop, chunk):
            c1 = min(c0 + chunk, stop)
            for tile in range(num_tiles):
                for label in range(c0, c1):
                    row = (label // group) * fan_in
                    if out_of_range(index, row, fan_in, stride // W):
                        return label
                    score = fill(zero, bias[label] if has_bias else _ZERO)
                    score = label_score(
                        score, x, tile * stride, weight, label * fan_in, index, row, fan_in
                    )
                    better = greater(score, load(zero, threshold, tile * W))
                    if better == 0:
                        continue
                    store(threshold, num_tiles * W, score)
                    for j in range(W):
                        if (better >> np.uint64(j)) & np.uint64(1) == 0:
                            continue
                        i = tile * W + j
                        value = threshold[num_tiles * W + j]
                        if excluded.size > 0 and contains(
                            excluded, indptr[i], indptr[i + 1], label + offset
                        ):
                            continue
                        insert(scores[i], labels[i], value, label + offset)
                        threshold[i] = scores[i, k - 1]
        return -1

    return topk_range


def fan_in_topk(
    x: Tensor,  # [B, D] float32 or bfloat16
    weight: Tensor,  # [L, F] float32
    index: Tensor,  # [L/G, F]
    bias: Tensor | None,  # [L] float32
    k: int,
    exclude: tuple[Tensor, Tensor] | None,  # CSR, sorted within a row
    label_offset: int,
) -> tuple[Tensor, Tensor]:  # [B, k] float32, [B, k] int64
    """Scores and ids (label + label_offset), best first, ties to the lower label."""
    num_rows, features = x.shape
    num_labels, fan_in = weight.shape
    width = tile_width(num_rows)
    tiles = to_tiles(x, width)
    layer = make_layer(weight.contiguous(), index, bias if bias is None else bias.contiguous())
    shares = threads.shares(num_labels)
    scores = np.empty((len(shares), num_rows, k), np.float32)
    labels = np.empty((len(shares), num_rows, k), np.int64)
    pairs = exclude or (torch.zeros(num_rows + 1).long(), torch.zeros(0).int())
    filtered = (pairs[0].numpy(), pairs[1].numpy())
    common = (chunk_labels(fan_in, len(tiles)), layer, tiles, filtered, label_offset)
    thresholds = np.full((len(shares), (len(tiles) + 1) * width), np.inf, np.float32)
    thresholds[:, :num_rows] = -np.inf  # padding never gets past its own
    calls = [
        (*share, *common, *own)
        for share, own in zip(shares, zip(thresholds, scores, labels, strict=True), strict=True)
    ]
    bad = threads.run(_kernel(width), calls)
    raise_bad_index(index, num_labels, features, bad)
    return merge(torch.from_numpy(scores), torch.from_numpy(labels))


def merge(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best k of [shares, B, k] per row."""
    if len(scores) == 1:
        return scores[0], labels[0]
    k = scores.shape[2]
    key = order_key(scores, labels).masked_fill(labels < 0, torch.iinfo(torch.int64).min)
    return from_key(key.transpose(0, 1).flatten(1).topk(k, dim=1).values)
