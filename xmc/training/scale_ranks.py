"""How many ranks share a training, and what part of it the largest share is.

Rank 0 is the one that is counted: shares of rows and of labels differ by at most one, and those of
the first ranks are the larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataParallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Ranks:
    """The ranks of a planned training; one by default."""

    size: int = 1
    data_parallel: DataParallel = "ddp"
    """Of a transformer: replicated (ddp), or its weights divided too (fsdp)."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected at least 1 rank, got {self.size}")

    @property
    def others(self) -> int:
        """To each of which a rank sends what an all-gather gathers."""
        return self.size - 1

    def share(self, rows: int) -> int:
        """The most of these that a rank has."""
        return -(-rows // self.size)

    def divides(self, transformer: object) -> bool:
        """Whether weights of this encoder, None for bags, are divided over ranks."""
        return self.size > 1 and self.data_parallel == "fsdp" and transformer is not None


ALONE = Ranks()
