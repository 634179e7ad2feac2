"""The k best labels of each row: scores stay in registers unless one beats its row's k-th best."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from xmc_kernels._cpu import labels, threads
from xmc_kernels._cpu.blocks import repeat
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.labels import (
    block_stop,
    chains_of,
    copy_biases,
    index_rows,
    refused,
    share_range,
    weight_rows,
)
from xmc_kernels._cpu.scores import block_scores
from xmc_kernels._cpu.tiles import NARROW, lower_bound, tile_width, to_tiles
from xmc_kernels._cpu.vector import at_address, greater, load, next_share, splat
from xmc_kernels._reference.topk import from_key, order_key
from xmc_kernels.layer import Layer

_ZERO = np.float32(0)
ARGUMENTS = threads.record_type(
    addresses=f"{labels.ADDRESSES} indptr excluded thresholds block_scores best best_labels",
    integers=f"{labels.INTEGERS} num_rows k offset",
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
def _kernel(W, kind, weight_kind, T):
    CHAINS = chains_of(W)

    @kernel(ARGUMENTS)
    def topk_shares(arguments):
        a = carray(arguments, 1)[0]
        chunk, k, offset = a.chunk, a.k, a.offset
        weight = at_address(weight_kind, a.weight)
        index, x = at_address(kind, a.index), at_address(np.float32, a.x)
        indptr, excluded = at_address(np.int64, a.indptr), at_address(np.int32, a.excluded)
        bad = at_address(np.int64, a.bad)
        zero = splat(W, _ZERO)
        several, chains = repeat(T, zero), repeat(CHAINS, zero)

        share = next_share(arguments)
        while share < a.num_shares:
            start, stop = share_range(a, share)
            # A score must be above its row's threshold.
            threshold = at_address(np.float32, a.thresholds + share * 4 * a.num_tiles * W)
            scores = at_address(np.float32, a.block_scores + share * 4 * a.block * W)
            biases = at_address(np.float32, a.biases + share * 4 * chunk)
            best = at_address(np.float32, a.best + share * 4 * a.num_rows * k)
            labels = at_address(np.int64, a.best_labels + share * 8 * a.num_rows * k)
            for c0 in range(start, stop, chunk):
                c1 = min(c0 + chunk, stop)
                copy_biases(a, biases, c0, c1)
                for tile in range(a.num_tiles):
                    base = tile * a.features * W
                    b0 = c0
                    while b0 < c1:
                        b1 = block_stop(a, b0, c1)
                        rows, row, step = index_rows(a, index, share, b0, b1 - b0)
                        wide, w = weight_rows(a, weight, share, b0, b1 - b0)
                        if refused(a, rows, row, step, b1 - b0, bad, share, b0):
                            b0 = b1
                            continue
                        block_scores(
                            *(several, chains, a, x, base, wide, w, rows, row, step),
                            *(biases, b0 - c0, b1 - b0, scores, 0),
                        )
                        for at in range(b1 - b0):
                            bar = load(zero, threshold, tile * W)
                            better = greater(load(zero, scores, at * W), bar)
                            if better == 0:
                                continue
                            label = b0 + at + offset
                            for j in range(W):
                                if (better >> np.uint64(j)) & np.uint64(1) == 0:
                                    continue
                                i = tile * W + j
                                if a.indptr != 0:
                                    stop_at = indptr[i + 1]
                                    p = lower_bound(excluded, indptr[i], stop_at, label)
                                    if p < stop_at and excluded[p] == label:
                                        continue
                                # Labels rise: an equal score stays behind those before it.
                                last = (i + 1) * k - 1
                                insert(best, labels, last, i * k, scores[at * W + j], label)
                                threshold[i] = best[last]
                        b0 = b1
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
    num_rows, width = len(x), tile_width(len(x), NARROW)
    tiles = to_tiles(x, width)
    shares = threads.num_shares(layer.num_labels)
    fields = labels.layer_fields(tiles, layer, shares)
    best = torch.full((shares, num_rows, k), -torch.inf)
    best_labels = torch.full((shares, num_rows, k), -1)
    block = threads.zeros(shares, fields["block"], width)
    thresholds = threads.zeros(shares, len(tiles) * width)
    thresholds[:] = np.inf
    thresholds[:, :num_rows] = -np.inf  # nothing is above that of padding
    indptr, excluded = (t.contiguous() for t in exclude) if exclude else (None, None)
    arguments = threads.record(
        ARGUMENTS,
        **fields,
        indptr=indptr,
        excluded=excluded,
        thresholds=thresholds,
        block_scores=block,
        best=best,
        best_labels=best_labels,
        num_rows=num_rows,
        k=k,
        offset=label_offset,
    )
    threads.launch(_kernel(width, *labels.kinds(layer, width)), arguments)
    labels.raise_bad_index(layer, fields)
    return merge(best, best_labels)


def merge(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best k of [shares, B, k] per row."""
    if len(scores) == 1:
        return scores[0], labels[0]
    k = scores.shape[2]
    key = order_key(scores, labels).masked_fill(labels < 0, torch.iinfo(torch.int64).min)
    return from_key(key.transpose(0, 1).flatten(1).topk(k, dim=1).values)
