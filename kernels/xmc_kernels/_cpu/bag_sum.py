"""Weighted sums of bags of rows on the CPU."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from xmc_kernels._cpu.threads import run, shares


def bag_sum(x: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`reference.bag_sum` for float32; the same sums for any number of threads."""
    # numpy asks for huge pages: in a gradient of tens of megabytes, a fresh allocation of
    # torch's costs more in page faults than the sums themselves (14 ms against 2 for 58 MB).
    out = np.empty((offsets.shape[0] - 1, x.shape[1]), dtype=np.float32)
    arrays = [tensor.detach().contiguous().numpy() for tensor in (x, ids, offsets, weights)]
    # A bag costs its entries and one more for the row it writes; frequent features have long bags.
    cost = arrays[2] + np.arange(offsets.shape[0])
    count = len(shares(out.shape[0]))
    edges = np.searchsorted(cost, [cost[-1] * i // count for i in range(count + 1)])
    run(_bag_sum, [(*arrays, out, start, stop) for start, stop in itertools.pairwise(edges)])
    return torch.from_numpy(out)


@njit(nogil=True, fastmath={"contract"}, error_model="numpy", cache=True)
def _bag_sum(x, ids, offsets, weights, out, first, last):
    dim = x.shape[1]
    for u in range(first, last):
        start, stop = offsets[u], offsets[u + 1]
        total = out[u]
        if start == stop:
            total[:] = 0
            continue
        row, weight = x[ids[start]], weights[start]
        for d in range(dim):
            total[d] = weight * row[d]
        for e in range(start + 1, stop):
            row, weight = x[ids[e]], weights[e]
            for d in range(dim):
                total[d] += weight * row[d]
