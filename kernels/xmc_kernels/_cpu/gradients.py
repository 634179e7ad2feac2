"""What a block of labels adds to the gradients, given the gradients of its scores."""

from __future__ import annotations

from numba import njit, types
from numba.extending import overload

from xmc_kernels._cpu.bfloat16 import narrow
from xmc_kernels._cpu.blocks import add_gradient, add_gradients, load_rows
from xmc_kernels._cpu.vector import LANES, bits_of, width_of


@njit(forceinline=True)
def label_gradients(grads, x, d_x, base, weight, w, index, row, fan_in, into, to):
    """`d_x[index row] += weight[t] * grads[t]`; `into[to + t F + k] += x[index k] . grads[t]`.

    All arrays are pointers; `grads` holds the gradients of labels that share the index row.
    """
    inputs = LANES // len(grads)
    whole = fan_in // inputs * inputs
    for k in range(0, whole, inputs):
        add_gradients(grads, x, d_x, base, weight, w + k, fan_in, index, row + k, into, to + k)
    for k in range(whole, fan_in):
        add_gradient(grads, x, d_x, base, weight, w + k, fan_in, index, row + k, into, to + k)


@njit(forceinline=True)
def block_gradients(
    several, one, a, x, d_x, base, weight, w, index, row, step, grads, at, count, into, to
):
    """`d_x[index row i] += weight[i] * g[i]`; `into[to + i F + k] += x[index i, k] . g[i]`,
    where g begins at `grads[at]`.

    All arrays are pointers; `several` and `one` are tuples as in `block_scores`.
    """
    fan_in, width = a.fan_in, width_of(one[0])
    done = 0
    if len(several) > 1:
        while done + len(several) <= count:
            g = load_rows(several, grads, at + done * width)
            label_gradients(
                *(g, x, d_x, base, weight, w + done * fan_in, index, row, fan_in),
                *(into, to + done * fan_in),
            )
            done += len(several)
    for i in range(done, count):
        g = load_rows(one, grads, at + i * width)
        label_gradients(
            *(g, x, d_x, base, weight, w + i * fan_in, index, row + i * step, fan_in),
            *(into, to + i * fan_in),
        )


def store_gradients(sums, count, into, at):
    """`into[at : at + count] = sums[:count]`, rounded to nearest if that is bfloat16."""
    raise NotImplementedError  # the kernels' is below


@overload(store_gradients)
def _store_gradients(sums, count, into, at):
    def float32(sums, count, into, at):
        for i in range(count):
            into[at + i] = sums[i]

    def bfloat16(sums, count, into, at):
        narrow(bits_of(sums), count, into, at)

    return bfloat16 if into.dtype == types.uint16 else float32
