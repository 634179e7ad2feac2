"""Which inputs a label reads: the index's dtype and its random start.

A layer may hold some rows of a larger one. What is drawn into them is what the larger one would
have there, and the generator ends where it would: all rows are drawn, a tile at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xmc.distributed.sharding import RowShard
from xmc_kernels.packing import pack_index, packed_bytes

_TILE = 2**22  # numbers drawn at a time


def index_dtype(in_features: int) -> torch.dtype:
    """uint16 while every input fits in it (D <= 65536), else int32."""
    return torch.uint16 if in_features <= 2**16 else torch.int32


def index_columns(fan_in: int, in_features: int, pattern: tuple[int, int] | None) -> int:
    """Bytes of an index row."""
    if pattern is not None:
        return packed_bytes(fan_in, pattern)
    return fan_in * index_dtype(in_features).itemsize


def draw_pattern_(
    index: Tensor,  # [R, P] uint8
    in_features: int,
    pattern: tuple[int, int],
    rows: RowShard | None = None,  # of how many rows these R are; None: all
) -> Tensor:
    """Fill a packed index: n of every m inputs, every subset of a block equally likely."""
    rows = rows or RowShard.whole(len(index))
    n, m = pattern
    blocks = in_features // m
    base = np.arange(blocks, dtype=np.int32)[:, None] * m
    step = max(1, _TILE // in_features)
    for start in range(0, rows.total, step):
        stop = min(start + step, rows.total)
        local = _distinct_rows((stop - start) * blocks, n, m).reshape(-1, blocks, n)
        first, last = rows.within(start, stop)
        if first < last:
            own = (local[first - start : last - start] + base).reshape(last - first, -1)
            packed = pack_index(torch.from_numpy(own), pattern)
            index[first - rows.start : last - rows.start] = packed
    return index


def draw_index_(
    index: Tensor,  # [R, F]
    in_features: int,
    rows: RowShard | None = None,  # of how many rows these R are; None: all
) -> Tensor:
    """Fill an index with F distinct inputs per row, sorted; every subset is equally likely.

    Drawn from torch's global CPU generator, a tile of rows at a time: holds a few million numbers,
    never [R, D].
    """
    rows, fan_in = rows or RowShard.whole(len(index)), index.shape[1]
    step = max(1, _TILE // (in_features if 2 * fan_in > in_features else fan_in))
    for start in range(0, rows.total, step):
        stop = min(start + step, rows.total)
        tile = _distinct_rows(stop - start, fan_in, in_features)
        first, last = rows.within(start, stop)
        if first < last:
            own = torch.from_numpy(tile[first - start : last - start])
            index[first - rows.start : last - rows.start] = own.to(index.dtype)
    return index


@torch.no_grad()
def draw_uniform_(
    out: Tensor,  # [R, ...]
    bound: float,
    rows: RowShard | None = None,  # of how many rows these R are; None: all
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill with U(-bound, bound). A shard needs the CPU, whose generator draws number by number."""
    rows = rows or RowShard.whole(len(out))
    per_row = out.shape[1:].numel()
    _skip(out, rows.start * per_row, generator)
    out.uniform_(-bound, bound, generator=generator)
    _skip(out, (rows.total - rows.stop) * per_row, generator)
    return out


def _skip(like: Tensor, count: int, generator: torch.Generator | None) -> None:
    """Draw numbers of a dtype in vain, a tile at a time."""
    scratch = like.new_empty(min(count, _TILE))
    for start in range(0, count, _TILE):
        scratch[: count - start].uniform_(generator=generator)


def _distinct_rows(num_rows: int, count: int, high: int) -> np.ndarray:
    """[num_rows, count] integers below `high`, distinct and sorted within a row."""
    # More than half of the inputs: draw the ones left out, so that collisions stay rare.
    if 2 * count > high:
        return _complement(_distinct(num_rows, high - count, high), high)
    return _distinct(num_rows, count, high)


def _distinct(num_rows: int, count: int, high: int) -> np.ndarray:
    """[num_rows, count] int32 below `high`, distinct and sorted within a row.

    Draws with replacement, then draws the repeated ones again until none is left. No step treats
    one input unlike another, so by symmetry every subset is equally likely.
    """
    drawn = _draw((num_rows, count), high)
    drawn.sort(axis=1)
    pending = np.arange(num_rows)
    rows = drawn
    while True:
        repeated = np.zeros(rows.shape, dtype=bool)
        np.equal(rows[:, 1:], rows[:, :-1], out=repeated[:, 1:])
        again = repeated.any(axis=1)
        if not again.any():
            return drawn
        pending, rows, repeated = pending[again], rows[again], repeated[again]
        rows[repeated] = _draw((int(repeated.sum()),), high)
        rows.sort(axis=1)
        drawn[pending] = rows


def _draw(shape: tuple[int, ...], high: int) -> np.ndarray:
    return torch.randint(high, shape, dtype=torch.int32).numpy()


def _complement(rows: np.ndarray, high: int) -> np.ndarray:
    """The numbers below `high` that are not in each row, [R, high - count] int64, sorted."""
    inside = np.ones((rows.shape[0], high), dtype=bool)
    np.put_along_axis(inside, rows.astype(np.int64), values=False, axis=1)
    return np.nonzero(inside)[1].reshape(rows.shape[0], -1)
