"""Copies of micro-batches to a device, the next one while the present one is computed.

MBP streams its micro-batches (arXiv 2110.12484, section 3.2). From pageable memory a copy blocks
the host; here two pinned buffers take turns, a stream of its own carries the copies, and events
keep order: a buffer is not written again before its copy is done, and the computing stream waits
for the copy that it reads, for no other. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xmc.training.chunks import map_tensors, tensors

_SLOTS = 2  # one copy in flight, one being computed
_ALIGNMENT = 64  # bytes, of tensors inside a pinned buffer


class Event(Protocol):
    """A point in the copies' stream."""

    def synchronize(self) -> None:
        """Make the host wait for it."""
        ...


class Engine(Protocol):
    """What a device does; a stand-in of it tests the order on a machine without one."""

    def pinned(self, num_bytes: int) -> Tensor:
        """A buffer [num_bytes] uint8 that copies can read beside the host's work."""
        ...

    def copy(self, host: Tensor) -> Tensor:
        """Begin a copy of a pinned tensor in the copies' stream."""
        ...

    def record(self) -> Event:
        """After all copies begun so far."""
        ...

    def wait(self, event: Event) -> None:
        """Make the computing stream wait, not the host."""
        ...

    def hand_over(self, tensor: Tensor) -> None:
        """Tell the allocator that the computing stream reads a copy."""
        ...


class CudaEngine:
    """Copies to a CUDA device in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, host: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            return host.to(self.device, non_blocking=True)

    def record(self) -> Event:
        event: Event = self._stream.record_event()
        return event

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)  # type: ignore[arg-type]

    def hand_over(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self.device))


@dataclass(frozen=True)
class InFlight:
    """A micro-batch on its way; `event` is None where there is nothing to wait for."""

    part: Any
    event: Event | None = None


@dataclass
class _Slot:
    """A pinned buffer and the copy that last read it."""

    buffer: Tensor | None = None
    event: Event | None = None


class Copies:
    """Begins copies (`start`) and hands them to the computing stream (`take`).

    Without an engine the device is reached by `Tensor.to`, which on the CPU copies nothing; without
    a device everything stays where it is. At most two may be in flight. A copy that was started and
    is not wanted is just dropped.
    """

    def __init__(self, device: torch.device | str | None, engine: Engine | None = None) -> None:
        self._device = None if device is None else torch.device(device)
        self._engine = engine
        self._slots = [_Slot() for _ in range(_SLOTS)]
        self._next = 0

    @property
    def overlaps(self) -> bool:
        """Whether it is of use to start a copy before it is taken."""
        return self._engine is not None

    def start(self, part: Any) -> InFlight:
        """Begin the copy of a structure (`xmc.training.chunks`)."""
        engine, device = self._engine, self._device
        if device is None:
            return InFlight(part)
        if engine is None:
            return InFlight(map_tensors(part, lambda tensor: tensor.to(device)))
        slot = self._slots[self._next]
        self._next = (self._next + 1) % _SLOTS
        if slot.event is not None:
            slot.event.synchronize()  # the device has read what the buffer held
        copied = map_tensors(part, _Copier(engine, slot, part, device))
        slot.event = engine.record()
        return InFlight(copied, slot.event)

    def take(self, copy: InFlight) -> Any:
        """The structure on the device, safe to compute with in the present stream."""
        engine = self._engine
        if engine is None or copy.event is None:
            return copy.part
        engine.wait(copy.event)

        def hand_over(tensor: Tensor) -> Tensor:
            engine.hand_over(tensor)
            return tensor

        return map_tensors(copy.part, hand_over)


class _Copier:
    """Copies the host's tensors of one structure through one pinned buffer."""

    def __init__(self, engine: Engine, slot: _Slot, part: Any, device: torch.device) -> None:
        self._engine = engine
        self._device = device
        self._used = 0
        size = sum(_padded(tensor.numel() * tensor.itemsize) for _, tensor in tensors(part))
        if slot.buffer is None or len(slot.buffer) < size:
            slot.buffer = engine.pinned(size)
        self._buffer = slot.buffer

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or tensor.requires_grad:
            return tensor.to(self._device)  # no copy, or one that autograd has to know of
        size = tensor.numel() * tensor.itemsize
        held = self._buffer[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += _padded(size)
        held.copy_(tensor)
        return self._engine.copy(held)


class AheadCopies:
    """Slices of a batch on the device; the one that probably follows is on its way already."""

    def __init__(self, slice_of: Callable[[int, int], Any], rows: int, copies: Copies) -> None:
        self._slice_of = slice_of  # (start, stop) -> rows of the batch
        self._rows = rows
        self._copies = copies
        self._begun: tuple[int, int, InFlight] | None = None

    def take(self, start: int, stop: int) -> Any:
        """Rows `start` to `stop`, and begin the copy of as many that follow."""
        copy = self._begun[2] if self._begun and self._begun[:2] == (start, stop) else None
        self._begun = None
        copy = copy or self._copies.start(self._slice_of(start, stop))
        if self._copies.overlaps and stop < self._rows:
            following = stop, min(2 * stop - start, self._rows)
            self._begun = *following, self._copies.start(self._slice_of(*following))
        return self._copies.take(copy)

    def drop(self) -> None:
        """Give up the copy on its way, whose memory is wanted."""
        self._begun = None


def make_copies(device: torch.device | str | None) -> Copies:
    """Overlapping on CUDA, plain elsewhere, none for None."""
    if device is None:
        return Copies(None)
    device = torch.device(device)
    return Copies(device, CudaEngine(device) if device.type == "cuda" else None)


def stream(parts: Iterable[Any], copies: Copies) -> Iterator[Any]:
    """The parts on the device, in order, the copy of each begun before the one before is given.

    Reads one part ahead where copies overlap, none elsewhere.
    """
    ahead: InFlight | None = None
    for part in parts:
        if not copies.overlaps:
            yield copies.take(copies.start(part))
            continue
        begun = copies.start(part)
        if ahead is not None:
            yield copies.take(ahead)
        ahead = begun
    if ahead is not None:
        yield copies.take(ahead)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
