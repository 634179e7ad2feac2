"""The scores of labels for a tile of rows."""

from __future__ import annotations

import numpy as np
from numba import njit

from xmc_kernels._cpu.blocks import add_labels, add_slots, fill_rows, repeat, store_rows, total
from xmc_kernels._cpu.vector import fill, store, width_of


@njit(forceinline=True)
def label_score(chains, x, base, weight, w, index, row, fan_in, bias):
    """`bias + sum_k weight[w + k] * x[index[row + k]]` of one label, in registers.

    All arrays are pointers. `chains` is a tuple of zeros: as many chains of multiply-adds as hide
    their latency.
    """
    whole = fan_in // len(chains) * len(chains)
    sums = repeat(1, fill(chains[0], bias)) + chains[1:]
    for k in range(0, whole, len(chains)):
        sums = add_slots(sums, x, base, weight, w + k, index, row + k)
    rest = (sums[0],)
    for k in range(whole, fan_in):
        rest = add_slots(rest, x, base, weight, w + k, index, row + k)
    return total(rest + sums[1:])


@njit(forceinline=True)
def block_scores(
    several, chains, a, x, base, weight, w, index, row, step, biases, first_bias, count, out, to
):
    """`out[to + i * width:] = biases[i] + sum_k weight[i, k] * x[index[i, k]]`, label by label.

    Weights begin at `w` and biases at `first_bias`; label i's index row at `row + i * step`.
    All arrays are pointers. `several` is a tuple of zeros, as many as labels are taken together
    where they share an index row (step = 0); for `chains` see `label_score`.
    """
    fan_in, width = a.fan_in, width_of(chains[0])
    at = 0
    if len(several) > 1:
        while at + len(several) <= count:
            sums = fill_rows(several, biases, first_bias + at)
            for k in range(fan_in):
                of_input = base + np.intp(index[row + k]) * width
                sums = add_labels(sums, x, of_input, weight, w + at * fan_in + k, fan_in)
            store_rows(out, to + at * width, sums)
            at += len(several)
    for i in range(at, count):
        first, own = w + i * fan_in, row + i * step
        bias = biases[first_bias + i]
        score = label_score(chains, x, base, weight, first, index, own, fan_in, bias)
        store(out, to + i * width, score)
