"""How long the inputs of a label stay: ages of slots, followed on a sample of index rows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc.distributed.collectives import World, sum_
from xmc.distributed.sharding import RowShard

_MAX_ROWS = 4096


@dataclass(frozen=True)
class AgeReport:
    """Ages in rewirings: 0 for a slot that the last one replaced. Over the sampled rows."""

    survival: float
    """Share of slots never replaced: what is left of the very first pattern. An input that was
    pruned and grown again does not count."""
    mean: float
    p10: int
    p50: int
    p90: int
    """Quantiles: the least age that at least this share of the slots does not exceed."""

    def to_dict(self) -> dict[str, int | float]:
        """Plain numbers for a log."""
        return {
            "survival": self.survival,
            "age_mean": self.mean,
            "age_p10": self.p10,
            "age_p50": self.p50,
            "age_p90": self.p90,
        }


class SlotAges:
    """Ages of the slots of at most 4,096 evenly spaced index rows, whatever the number of labels.

    `tensors()` is its whole state, by name and sharing storage, to be saved and loaded into. On
    several ranks each follows those of the sampled rows that are in its shard, and the report is
    of all.
    """

    def __init__(
        self,
        num_rows: int,  # on all ranks
        fan_in: int,
        *,
        max_rows: int = _MAX_ROWS,
        device: torch.device | None = None,
        world: World | None = None,  # None: alone
        shard: RowShard | None = None,  # None: all rows
    ) -> None:
        self.world = world or World.alone()
        shard = shard or RowShard.whole(num_rows)
        sampled = min(num_rows, max_rows)
        rows = [i * num_rows // sampled for i in range(sampled)]
        self._shard = RowShard(
            bisect_left(rows, shard.start), bisect_left(rows, shard.stop), sampled
        )
        # Counted from the first row of the shard.
        self.rows = [row - shard.start for row in rows[self._shard.start : self._shard.stop]]
        self.age = torch.zeros(len(self.rows), fan_in, dtype=torch.int32, device=device)
        self.rewirings = torch.zeros((), dtype=torch.int64, device=device)
        self.num_rows = num_rows

    def move_(
        self,
        start: int,
        stop: int,
        lost: Tensor,  # [stop - start, F] bool, slots replaced
        order: Tensor,  # [stop - start, F] int64, old slot of each new one
    ) -> None:
        """Follow the rewiring of index rows start..stop."""
        first, last = bisect_left(self.rows, start), bisect_left(self.rows, stop)
        local = torch.tensor(self.rows[first:last], dtype=torch.int64, device=lost.device) - start
        older = (self.age[first:last] + 1).masked_fill_(lost[local], 0)
        self.age[first:last] = older.gather(1, order[local])

    def report(self) -> AgeReport:
        """The state after the rewirings counted so far; one all-reduce of a number for each."""
        num_ages = int(self.rewirings) + 1
        counts = sum_(torch.bincount(self.age.flatten(), minlength=num_ages).cpu(), self.world)
        total = int(counts.sum())
        shares = counts.double().cumsum(0) / total
        # A hair below, so that rounding of the sum cannot push a share past its quantile.
        p10, p50, p90 = (int(torch.searchsorted(shares, q - 1e-9)) for q in (0.1, 0.5, 0.9))
        mean = int((counts * torch.arange(len(counts))).sum()) / total
        return AgeReport(int(counts[num_ages - 1]) / total, mean, p10, p50, p90)

    def tensors(self) -> dict[str, Tensor]:
        return {"slot_age": self.age, "rewirings": self.rewirings}

    def row_shards(self) -> dict[str, RowShard]:
        """Which rows of the sampled ones are here, by the name of their tensor; empty for all."""
        return {} if self.world.size == 1 else {"slot_age": self._shard}
