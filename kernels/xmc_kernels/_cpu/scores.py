"""The layer as kernels see it, and the score of one label for a tile of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from xmc_kernels._cpu.tiles import chunk_labels
from xmc_kernels._cpu.vector import add, fill, fma, load, width_of
from xmc_kernels.layer import Layer

# Fields of every kernel's record, beside those of `threads.record_type`.
ADDRESSES = "x weight index bias bad"
INTEGERS = "num_tiles features fan_in group chunk"


def index_kind(layer: Layer) -> type:
    """The numpy type of an index, which kernels are compiled for."""
    assert layer.index is not None
    return layer.index.numpy().dtype.type


def layer_fields(tiles: np.ndarray, layer: Layer, num_shares: int) -> dict[str, Any]:
    """ADDRESSES, INTEGERS and the first fields; keep the result, it may own copies."""
    layer = layer.contiguous()
    num_tiles, features, _ = tiles.shape
    return {
        "num_shares": num_shares,
        "num_labels": layer.num_labels,
        "x": tiles,
        "weight": layer.weight,
        "index": layer.index,
        "bias": layer.bias,
        "bad": np.full(num_shares, -1),  # the first label of a share that was refused
        "num_tiles": num_tiles,
        "features": features,
        "fan_in": layer.fan_in,
        "group": layer.group,
        "chunk": chunk_labels(layer.fan_in, num_tiles),
    }


def raise_bad_index(layer: Layer, fields: dict[str, Any]) -> None:
    """Raise ValueError for the first label that a kernel refused."""
    assert layer.index is not None
    refused = fields["bad"][fields["bad"] >= 0]
    if len(refused):
        values = layer.index[refused[0] // fields["group"]].long()
        raise ValueError(
            f"expected index values in [0, {fields['features']}), label {refused[0]} has "
            f"{int(values.min())} to {int(values.max())}"
        )


@njit(forceinline=True)
def share_range(a, share):
    """The labels of a share: consecutive, sizes differ by at most one."""
    return a.num_labels * share // a.num_shares, a.num_labels * (share + 1) // a.num_shares


@njit(forceinline=True)
def out_of_range(index, row, fan_in, features):
    """Whether a sorted index row leaves [0, features)."""
    return index[row] < 0 or index[row + fan_in - 1] >= features


@njit(forceinline=True)
def label_score(score, x, base, weight, w, index, row, fan_in):
    """`score + sum_k weight[w + k] * x[base + index[row + k] * width :][:width]`, of pointers.

    Two chains of multiply-adds hide half of their latency.
    """
    width = width_of(score)
    other = fill(score, np.float32(0))
    for k in range(0, fan_in - 1, 2):
        at = base + np.intp(index[row + k]) * width
        score = fma(fill(score, weight[w + k]), load(score, x, at), score)
        at = base + np.intp(index[row + k + 1]) * width
        other = fma(fill(score, weight[w + k + 1]), load(score, x, at), other)
    if fan_in % 2:
        k = fan_in - 1
        at = base + np.intp(index[row + k]) * width
        score = fma(fill(score, weight[w + k]), load(score, x, at), score)
    return add(score, other)
