"""How long a rank computes, waits and communicates within a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepReport:
    """Where the time of one step of one rank went, and how much it held at once."""

    seconds: float  # of the step on this rank
    busy_seconds: float  # in forward and backward passes and the loss; on a GPU as the GPU saw it
    reducing_seconds: float  # in sums over replicas
    max_in_flight: int  # most micro-batches whose activations were held at once
    num_micro_batches: int  # of this replica
    bytes_sent: int  # to neighbours

    @property
    def waiting_seconds(self) -> float:
        """For messages: the rest."""
        return max(self.seconds - self.busy_seconds - self.reducing_seconds, 0.0)

    @property
    def idle_share(self) -> float:
        """Waiting time over the time of the step."""
        return self.waiting_seconds / self.seconds if self.seconds else 0.0

    def __add__(self, other: StepReport) -> StepReport:
        """Of two sweeps over the same micro-batches, one after the other."""
        return StepReport(
            self.seconds + other.seconds,
            self.busy_seconds + other.busy_seconds,
            self.reducing_seconds + other.reducing_seconds,
            max(self.max_in_flight, other.max_in_flight),
            max(self.num_micro_batches, other.num_micro_batches),
            self.bytes_sent + other.bytes_sent,
        )


class StepClock:
    """Adds up the time of passes: by the clock, or on a GPU between events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        self._busy = 0.0
        self._reducing = 0.0
        self._passes: list[tuple[Any, Any]] = []  # events at the start and end of each

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around one pass. On a GPU waits for the pass before: one may be queued, not more.

        Otherwise a rank would choose its next pass long before the GPU comes to it.
        """
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._busy += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(self._device)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record(stream)
        yield
        end_event.record(stream)
        self._wait_for_last()
        self._passes.append((start_event, end_event))

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Around a sum over replicas; waits for the passes before it."""
        self._wait_for_last()
        start = time.perf_counter()
        yield
        self._reducing += time.perf_counter() - start

    def report(self, *, max_in_flight: int, num_micro_batches: int, bytes_sent: int) -> StepReport:
        """The time until now, all passes done."""
        self._wait_for_last()
        if self._passes:
            self._busy += sum(start.elapsed_time(end) for start, end in self._passes) / 1000
            self._passes = []
        seconds = time.perf_counter() - self._start
        return StepReport(
            seconds, self._busy, self._reducing, max_in_flight, num_micro_batches, bytes_sent
        )

    def _wait_for_last(self) -> None:
        if self._passes:
            self._passes[-1][1].synchronize()
