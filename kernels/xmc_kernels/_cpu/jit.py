"""How the CPU kernels are compiled and kept on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, from_dtype, njit, types

from xmc_kernels._cpu.threads import FIRST_FIELDS


@functools.cache
def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def _renamed(function: Callable) -> Callable:
    """The function under a name of this version of the package.

    numba renews its cache only when the function's own file changes, but kernels inline helpers
    of other files; the name is part of the cache's key.
    """
    function.__qualname__ += "_" + _digest()
    return function


def compiled(function: Callable) -> Any:
    """`function` compiled at its first call and cached on disk."""
    return njit(cache=True, nogil=True, error_model="numpy")(_renamed(function))


def kernel(arguments: np.dtype) -> Callable[[Callable], Any]:
    """Compile a C function of one pointer to a record of `arguments`, for `threads.launch`."""
    assert arguments.names is not None
    assert arguments.names[: len(FIRST_FIELDS)] == FIRST_FIELDS
    signature = types.void(types.CPointer(from_dtype(arguments)))

    def decorate(function: Callable) -> Any:
        return cfunc(signature, cache=True, error_model="numpy")(_renamed(function))

    return decorate
