"""What one label adds to the gradients, given the gradient of its scores."""

from __future__ import annotations

import numpy as np
from numba import njit

from xmc_kernels._cpu.vector import (
    add,
    dot_lanes,
    fill,
    fma,
    hsum,
    load,
    store,
    sum_rows,
    width_of,
)

_ZERO = np.float32(0)


@njit(forceinline=True)
def _input(g, x, base, weight, w, index, row, d_x):
    """`d_x[its row] += weight * g` for one input; returns sixteen partial sums of `x . g`."""
    at = base + np.intp(index[row]) * width_of(g)
    store(d_x, at, fma(fill(g, weight[w]), g, load(g, d_x, at)))
    return dot_lanes(load(g, x, at), g)


@njit(forceinline=True)
def label_gradient(g, x, base, weight, w, index, row, fan_in, more, d_weight, to, d_x):
    """`d_x[rows of index] += weight * g`; `d_weight[to:] = x . g` for each input (+= if `more`).

    All arrays are pointers. Sixteen inputs at a time keep their sums in registers until they are
    added up together, hence no loop over them.
    """
    whole = fan_in // 16 * 16
    for k in range(0, whole, 16):
        i, j = w + k, row + k
        sums = sum_rows(
            (
                _input(g, x, base, weight, i + 0, index, j + 0, d_x),
                _input(g, x, base, weight, i + 1, index, j + 1, d_x),
                _input(g, x, base, weight, i + 2, index, j + 2, d_x),
                _input(g, x, base, weight, i + 3, index, j + 3, d_x),
                _input(g, x, base, weight, i + 4, index, j + 4, d_x),
                _input(g, x, base, weight, i + 5, index, j + 5, d_x),
                _input(g, x, base, weight, i + 6, index, j + 6, d_x),
                _input(g, x, base, weight, i + 7, index, j + 7, d_x),
                _input(g, x, base, weight, i + 8, index, j + 8, d_x),
                _input(g, x, base, weight, i + 9, index, j + 9, d_x),
                _input(g, x, base, weight, i + 10, index, j + 10, d_x),
                _input(g, x, base, weight, i + 11, index, j + 11, d_x),
                _input(g, x, base, weight, i + 12, index, j + 12, d_x),
                _input(g, x, base, weight, i + 13, index, j + 13, d_x),
                _input(g, x, base, weight, i + 14, index, j + 14, d_x),
                _input(g, x, base, weight, i + 15, index, j + 15, d_x),
            )
        )
        if more:
            sums = add(sums, load(sums, d_weight, to + k))
        store(d_weight, to + k, sums)
    for k in range(whole, fan_in):
        total = hsum(_input(g, x, base, weight, w + k, index, row + k, d_x))
        d_weight[to + k] = total + (d_weight[to + k] if more else _ZERO)
