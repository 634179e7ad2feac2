"""One part of a prediction of memory."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Component:
    """Something that takes memory."""

    name: str
    bytes: int
    why: str
    """How the bytes come about, in words."""
    host: bool = False
    """Whether it lies in the machine's memory even where the model is on a GPU."""


def megabytes(size: float) -> str:
    """Decimal units, as memory is sold: 950 kB, 12.3 MB, 4.56 GB."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if size >= scale:
            return f"{size / scale:,.{digits}f} {unit}"
    return f"{size:.0f} B"
