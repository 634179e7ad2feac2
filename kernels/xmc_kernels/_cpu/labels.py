"""A layer's labels as kernels read them, block by block: index rows, weights and biases.

A block is a few consecutive labels with one index row each, or labels of one group that share one.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import njit

from xmc_kernels._cpu import threads
from xmc_kernels.layer import Layer

# Fields of every kernel's record, beside those of `threads.record_type`.
ADDRESSES = "x weight index bias bad biases"
INTEGERS = "num_tiles features fan_in group chunk block"
_L1 = 8192  # floats of x that the rows of a block may name: they stay in the first-level cache


def kinds(layer: Layer, width: int) -> tuple:
    """What kernels are compiled for: type of the index, labels taken together."""
    assert layer.index is not None
    kind = layer.index.numpy().dtype.type
    return kind, shared_labels(layer, width)


@functools.cache
def _register_floats() -> int:
    """Numbers that all vector registers hold."""
    return 512 if get_host_cpu_features().get("avx512f") else 128


def shared_labels(layer: Layer, width: int) -> int:
    """How many labels of a group a kernel takes at once, a power of two: sums stay in registers."""
    most = max(1, min(8, _register_floats() // 2 // width, layer.group))
    return 1 << (most.bit_length() - 1)


def layer_fields(tiles: np.ndarray, layer: Layer, num_shares: int) -> dict[str, Any]:
    """ADDRESSES, INTEGERS and the first fields; keep the result, it may own copies."""
    layer = layer.contiguous()
    num_tiles, features, width = tiles.shape
    fan_in, group = layer.fan_in, layer.group
    rows = _L1 // (fan_in * width) if group == 1 else 16
    block = max(1, min(16, rows))
    # More where several tiles pass over them.
    chunk = (4096 if num_tiles == 1 else 16384) // fan_in
    chunk = max(1, chunk // 16) * 16
    return {
        "num_shares": num_shares,
        "num_labels": layer.num_labels,
        "x": tiles,
        "weight": layer.weight,
        "index": layer.index,
        "bias": layer.bias,
        "bad": np.full(num_shares, -1),  # the first label of a share that was refused
        "biases": threads.zeros(num_shares, chunk),
        "num_tiles": num_tiles,
        "features": features,
        "fan_in": fan_in,
        "group": group,
        "chunk": chunk,
        "block": block,
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
    """The labels of a share: consecutive, equally many but for whole blocks of sixteen."""
    start = a.num_labels * share // a.num_shares // 16 * 16
    last = share + 1 == a.num_shares
    return start, a.num_labels if last else a.num_labels * (share + 1) // a.num_shares // 16 * 16


def chains_of(width: int) -> int:
    """How many multiply-adds of one label go on at a time."""
    return 2 if width > 32 else 4


@njit(forceinline=True)
def block_stop(a, start, limit):
    """Where the block that begins at a label ends: with its group, if it has one."""
    stop = min(start + a.block, limit)
    return min(stop, (start // a.group + 1) * a.group) if a.group > 1 else stop


@njit(forceinline=True)
def index_rows(a, index, start):
    """Where the index rows of the block from `start` on lie: pointer, first, step."""
    if a.group > 1:
        return index, start // a.group * a.fan_in, 0
    return index, start * a.fan_in, a.fan_in


@njit(forceinline=True)
def refused(a, index, row, step, count, bad, share, start):
    """Whether one of the sorted index rows of a block leaves [0, features); keeps the first."""
    last = a.fan_in - 1
    for i in range(count if step > 0 else 1):
        at = row + i * step
        if index[at] < 0 or index[at + last] >= a.features:
            if bad[share] < 0:
                bad[share] = start + i
            return True
    return False


@njit(error_model="numpy")
def copy_biases(a, bias, into, start, stop):
    """The biases of a chunk as float32; `into` holds zeros where there are none."""
    if a.bias != 0:
        for i in range(stop - start):
            into[i] = bias[start + i]
