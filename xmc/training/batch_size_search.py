"""How many rows fit into memory: two measured points, a line through them, and its confirmation.

The memory of a micro-batch of m rows is `fixed + per_row * m` to good approximation (weights'
gradients do not grow with m, activations grow with each row), as the tables of arXiv 2110.12484
(section 4) show; the paper leaves the size to the user.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

_SHARE = 0.9  # of the limit that an extrapolation may fill: the line is a line only roughly
_ANY = sys.maxsize  # rows, where memory does not grow with them
_GROWTH = 8  # the second point has at most so many times the rows of the first


@dataclass(frozen=True)
class MemoryFit:
    """`bytes(m) = fixed + per_row * m`."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, points: dict[int, int]) -> MemoryFit:
        """By the two largest of at least two measured sizes, {rows: bytes}."""
        small, large = sorted(points)[-2:]
        per_row = (points[large] - points[small]) / (large - small)
        return cls(points[small] - per_row * small, per_row)

    def bytes(self, rows: int) -> float:
        return self.fixed + self.per_row * rows

    def most_rows(self, limit: float) -> int | None:
        """The most rows within `limit` bytes, perhaps none; None: any number, memory is flat."""
        if self.per_row <= 0:
            return None
        return max(0, int((limit - self.fixed) // self.per_row))


@dataclass
class _Search:
    """What is known of micro-batches of one shape."""

    points: dict[int, int] = field(default_factory=dict)  # measured: rows -> bytes
    chosen: int | None = None  # rows by the line through the first two points
    failed: int | None = None  # the fewest rows that ran out of memory

    @property
    def confirmed(self) -> int:
        return max(self.points, default=0)


class AutoSize:
    """Chooses the rows of micro-batches by what earlier ones took; one for a whole training.

    The first micro-batches of real work are the measurements: `first` rows, then up to eight times
    as many, then what the line through both allows within 90% of `limit`, which counts as settled
    once it has run. A size that runs out of memory is halved, and nothing from it on is tried
    again. Every shape of rows (longer texts, say) is searched for itself; those of a `Bag` have
    none, so that bags much fuller than the first may take more than was measured. The sizes depend
    on the measurements alone: with `xmc.training.byte_meter` on a CPU they repeat from run to run.

    Args:
        limit: bytes that a micro-batch may take, beyond what is there before it. None, on CUDA
            alone: what is free on the device at the first use.
        first: rows of the first measurement.
        most: never more rows than these.

    Raises ValueError for numbers below 1, and for no limit on a CPU.
    """

    def __init__(
        self, limit: int | None = None, *, first: int = 8, most: int | None = None
    ) -> None:
        for name, value in (("limit", limit), ("first", first), ("most", most)):
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        self.limit = limit
        self.first = first
        self.most = most
        self._searches: dict[Hashable, _Search] = {}

    def limit_on(self, device: torch.device) -> int:
        """The limit, asking a CUDA device once where none was given."""
        if self.limit is None:
            if device.type != "cuda":
                raise ValueError(
                    f"expected a limit in bytes for micro-batches on {device}, got None: "
                    "only a CUDA device is asked what is free"
                )
            free, _ = torch.cuda.mem_get_info(device)
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            self.limit = free + cached
        return self.limit

    def propose(self, rows: int, shape: Hashable = ()) -> int:
        """Rows of the next micro-batch, at most `rows`."""
        search = self._searches.setdefault(shape, _Search())
        bounds = [self._wanted(search), rows, self.most or _ANY, (search.failed or _ANY) // 2]
        return max(1, min(bounds))

    def settled(self, size: int, shape: Hashable = ()) -> bool:
        """Whether so many rows are known to fit, and a measurement would tell nothing new."""
        search = self._searches.get(shape, _Search())
        return size in search.points or (search.chosen is not None and size <= search.confirmed)

    def succeeded(self, size: int, peak: int, shape: Hashable = ()) -> None:
        """A micro-batch of `size` rows took `peak` bytes."""
        search = self._searches.setdefault(shape, _Search())
        search.points[size] = peak
        if search.chosen is None and len(search.points) == 2 and self.limit is not None:
            most = MemoryFit.through(search.points).most_rows(_SHARE * self.limit)
            # What has run within the limit is no extrapolation.
            search.chosen = _ANY if most is None else max(most, search.confirmed)

    def ran_out(self, size: int, shape: Hashable = ()) -> None:
        """A micro-batch of `size` rows did not fit; whatever was known of such sizes is void."""
        search = self._searches.setdefault(shape, _Search())
        search.failed = min(size, search.failed or size)
        search.points = {m: peak for m, peak in search.points.items() if m < search.failed}

    def fit(self, shape: Hashable = ()) -> MemoryFit | None:
        """The line through the two largest measured sizes; None before there are two."""
        search = self._searches.get(shape, _Search())
        return MemoryFit.through(search.points) if len(search.points) > 1 else None

    def state(self) -> dict[str, Any]:
        """Everything found so far, for JSON; shapes are numbers or strings then."""
        searches = [[shape, dataclasses.asdict(found)] for shape, found in self._searches.items()]
        numbers = {"limit": self.limit, "first": self.first, "most": self.most}
        return {**numbers, "searches": searches}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> AutoSize:
        """What `state` was taken of."""
        size = cls(state["limit"], first=state["first"], most=state["most"])
        for shape, found in state["searches"]:
            points = {int(rows): peak for rows, peak in found["points"].items()}
            size._searches[shape] = _Search(points, found["chosen"], found["failed"])
        return size

    def _wanted(self, search: _Search) -> int:
        """By memory alone."""
        if search.chosen is not None:
            return search.chosen
        if not search.points or self.limit is None:
            return self.first
        # So many times the rows take at most so many times the memory, as `fixed` is not below 0:
        # a second point above the first is safe.
        [(rows, peak)] = search.points.items()
        more = min(_GROWTH * rows, int(rows * self.limit / max(peak, 1)))
        if more > rows:
            return more
        return rows // 2 or 2  # a point below it, or a trial
