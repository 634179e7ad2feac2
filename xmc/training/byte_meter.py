"""The most memory that a piece of work holds at once: of tensors on a CPU, of a CUDA device.

On a GPU the allocator knows. On a CPU the process's peak would say it badly: it never falls, it
holds what the C library has not given back, and it differs from run to run. `AllocationMeter`
counts the tensors that operations make, which is the same number in every run, on every system,
and lets a limit stop the work before memory is gone. It sees what autograd saves, gradients, and
temporaries between operations; it does not see memory inside a single operation (work space of a
library, buffers of a compiled kernel, all of a model under torch.compile).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryLimitError(MemoryError):
    """Work held more bytes than it was allowed."""


class Peak:
    """Bytes that measured work held at most, beyond what was there before."""

    bytes = 0


class AllocationMeter(TorchDispatchMode):
    """Counts bytes of tensors made inside `with`, on any device; `peak` is the most at once.

    Raises MemoryLimitError, out of the operation that passed it, the first time that `limit` bytes
    are exceeded.
    Costs some microseconds an operation. A storage counts once, until its last tensor is gone.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self._limit = limit
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # bytes of the storages that count, by address

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        old: set[int] | None = None
        for storage in _storages(out):
            if storage._cdata in self._sizes:
                continue
            if old is None:  # storages that came in: a view of one of them is no new memory
                old = {storage._cdata for storage in _storages((args, kwargs))}
            if storage._cdata not in old:
                self._count(storage)
        if self._limit is not None and self.live > self._limit:
            limit, self._limit = self._limit, None  # what cleans up after the error may go on
            raise MemoryLimitError(
                f"expected at most {limit:,} bytes of tensors at once, got {self.live:,}"
            )
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Those of all tensors in a structure; a sparse tensor has two."""
    for value in tree_leaves(values):
        if not isinstance(value, Tensor):
            continue
        if value.layout == torch.strided:
            yield value.untyped_storage()
        elif value.layout == torch.sparse_coo:
            yield value._indices().untyped_storage()
            yield value._values().untyped_storage()


@contextmanager
def measured(device: torch.device, limit: int | None = None) -> Iterator[Peak]:
    """The peak of the work inside, once it is done, beyond what the device held before.

    On a CPU a limit raises MemoryLimitError as soon as it is passed, on CUDA once the work is done:
    there the card's own limit raises torch.OutOfMemoryError.
    """
    peak = Peak()
    if device.type != "cuda":
        with AllocationMeter(limit) as meter:
            try:
                yield peak
            finally:
                peak.bytes = meter.peak
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated(device) - before
    if limit is not None and peak.bytes > limit:
        raise MemoryLimitError(
            f"expected at most {limit:,} bytes on {device} at once, got {peak.bytes:,}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at a time might go well: a device's, a limit's or the system's refusal."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # What torch's CPU allocator says has no class of its own; the second is its Windows wording.
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "can't allocate memory" in text or "not enough memory" in text
