"""How the CPU kernels are compiled and kept on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from numba import njit


@functools.cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def compiled(function: Callable) -> Callable:
    """`function` compiled at its first call, without Python's global lock and cached on disk.

    numba renews its cache only when the function's own file changes, but kernels inline helpers
    of other files: the digest of all of them becomes part of the cached name.
    """
    function.__qualname__ += "_" + _digest()
    return njit(cache=True, nogil=True, error_model="numpy")(function)
