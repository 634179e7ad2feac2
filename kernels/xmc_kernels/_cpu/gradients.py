"""What one label adds to the gradients, given the gradient of its scores."""

from __future__ import annotations

import numpy as np
from numba import njit

from xmc_kernels._cpu.vector import (
    add,
    dot_lanes,
    fill,
    fma,
    load,
    store,
    sum_rows,
    width_of,
)

_ZERO = np.float32(0)


@njit(forceinline=True)
def label_gradient(
    g, x, base, weight, w, index, row, fan_in, accumulate, d_weight, at_weight, d_x, partial
):
    """`d_x[row of index] += weight * g`, and `d_weight[at_weight:] = (or +=) x . g` for each input.

    Sixteen inputs at a time: their products with g leave sixteen partial sums each in `partial`
    (16 x 16), which are then summed together. All arrays are pointers.
    """
    width = width_of(g)
    for k in range(0, fan_in, 16):
        count = min(16, fan_in - k)
        for j in range(count):
            at = base + np.intp(index[row + k + j]) * width
            store(partial, j * 16, dot_lanes(load(g, x, at), g))
            store(d_x, at, fma(fill(g, weight[w + k + j]), g, load(g, d_x, at)))
        sums = sum_rows(partial)
        to = at_weight + k
        if count == 16:
            if accumulate:
                sums = add(sums, load(sums, d_weight, to))
            store(d_weight, to, sums)
        else:
            store(partial, 0, sums)
            for j in range(count):
                before = d_weight[to + j] if accumulate else _ZERO
                d_weight[to + j] = before + partial[j]
