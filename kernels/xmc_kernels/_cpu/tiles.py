"""Batches cut into feature-major tiles, and how wide those are."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.jit import compiled
from xmc_kernels._cpu.vector import pointer, transpose_block

WIDTHS = (16, 32, 64)
NARROW = (4, 8, *WIDTHS)
"""Widths of kernels without gradients: small batches there are bound by reading the layer."""
# Cost of a label and a tile beside its multiply-adds, in columns of work: a fit to times of 1 to
# 512 rows (`scripts/bench/classifier.py --sweep batch` repeats them).
_OVERHEAD = 20


def tile_width(num_rows: int, widths: tuple[int, ...] = WIDTHS) -> int:
    """The width that wastes least on padding and on work per tile."""
    return min(widths, key=lambda width: (-(-num_rows // width)) * (width + _OVERHEAD))


@njit(error_model="numpy")
def lower_bound(values, low, high, wanted):
    """The first position in sorted values[low:high] that is not below `wanted`."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@njit(error_model="numpy")
def transpose(source, at, step, num_rows, num_columns, into, to, to_step):
    """`into[to + c * to_step + r] = source[at + r * step + c]`, of pointers."""
    whole_rows, whole_columns = num_rows // 16 * 16, num_columns // 16 * 16
    for r in range(0, whole_rows, 16):
        for c in range(0, whole_columns, 16):
            transpose_block(source, at + r * step + c, step, into, to + c * to_step + r, to_step)
    for r in range(num_rows):
        for c in range(whole_columns if r < whole_rows else 0, num_columns):
            into[to + c * to_step + r] = source[at + r * step + c]


@compiled
def _to_tiles(x, tiles):
    num_rows, features = x.shape
    num_tiles, _, width = tiles.shape
    source, into = pointer(x), pointer(tiles)
    for tile in range(num_tiles):
        at = tile * width * features
        count = min(width, num_rows - tile * width)
        transpose(source, at, features, count, features, into, at, width)


@compiled
def _from_tiles(shares, out):
    _, num_tiles, features, width = shares.shape
    num_rows = out.shape[0]
    total = shares[0].reshape(-1)
    for share in range(1, shares.shape[0]):
        total += shares[share].reshape(-1)
    source, into = pointer(total), pointer(out)
    for tile in range(num_tiles):
        at = tile * width * features
        count = min(width, num_rows - tile * width)
        transpose(source, at, width, features, count, into, at, features)


def to_tiles(x: Tensor, width: int) -> np.ndarray:
    """Cut x [B, D] into float32 [tiles, D, width], feature-major, zeros beyond row B."""
    num_rows, features = x.shape
    num_tiles = max(1, -(-num_rows // width))
    tiles = threads.zeros(num_tiles, features, width)
    _to_tiles(x.detach().float().contiguous().numpy(), tiles)
    return tiles


def from_tiles(shares: np.ndarray, num_rows: int) -> Tensor:
    """The sum of [shares, tiles, D, width] over shares as [B, D]; overwrites the first share."""
    out = torch.empty(num_rows, shares.shape[2])
    _from_tiles(shares, out.numpy())
    return out
