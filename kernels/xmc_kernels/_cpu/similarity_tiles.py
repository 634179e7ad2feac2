"""Sweeps over a tile of similarities: statistics of rows and columns, and gradients in its place.

A tile is float32 [num_rows, stride], row-major; columns from num_columns to stride, a multiple of
16, are padding. Threads draw strips of rows, so that a strip's sums depend on its number alone.
Exponentials take 0.4 cycles a number; each row and each column has a reference of its own, so that
nothing overflows, and no two of them share one.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray, njit

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.jit import compiled, kernel
from xmc_kernels._cpu.losses import bce, exp_nonpositive, settled, sum_of_value
from xmc_kernels._cpu.tiles import lower_bound
from xmc_kernels._cpu.vector import (
    add,
    at_address,
    fill,
    hmax,
    hsum,
    load,
    maximum,
    mul,
    next_share,
    select_negative,
    splat,
    store,
    sub,
)

STRIP = 64  # rows
LANES = 16
LOW = np.float32(-1e30)
"""A masked score. Finite, so that differences are numbers; no sum of products comes near it."""
_HALF_LOW = np.float32(-5e29)
_NEGLIGIBLE = np.float32(60)
"""exp(-60) is 0 beside the 1 of a row's largest: denormal products would cost some processors."""
_ZERO, _ONE = np.float32(0), np.float32(1)

ARGUMENTS = threads.record_type(
    addresses="""tile indptr indices same first_same last_same positive
    row_max row_sum strip_max strip_sum row_reference row_weight column_reference column_weight
    target row_loss row_bias""",
    integers="num_rows num_columns stride first_row first_column decoupled columns_too",
    floats="bias",
)


@njit(forceinline=True)
def exp_or_zero(x):
    """`exp(x)` for x up to about 0; 0 below -60."""
    return select_negative(add(x, fill(x, _NEGLIGIBLE)), fill(x, _ZERO), exp_nonpositive(x))


@njit(error_model="numpy")
def _designated(a, row):
    """Entries [start, stop) of a row's designated pairs that lie in the tile."""
    indptr, indices = at_address(np.int64, a.indptr), at_address(np.int32, a.indices)
    last, end = indptr[row + 1], a.first_column + a.num_columns
    start = lower_bound(indices, indptr[row], last, a.first_column)
    return start, lower_bound(indices, start, last, end)


@njit(error_model="numpy")
def _fill_masked(a, row, base, start, stop, value):
    """Write a value where the row's pairs are padding or masked by their ids."""
    tile, indices = at_address(np.float32, a.tile), at_address(np.int32, a.indices)
    for j in range(a.num_columns, a.stride):
        tile[base + j] = value
    if a.same == 0:
        return
    same = at_address(np.int32, a.same)
    first, last = at_address(np.int64, a.first_same), at_address(np.int64, a.last_same)
    entry, end = start, a.first_column + a.num_columns
    for at in range(lower_bound(same, first[row], last[row], a.first_column), last[row]):
        key = same[at]
        if key >= end:
            return
        while entry < stop and indices[entry] < key:
            entry += 1
        if entry == stop or indices[entry] != key:
            tile[base + key - a.first_column] = value


@njit(error_model="numpy")
def _prepare(a, row, base):
    """Keep the scores of designated pairs and mask what does not count."""
    tile, indices = at_address(np.float32, a.tile), at_address(np.int32, a.indices)
    positive = at_address(np.float32, a.positive)
    start, stop = _designated(a, row)
    for entry in range(start, stop):
        positive[entry] = tile[base + indices[entry] - a.first_column]
    _fill_masked(a, row, base, start, stop, LOW)
    if a.decoupled != 0:
        for entry in range(start, stop):
            tile[base + indices[entry] - a.first_column] = LOW


@njit(error_model="numpy")
def _merged(old_max, old_sum, new_max, new_sum):
    """Two sums of exponentials, each relative to its maximum, as one."""
    if new_max < _HALF_LOW:
        return old_max, old_sum
    fall = np.exp(-abs(np.float64(old_max) - np.float64(new_max)))
    if new_max > old_max:
        return new_max, new_sum + old_sum * fall
    return old_max, old_sum + new_sum * fall


