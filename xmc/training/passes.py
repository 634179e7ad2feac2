"""Encoder passes of a training that fit into a memory the user states (`train.memory_limit`).

How a step is cut into passes changes its memory, not its gradient (`xmc.heads.head`), up to
rounding and the masks of dropout. The rows of a pass are found as in `xmc.training.micro_batch`, by
trial passes that change nothing: real passes would not do, because a head that has taken its
gradient, or its step, cannot give it back.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc.config import Config, ConfigError
from xmc.data.batches import Dataset, TokenStore
from xmc.memory import resident_bytes
from xmc.training.batch_size_search import AutoSize
from xmc.training.byte_meter import is_out_of_memory, measured
from xmc.training.memory_component import megabytes
from xmc.training.planner import device_memory, parse_memory
from xmc.types import Batch, Tokens


class Passing(Protocol):
    """What takes the passes: a trainer."""

    def trial(self, batch: Batch) -> None:
        """A pass forward and backward, as one of several, that leaves everything as it was."""
        ...

    def untouched_bytes(self) -> int:
        """Memory that any step will take, and that is neither there yet nor that of a pass."""
        ...

    def several_bytes(self, rows: Tensor) -> int:
        """What a step on rows [R] takes beyond trials and that, if it has several passes."""
        ...

    def single_saving(self) -> int:
        """What a trial takes and the only pass of a step does not."""
        ...


class FittingPasses:
    """Cuts the rows of steps into passes, as large as a limit of memory allows.

    The limit is that of the process (CPU) or of what this process allocates on a card, and what is
    there before the first pass counts. Longer texts take more memory: there is a search for each
    width of a batch, rounded up, with rows padded to that width, so that sizes hold whatever rows
    come. Bags are tried in one pass first: the rows of their table that a step touches are most of
    its memory, and several passes have to add up a gradient of them.

    On a CPU tensors are counted: see `xmc.training.byte_meter` for what that leaves out. Of the
    room that there is a part stays free for it.
    """

    def __init__(
        self,
        train_set: Dataset,
        device: torch.device,
        passing: Passing,
        *,
        limit: int,
        most: int,
        widest: int,
    ) -> None:
        self._train_set = train_set
        self._store = train_set.features if isinstance(train_set.features, TokenStore) else None
        self._device = device
        self._passing = passing
        self._limit = limit
        self._most = most
        self._widest = widest  # tokens of a row, at most
        self._sizes: AutoSize | None = None  # made at the first step
        self._room_for_one = 0  # bytes, of the only pass of a step
        self._whole: dict[int, bool] = {}  # whether so many bags fit in one pass
        self._news: dict[int, int] = {}

    def cut(self, rows: Tensor) -> list[Tensor]:
        """Slices of the rows [R] int64 of a step; rows of tokens sorted, the widest first.

        Raises ConfigError where not even one row fits.
        """
        if self._sizes is None:
            # Compiles kernels and loads libraries, whose memory is not that of a pass.
            self._passing.trial(self._train_set.batch(rows[:1]))
            self._sizes = self._make_sizes(rows)
        if self._store is None and self._fits_whole(rows):
            return [rows]
        if self._sizes.limit == _NOTHING:
            raise ConfigError(
                f"train.memory_limit: a step over {len(rows)} rows takes more than "
                f"{megabytes(self._limit)} in one pass, and so does its gradient of the encoder's "
                "table in several: lower train.batch_size"
            )
        widths = None
        if self._store is not None:
            widths, by_width = self._store.widths(rows).sort(descending=True, stable=True)
            rows = rows[by_width]
        passes, first = [], 0
        while first < len(rows):
            width = 0 if widths is None else self._rounded(widths[first])
            size = self._fitting(rows[first:], width)
            passes.append(rows[first : first + size])
            first += size
        return passes

    def shrink(self, passes: list[Tensor]) -> bool:
        """After a real step ran out of memory: halve every kind of its passes, if that is possible.

        Memory of a card may be there and yet not in one piece.
        """
        largest: dict[int, int] = {}
        for rows in passes:
            width = 0
            if self._store is not None:
                width = self._rounded(self._store.widths(rows).max())
            largest[width] = max(len(rows), largest.get(width, 0))
        assert self._sizes is not None  # it cut these passes
        if len(passes) == 1:
            self._whole[len(passes[0])] = False
        for width, size in largest.items():
            self._sizes.ran_out(size, width)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return max(largest.values()) > 1

    def news(self) -> list[tuple[int, int]]:
        """(tokens, or 0 for bags; rows) of the passes that were searched since the last call."""
        news, self._news = list(self._news.items()), {}
        return news

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint: a training that goes on cuts as it would have without a break."""
        if self._sizes is None:
            return None
        whole = {"room": self._room_for_one, "fits": list(self._whole.items())}
        return {"sizes": self._sizes.state(), "whole": whole}

    def restore_(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` gave."""
        if state is not None:
            self._sizes = AutoSize.from_state(state["sizes"])
            self._room_for_one = state["whole"]["room"]
            self._whole = dict(state["whole"]["fits"])

    def _rounded(self, width: Tensor) -> int:
        return min(rounded_width(int(width)), self._widest)

    def _make_sizes(self, rows: Tensor) -> AutoSize:
        """The search, and the bytes that passes may take."""
        taken = self._passing.untouched_bytes()
        on_cpu = self._device.type != "cuda"
        taken += resident_bytes() if on_cpu else torch.cuda.memory_allocated(self._device)
        if taken >= self._limit:
            raise ConfigError(
                f"train.memory_limit: weights, moments and libraries take {megabytes(taken)} "
                f"before any pass, got {megabytes(self._limit)} (`xmc plan` says what takes it)"
            )
        room = self._limit - taken
        one, many = (_CPU_SHARE_OF_ONE, _CPU_SHARE) if on_cpu else (1.0, 1.0)
        self._room_for_one = int(one * room) + self._passing.single_saving()
        several = int(many * (room - self._passing.several_bytes(rows)))
        return AutoSize(max(_NOTHING, several), most=self._most)

    def _fits_whole(self, bags: Tensor) -> bool:
        """Whether a step fits in one pass, in which no gradients are added up."""
        size = len(bags)
        if size not in self._whole:
            self._whole[size] = self._measure(bags, 0, self._room_for_one) is not None
            if self._whole[size]:
                self._news[0] = size
        return self._whole[size]

    def _fitting(self, rows: Tensor, width: int) -> int:
        """Rows of the next pass, the first of `rows`; measured where that is not known."""
        search, searched = self._sizes, False
        assert search is not None
        while True:
            size = search.propose(len(rows), width)
            if search.settled(size, width):
                if searched:
                    self._news[width] = size
                return size
            searched = True
            peak = self._measure(rows[:size], width, search.limit)
            if peak is not None:
                search.succeeded(size, peak, width)
            elif size > 1:
                search.ran_out(size, width)
            else:
                raise ConfigError(
                    f"train.memory_limit: a pass over one row{_of(width)} takes more than the "
                    f"{megabytes(search.limit or 0)} that are left of {megabytes(self._limit)}"
                )

    def _measure(self, rows: Tensor, width: int, limit: int | None) -> int | None:
        """Bytes of a pass over the rows, padded to `width`; None where they are too many."""
        try:
            with measured(self._device, limit) as peak:
                self._passing.trial(padded(self._train_set.batch(rows), width))
            return peak.bytes
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None


# The rest is for freed blocks that the C library keeps in pieces and buffers in compiled kernels.
# Peaks of transformers (H = 256 and 384, 4 and 6 layers, 2 steps) at limits of 1.1, 1.5 and 1.0 GB,
# the last with checkpointing: 1.03, 1.35, 1.06 GB (Linux, glibc, torch 2.13.0, 2026-11-21).
_CPU_SHARE = 0.6
# Of bags in one pass: few large blocks, which go back to the system.
_CPU_SHARE_OF_ONE = 0.9
_NOTHING = 1  # byte: no room for several passes


def make_passes(
    config: Config, train_set: Dataset, device: torch.device, passing: Passing
) -> FittingPasses | None:
    """None where no limit is given. Raises ConfigError where it cannot be kept."""
    text = config.train.memory_limit
    if not text:
        return None
    if text.lower() == "auto":
        if device.type != "cuda":
            raise ConfigError(
                'train.memory_limit: "auto" asks a GPU; on a CPU expected a size such as 2GB'
            )
        limit = device_memory("cuda") or 0
    else:
        limit = parse_memory(text)
    if device.type != "cuda" and config.encoder.compile:
        raise ConfigError(
            "train.memory_limit: the memory of a compiled encoder cannot be counted on a CPU: "
            "set encoder.compile = false or say train.micro_batch"
        )
    return FittingPasses(
        train_set,
        device,
        passing,
        limit=limit,
        most=config.train.batch_size * config.train.accumulation,
        widest=config.features.max_length,
    )


def rounded_width(width: int) -> int:
    """Up to the next of 1, 2, 3, 4, 6, 8, 12, 16, ..., so that few widths are searched."""
    power = 1 << max(0, (width - 1).bit_length())
    return power * 3 // 4 if power >= 4 and width <= power * 3 // 4 else power


def padded(batch: Batch, width: int) -> Batch:
    """The batch with its tokens padded to a width, where it has tokens."""
    if not isinstance(batch.inputs, Tokens):
        return batch
    more = max(0, width - batch.inputs.ids.shape[1])
    tokens = Tokens(F.pad(batch.inputs.ids, (0, more)), F.pad(batch.inputs.mask, (0, more)))
    return Batch(tokens, batch.labels, batch.rows, batch.exclude)


def _of(width: int) -> str:
    return f" of {width} tokens" if width else ""
