"""Labels shared out over threads.

Every share is a compiled function that runs without Python's global lock (`nogil`), on threads of
our own: numba's parallel loops may not be entered from two threads at once, and autograd runs
backward on a thread of its own. Shares are contiguous ranges of labels fixed by their number, so
results do not depend on timing.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def shares(num_labels: int, smallest: int = 256) -> list[tuple[int, int]]:
    """Ranges of labels, as many as torch has threads but none below `smallest` labels."""
    count = max(1, min(torch.get_num_threads(), num_labels // smallest))
    edges = [num_labels * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


@functools.cache
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    # Keyed by the process: threads do not survive a fork.
    return ThreadPoolExecutor(size, thread_name_prefix="xmc-kernels")


def run(function: Callable, calls: list[tuple]) -> list:
    """`function(*call)` for all calls at once, the first of them on the calling thread."""
    if len(calls) == 1:
        return [function(*calls[0])]
    pool = _pool(os.getpid(), len(calls) - 1)
    futures = [pool.submit(function, *call) for call in calls[1:]]
    return [function(*calls[0]), *(future.result() for future in futures)]