@njit(error_model="numpy")
def _row_statistics(zero, tile, base, stride):
    """The largest number of a row and the sum of exponentials relative to it."""
    width = 4 * LANES
    whole = stride // width * width
    largest = fill(zero, LOW)
    a, b, c, d = largest, largest, largest, largest
    for j in range(0, whole, width):
        a = maximum(a, load(zero, tile, base + j))
        b = maximum(b, load(zero, tile, base + j + LANES))
        c = maximum(c, load(zero, tile, base + j + 2 * LANES))
        d = maximum(d, load(zero, tile, base + j + 3 * LANES))
    for j in range(whole, stride, LANES):
        a = maximum(a, load(zero, tile, base + j))
    top = hmax(maximum(maximum(a, b), maximum(c, d)))
    reference = fill(zero, top)
    a, b = zero, zero
    for j in range(0, stride - LANES, 2 * LANES):
        a = add(a, exp_or_zero(sub(load(zero, tile, base + j), reference)))
        b = add(b, exp_or_zero(sub(load(zero, tile, base + j + LANES), reference)))
    if stride % (2 * LANES) != 0:
        a = add(a, exp_or_zero(sub(load(zero, tile, base + stride - LANES), reference)))
    return top, hsum(add(a, b))


@njit(error_model="numpy")
def _column_statistics(zero, tile, base, stride, num_rows, into_max, into_sum, to):
    """The same of each column over num_rows rows, from `to` on."""
    for j in range(0, stride, LANES):
        top = load(zero, tile, base + j)
        for i in range(1, num_rows):
            top = maximum(top, load(zero, tile, base + i * stride + j))
        a, b = zero, zero
        for i in range(0, num_rows - 1, 2):
            a = add(a, exp_or_zero(sub(load(zero, tile, base + i * stride + j), top)))
            b = add(b, exp_or_zero(sub(load(zero, tile, base + (i + 1) * stride + j), top)))
        if num_rows % 2 != 0:
            last = base + (num_rows - 1) * stride + j
            a = add(a, exp_or_zero(sub(load(zero, tile, last), top)))
        store(into_max, to + j, top)
        store(into_sum, to + j, add(a, b))


@functools.cache
def statistics():
    """Mask a tile and merge its rows into (row_max, row_sum); each strip's columns apart."""

    @kernel(ARGUMENTS)
    def similarity_statistics(arguments):
        a = carray(arguments, 1)[0]
        tile = at_address(np.float32, a.tile)
        row_max, row_sum = at_address(np.float32, a.row_max), at_address(np.float64, a.row_sum)
        strip_max = at_address(np.float32, a.strip_max)
        strip_sum = at_address(np.float32, a.strip_sum)
        zero = splat(LANES, _ZERO)
        strip = next_share(arguments)
        while strip * STRIP < a.num_rows:
            start, stop = strip * STRIP, min((strip + 1) * STRIP, a.num_rows)
            for i in range(start, stop):
                row, base = a.first_row + i, i * a.stride
                _prepare(a, row, base)
                top, total = _row_statistics(zero, tile, base, a.stride)
                merged = _merged(row_max[row], row_sum[row], top, np.float64(total))
                row_max[row], row_sum[row] = merged
            if a.columns_too != 0:
                base, to = start * a.stride, strip * a.stride
                _column_statistics(
                    *(zero, tile, base, a.stride, stop - start, strip_max, strip_sum, to)
                )
            strip = next_share(arguments)

    return similarity_statistics


@compiled
def merge_strips(strip_max, strip_sum, column_max, column_sum):
    """Merge the columns of strips [strips, stride] into those of the batch, in order."""
    for j in range(len(column_max)):
        top, total = column_max[j], column_sum[j]
        for strip in range(len(strip_max)):
            new = np.float64(strip_sum[strip, j])
            top, total = _merged(top, total, strip_max[strip, j], new)
        column_max[j], column_sum[j] = top, total


