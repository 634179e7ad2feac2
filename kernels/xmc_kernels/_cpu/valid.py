"""Whether index rows are sorted, distinct and in range, in one pass at memory speed."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from xmc_kernels._cpu.jit import compiled
from xmc_kernels.packing import slot_bits


@compiled
def _plain(index, in_features):
    for r in range(index.shape[0]):
        row = index[r]
        good = np.int64(row[0]) >= 0
        for k in range(1, row.shape[0]):
            good &= row[k] > row[k - 1]
        if not good or np.int64(row[-1]) >= in_features:
            return False
    return True


@compiled
def _packed(index, in_features, fan_in, bits, n, m):
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for r in range(index.shape[0]):
        row = index[r]
        word, held, at, last = np.uint64(0), 0, 0, -1
        for k in range(fan_in):
            while held < bits:
                word |= np.uint64(row[at]) << np.uint64(held)
                held += 8
                at += 1
            value = np.int64(word & mask) + k // n * m
            word >>= np.uint64(bits)
            held -= bits
            if value <= last:
                return False
            last = value
        if last >= in_features:
            return False
    return True


def index_is_valid(
    index: Tensor,  # [R, F] uint16 or int32, or [R, P] uint8 with a pattern, contiguous
    in_features: int,
    pattern: tuple[int, int] | None,
    fan_in: int,
) -> bool:
    """The rule of `checks.validate_index`, without a word about who breaks it."""
    rows = index.detach().numpy()
    if pattern is None:
        return bool(_plain(rows, in_features))
    return bool(_packed(rows, in_features, fan_in, slot_bits(pattern), *pattern))
