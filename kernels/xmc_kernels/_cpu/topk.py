"""The k best labels of each row: scores stay in registers unless one beats its row's k-th best."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from xmc_kernels._cpu import scores, threads
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.scores import label_score, out_of_range, share_range
from xmc_kernels._cpu.tiles import lower_bound, tile_width, to_tiles
from xmc_kernels._cpu.vector import at_address, fill, greater, load, next_share, splat, store
from xmc_kernels._reference.topk import from_key, order_key
from xmc_kernels.layer import Layer

_ZERO = np.float32(0)
ARGUMENTS = threads.record_type(
    addresses=f"{scores.ADDRESSES} indptr excluded thresholds scores labels",
    integers=f"{scores.INTEGERS} num_rows k offset",
)


@njit(error_model="numpy")
def insert(scores, labels, last, first, score, label):
    """Put a score into lists [first, last] sorted by falling score, behind its equals.

    What was last drops out.
    """
    at = last
    while at > first and scores[at - 1] < score:
        scores[at] = scores[at - 1]
        labels[at] = labels[at - 1]
        at -= 1
    scores[at] = score
    labels[at] = label


@functools.cache
def _kernel(W, kind):
    @kernel(ARGUMENTS)
    def topk_shares(arguments):
        a = carray(arguments, 1)[0]
        fan_in, group, chunk, k = a.fan_in, a.group, a.chunk, a.k
        num_tiles, features, offset = a.num_tiles, a.features, a.offset
        weight, bias = at_address(np.float32, a.weight), at_address(np.float32, a.bias)
        has_bias = a.bias != 0
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        indptr, excluded = at_address(np.int64, a.indptr), at_address(np.int32, a.excluded)
        bad = at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            # A score must be above its row's threshold; behind those is room for a tile's scores.
            room = num_tiles * W
            threshold = at_address(np.float32, a.thresholds + share * 4 * (room + W))
            best = at_address(np.float32, a.scores + share * 4 * a.num_rows * k)
            labels = at_address(np.int64, a.labels + share * 8 * a.num_rows * k)
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                for tile in range(num_tiles):
                    for label in range(c0, c1):
                        w, row = label * fan_in, (label // group) * fan_in
                        if out_of_range(index, row, fan_in, features):
                            if bad[share] < 0:
                                bad[share] = label
                            continue
                        base = tile * features * W
                        score = fill(zero, bias[label] if has_bias else _ZERO)
                        score = label_score(score, x, base, weight, w, index, row, fan_in)
                        better = greater(score, load(zero, threshold, tile * W))
                        if better == 0:
                            continue
                        store(threshold, room, score)
                        for j in range(W):
                            if (better >> np.uint64(j)) & np.uint64(1) == 0:
                                continue
                            i = tile * W + j
                            if a.indptr != 0:
                                stop_at = indptr[i + 1]
                                p = lower_bound(excluded, indptr[i], stop_at, label + offset)
                                if p < stop_at and excluded[p] == label + offset:
                                    continue
                            # Labels rise: an equal score stays behind those that came before.
                            value, last = threshold[room + j], (i + 1) * k - 1
                            insert(best, labels, last, i * k, value, label + offset)
                            threshold[i] = best[last]
            share = next_share(arguments)

    return topk_shares


def fan_in_topk(
    x: Tensor,  # [B, D] float32 or bfloat16
    layer: Layer,  # float32, contiguous
    k: int,
    exclude: tuple[Tensor, Tensor] | None,  # CSR, sorted within a row
    label_offset: int,
) -> tuple[Tensor, Tensor]:  # [B, k] float32, [B, k] int64
    """Scores and ids (label + label_offset), best first, ties to the lower label."""
    num_rows, width = len(x), tile_width(len(x))
    tiles = to_tiles(x, width)
    shares = threads.num_shares(layer.num_labels)
    fields = scores.layer_fields(tiles, layer, shares)
    best = torch.full((shares, num_rows, k), -torch.inf)
    labels = torch.full((shares, num_rows, k), -1)
    thresholds = threads.zeros(shares, (len(tiles) + 1) * width)
    thresholds[:] = np.inf
    thresholds[:, :num_rows] = -np.inf  # nothing is above that of padding
    indptr, excluded = (t.contiguous() for t in exclude) if exclude else (None, None)
    arguments = threads.record(
        ARGUMENTS,
        **fields,
        indptr=indptr,
        excluded=excluded,
        thresholds=thresholds,
        scores=best,
        labels=labels,
        num_rows=num_rows,
        k=k,
        offset=label_offset,
    )
    threads.launch(_kernel(width, scores.index_kind(layer)), arguments)
    scores.raise_bad_index(layer, fields)
    return merge(best, labels)


def merge(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best k of [shares, B, k] per row."""
    if len(scores) == 1:
        return scores[0], labels[0]
    k = scores.shape[2]
    key = order_key(scores, labels).masked_fill(labels < 0, torch.iinfo(torch.int64).min)
    return from_key(key.transpose(0, 1).flatten(1).topk(k, dim=1).values)