@functools.cache
def gradients():
    """Overwrite a tile of scores with `dL/dS` of the softmax loss."""

    @kernel(ARGUMENTS)
    def similarity_gradients(arguments):
        a = carray(arguments, 1)[0]
        tile, indices = at_address(np.float32, a.tile), at_address(np.int32, a.indices)
        row_reference = at_address(np.float32, a.row_reference)
        row_weight = at_address(np.float32, a.row_weight)
        # By position in the tile; one stride of each is padded.
        column_reference = at_address(np.float32, a.column_reference)
        column_weight = at_address(np.float32, a.column_weight)
        target = at_address(np.float32, a.target)
        zero = splat(LANES, _ZERO)
        strip = next_share(arguments)
        while strip * STRIP < a.num_rows:
            for i in range(strip * STRIP, min((strip + 1) * STRIP, a.num_rows)):
                row, base = a.first_row + i, i * a.stride
                reference, weight = fill(zero, row_reference[row]), fill(zero, row_weight[row])
                if a.columns_too != 0:
                    for j in range(0, a.stride, LANES):
                        s = load(zero, tile, base + j)
                        g = mul(weight, exp_or_zero(sub(s, reference)))
                        e = exp_or_zero(sub(s, load(zero, column_reference, j)))
                        store(tile, base + j, add(g, mul(load(zero, column_weight, j), e)))
                else:
                    for j in range(0, a.stride, LANES):
                        e = exp_or_zero(sub(load(zero, tile, base + j), reference))
                        store(tile, base + j, mul(weight, e))
                start, stop = _designated(a, row)
                _fill_masked(a, row, base, start, stop, _ZERO)
                for entry in range(start, stop):
                    at = base + indices[entry] - a.first_column
                    tile[at] = (_ZERO if a.decoupled != 0 else tile[at]) - target[entry]
            strip = next_share(arguments)

    return similarity_gradients


@functools.cache
def sigmoid_gradients():
    """Overwrite a tile of scores with `dL/dS` of the sigmoid loss; add up loss and dL/dbias.

    `decoupled` takes designated pairs out of the vectors: they are done one by one.
    """

    @kernel(ARGUMENTS)
    def similarity_sigmoid(arguments):
        a = carray(arguments, 1)[0]
        tile, indices = at_address(np.float32, a.tile), at_address(np.int32, a.indices)
        row_weight = at_address(np.float32, a.row_weight)
        row_loss, row_bias = at_address(np.float64, a.row_loss), at_address(np.float64, a.row_bias)
        positive = at_address(np.float32, a.positive)
        zero = splat(LANES, _ZERO)
        bias = splat(LANES, a.bias)
        negligible = splat(LANES, _NEGLIGIBLE)
        strip = next_share(arguments)
        while strip * STRIP < a.num_rows:
            for i in range(strip * STRIP, min((strip + 1) * STRIP, a.num_rows)):
                row, base = a.first_row + i, i * a.stride
                _prepare(a, row, base)
                start, stop = _designated(a, row)
                weight = fill(zero, row_weight[row])
                value, slopes = (zero, zero), zero
                for first in range(0, a.stride, 32 * LANES):
                    for j in range(first, min(first + 32 * LANES, a.stride), LANES):
                        z = add(load(zero, tile, base + j), bias)
                        sigmoid, value = bce(z, value)
                        sigmoid = select_negative(add(z, negligible), zero, sigmoid)
                        slopes = add(slopes, sigmoid)
                        store(tile, base + j, mul(weight, sigmoid))
                    value = settled(value)
                total = np.float64(hsum(sum_of_value(value)))
                slope_total = np.float64(hsum(slopes))
                for entry in range(start, stop):
                    logit = np.float64(positive[entry]) + np.float64(a.bias)
                    e = np.exp(-abs(logit))
                    total += np.log1p(e) + max(-logit, 0.0)
                    slope = (e if logit > 0 else 1.0) / (1.0 + e)
                    slope_total -= slope
                    at = base + indices[entry] - a.first_column
                    tile[at] = -row_weight[row] * np.float32(slope)
                row_loss[row] += total
                row_bias[row] += slope_total
            strip = next_share(arguments)

    return similarity_sigmoid
