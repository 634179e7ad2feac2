"""Device copies of one bucket after the other, the next on its way while one is computed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, cuda

from xmc.distributed.offload_buckets import Bucket

NUM_BUFFERS = 2


def walk(
    buckets: Sequence[Bucket],
    rows: Sequence[Tensor],  # [N] each, in host memory
    device: torch.device,
    *,
    staged: bool,
) -> Iterator[tuple[Bucket, list[Tensor]]]:
    """Each bucket with its part of `rows` on the device, which the caller changes in place.

    A bucket's rows are valid until the next is asked for; then they travel home. On CUDA copies in
    and copies out have a stream each, and the caller computes on the current one: while bucket i is
    computed on, i + 1 comes in and i - 1 goes out. The host rows hold the result when the current
    stream is done with all that was enqueued on it before the last iteration returned.

    Holds two buffers of the longest bucket while it runs. Without `staged` rows are those of the
    host themselves.
    """
    if not staged:
        for bucket in buckets:
            yield bucket, _part(rows, bucket)
        return
    if not buckets:
        return
    longest = max(bucket.length for bucket in buckets)
    buffers = [
        [torch.empty(longest, dtype=row.dtype, device=device) for row in rows]
        for _ in range(min(NUM_BUFFERS, len(buckets)))
    ]
    lanes = _Lanes(device)
    try:
        lanes.fetch(0, _part(rows, buckets[0]), buffers[0])
        for number, bucket in enumerate(buckets):
            if number + 1 < len(buckets):
                target = buffers[(number + 1) % NUM_BUFFERS]
                lanes.fetch(number + 1, _part(rows, buckets[number + 1]), target)
            lanes.await_fetched(number)
            buffer = [row[: bucket.length] for row in buffers[number % NUM_BUFFERS]]
            yield bucket, buffer
            lanes.send_home(number, buffer, _part(rows, bucket))
    finally:
        lanes.join()


class _Lanes:
    """The two streams of copies and what they wait for; on other devices copies are in order."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = _has_streams(device)
        if self._cuda:
            self._compute = cuda.current_stream(device)
            self._inward, self._outward = (cuda.Stream(device) for _ in range(2))
            self._fetched, self._home = (
                [cuda.Event() for _ in range(NUM_BUFFERS)] for _ in range(2)
            )
            # Buffers may be memory that the current stream was still using a moment ago.
            self._inward.wait_stream(self._compute)

    def fetch(self, number: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy bucket `number` in, once the bucket that had its buffer before is home."""
        slot = number % NUM_BUFFERS
        if self._cuda and number >= NUM_BUFFERS:
            self._inward.wait_event(self._home[slot])
        with self._on(inward=True):
            for source, target in zip(sources, targets, strict=True):
                target[: len(source)].copy_(source, non_blocking=True)
        if self._cuda:
            self._fetched[slot].record(self._inward)

    def await_fetched(self, number: int) -> None:
        """What is enqueued from now on runs after the bucket has arrived."""
        if self._cuda:
            self._compute.wait_event(self._fetched[number % NUM_BUFFERS])

    def send_home(self, number: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy bucket `number` out, after all that was enqueued on it."""
        if self._cuda:
            self._outward.wait_stream(self._compute)
        with self._on(inward=False):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        if self._cuda:
            self._home[number % NUM_BUFFERS].record(self._outward)

    def join(self) -> None:
        """Later work on the current stream, which may get the buffers' memory, waits for all."""
        if self._cuda:
            self._compute.wait_stream(self._inward)
            self._compute.wait_stream(self._outward)

    def _on(self, *, inward: bool) -> AbstractContextManager[object]:
        if not self._cuda:
            return nullcontext()
        return cuda.stream(self._inward if inward else self._outward)


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def _part(rows: Sequence[Tensor], bucket: Bucket) -> list[Tensor]:
    return [row[bucket.start : bucket.start + bucket.length] for row in rows]
