"""Which rows of a tensor a rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowShard:
    """Rows `start` to `stop`, along dimension 0, of a tensor of `total` rows on all ranks."""

    start: int
    stop: int
    total: int

    @classmethod
    def whole(cls, total: int) -> RowShard:
        return cls(0, total, total)

    def __len__(self) -> int:
        return self.stop - self.start

    def per(self, group: int) -> RowShard:
        """Of a tensor with one row for each group of these, which the shard cuts nowhere."""
        return RowShard(self.start // group, self.stop // group, self.total // group)

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """The part of rows start..stop that is held here, counted like them; perhaps empty."""
        first = min(max(start, self.start), stop)
        return first, max(first, min(stop, self.stop))
