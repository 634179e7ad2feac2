"""Labels shared out over threads, those of torch where possible.

A kernel is a C function of one record of addresses and numbers. All threads call it on the same
record and draw shares, contiguous ranges of labels, until none is left: what a share computes
depends on its number alone, so results do not depend on timing, nor on how many threads came.

Torch's own threads are borrowed through GNU OpenMP's entry point. Threads beside them would compete
with them: a pool spins for some milliseconds after each of torch's parallel loops, as long as a
small training step takes. numba's parallel loops are no way out: they start such threads, and its
default layer may not be entered from two threads at once.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIRST_FIELDS = ("next_share", "num_shares", "num_labels")


def record_type(*, addresses: str = "", integers: str = "", floats: str = "") -> np.dtype:
    """A record of FIRST_FIELDS and the named fields."""
    wide = [*FIRST_FIELDS, *addresses.split(), *integers.split()]
    narrow = floats.split()
    return np.dtype([(n, np.int64) for n in wide] + [(n, np.float32) for n in narrow], align=True)


def record(kind: np.dtype, **values: Any) -> np.ndarray:
    """One record; tensors and arrays are given by address (0 for None), so keep them alive."""
    out = np.zeros(1, kind)
    for name, value in values.items():
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif isinstance(value, np.ndarray):
            value = value.ctypes.data
        out[name] = 0 if value is None else value
    return out


PAGE = 4096  # bytes


def zeros(*shape: int, at: int = 0) -> np.ndarray:
    """Float32 zeros that start at a byte of a page, a multiple of 64.

    numpy's start 16 bytes after a cache line, where every load of 64 bytes takes two lines: that
    made the training step 1.4 times slower. Arrays written and read in turn should lie apart in
    their pages: a load waits for a store to the same place of another page (3 to 5% of the step).
    """
    size = math.prod(shape)
    room = np.zeros(size + PAGE // 4, np.float32)
    first = (at - room.ctypes.data) // 4 % (PAGE // 4)
    return room[first : first + size].reshape(shape)


def num_shares(num_labels: int, smallest: int = 256) -> int:
    """As many shares as torch has threads, but none below `smallest` labels."""
    return max(1, min(torch.get_num_threads(), num_labels // smallest))


def launch(kernel: Any, arguments: np.ndarray) -> None:
    """Call the kernel on its record from as many threads as there are shares, this one included."""
    arguments["next_share"] = 0
    count = int(arguments["num_shares"][0])
    if count == 1:
        _call(kernel, arguments)
    elif (parallel := _openmp()) is not None:
        parallel(kernel.address, arguments.ctypes.data, count, 0)
    else:
        pool = _pool(os.getpid(), count - 1)
        others = [pool.submit(_call, kernel, arguments) for _ in range(count - 1)]
        _call(kernel, arguments)
        for other in others:
            other.result()


def _call(kernel: Any, arguments: np.ndarray) -> None:
    # ctypes gives up Python's global lock for the call.
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address)(arguments.ctypes.data)


@functools.cache
def _openmp() -> Callable | None:
    """`GOMP_parallel(function, data, num_threads, flags)` of the OpenMP that torch runs on."""
    if not torch.backends.openmp.is_available() or os.name != "posix":
        return None
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    # Keyed by the process: threads do not survive a fork.
    return ThreadPoolExecutor(size, thread_name_prefix="xmc-kernels")
