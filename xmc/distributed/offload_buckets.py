"""How parameters lie in flat host memory, and the buckets in which a step walks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 16
"""Numbers: every piece starts at a multiple of a cache line, and of any vector register."""


@dataclass(frozen=True)
class Piece:
    """A part of one parameter, in one bucket."""

    slot: int
    """Which parameter."""
    start: int
    """Its first number within the parameter, flattened."""
    length: int
    offset: int
    """Where it starts within the bucket."""


@dataclass(frozen=True)
class Bucket:
    """Consecutive numbers of the flat memory, copied together."""

    start: int
    length: int
    """Padding between pieces included."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies, whole, and the buckets that cover all of them in order."""

    starts: tuple[int, ...]
    length: int
    buckets: tuple[Bucket, ...]

    @property
    def longest(self) -> int:
        """Numbers of the longest bucket, which a buffer has to hold."""
        return max((bucket.length for bucket in self.buckets), default=0)


def lay_out(sizes: Sequence[int], bucket_size: int) -> Layout:
    """Parameters of so many numbers one after the other, in buckets of at most `bucket_size`.

    A parameter is cut at multiples of the bucket size from its own start, and a part that does not
    fit opens the next bucket. Its pieces are then the same whatever lies beside it, and so are the
    bits that a step computes: the set of parameters may differ between a run and its resumption.

    Raises ValueError for a bucket size that is no positive multiple of ALIGNMENT.
    """
    if bucket_size <= 0 or bucket_size % ALIGNMENT:
        raise ValueError(f"expected bucket_size in multiples of {ALIGNMENT}, got {bucket_size}")
    starts, buckets = [], []
    begin, length, pieces = 0, 0, list[Piece]()  # of the bucket that is being filled

    def close() -> None:
        nonlocal begin, length, pieces
        if pieces:
            buckets.append(Bucket(begin, length, tuple(pieces)))
        begin, length, pieces = begin + length, 0, []

    for slot, size in enumerate(sizes):
        for start in range(0, size, bucket_size):
            part = min(bucket_size, size - start)
            if length + part > bucket_size:
                close()
            if start == 0:
                starts.append(begin + length)
            pieces.append(Piece(slot, start, part, length))
            length += -(-part // ALIGNMENT) * ALIGNMENT
        if size == 0:
            starts.append(begin + length)
    close()
    return Layout(tuple(starts), begin, tuple(buckets))
