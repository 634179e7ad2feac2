"""Weighted sums of bags of rows on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from xmc_kernels._cpu import threads
from xmc_kernels._cpu.jit import kernel
from xmc_kernels._cpu.vector import at_address, next_share

ARGUMENTS = threads.record_type(addresses="x ids offsets weights out edges", integers="dim")


def bag_sum(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`reference.bag_sum` for float32; the same sums for any number of threads."""
    # numpy asks for huge pages: in a gradient of tens of megabytes, a fresh allocation of
    # torch's costs more in page faults than the sums themselves (14 ms against 2 for 58 MB).
    num_bags = offsets.shape[0] - 1
    out = np.empty((num_bags, x.shape[1]), dtype=np.float32)
    x, ids, offsets, weights = (t.detach().contiguous() for t in (x, ids, offsets, weights))
    shares = threads.num_shares(num_bags)
    # A bag costs its entries and one more for the row it writes; frequent features have long bags.
    cost = offsets.numpy() + np.arange(num_bags + 1)
    edges = np.searchsorted(cost, [cost[-1] * i // shares for i in range(shares + 1)])
    arguments = threads.record(
        ARGUMENTS,
        num_shares=shares,
        num_labels=num_bags,
        x=x,
        ids=ids,
        offsets=offsets,
        weights=weights,
        out=out,
        edges=edges.astype(np.int64),
        dim=x.shape[1],
    )
    threads.launch(_kernel(), arguments)
    return torch.from_numpy(out)


@njit(fastmath={"contract"}, error_model="numpy")
def _sum_bag(x, ids, weights, start, stop, out, at, dim):
    if start == stop:
        for d in range(dim):
            out[at + d] = 0
        return
    row, weight = ids[start] * dim, weights[start]
    for d in range(dim):
        out[at + d] = weight * x[row + d]
    for e in range(start + 1, stop):
        row, weight = ids[e] * dim, weights[e]
        for d in range(dim):
            out[at + d] += weight * x[row + d]


@functools.cache
def _kernel() -> Any:
    @kernel(ARGUMENTS)
    def bag_sum_shares(arguments):
        a = carray(arguments, 1)[0]
        x, weights = at_address(np.float32, a.x), at_address(np.float32, a.weights)
        ids, offsets = at_address(np.int64, a.ids), at_address(np.int64, a.offsets)
        out, edges = at_address(np.float32, a.out), at_address(np.int64, a.edges)
        share = next_share(arguments)
        while share < a.num_shares:
            for bag in range(edges[share], edges[share + 1]):
                start, stop = offsets[bag], offsets[bag + 1]
                _sum_bag(x, ids, weights, start, stop, out, bag * a.dim, a.dim)
            share = next_share(arguments)

    return bag_sum_shares
