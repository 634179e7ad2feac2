"""How keys of all ranks reach the queries of each: by which way, and rounded to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc.distributed.collectives import World
from xmc.distributed.ring import Gather, Ring
from xmc_kernels.pairs import Pairs

WAYS = ("auto", "ring", "gather")
GATHER_BYTES = 1 << 26
"""Of all keys and their gradients on one rank: up to here `auto` gathers them.

Fewer and larger messages and products; more of them are worth the memory that a ring saves.
"""


@dataclass(frozen=True)
class Exchange:
    """The ranks whose rows a loss is of."""

    world: World
    way: str = "auto"
    wire_dtype: torch.dtype | None = None  # that keys are rounded to; None: they are not

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"expected exchange of {', '.join(WAYS)}, got {self.way!r}")
        if self.wire_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"expected wire_dtype of torch.bfloat16 or None, got {self.wire_dtype}"
            )

    def sent(self, k: Tensor) -> Tensor:
        """Keys as they travel, and as the loss sees them: this rank's own, too."""
        narrow = self.wire_dtype is not None and k.dtype in (torch.float32, torch.float64)
        return k.to(self.wire_dtype) if narrow else k

    def walk(self, counts: Sequence[int], k: Tensor) -> Ring | Gather:
        """For the keys of all ranks, so many on each, of k's features."""
        way = self.way
        if way == "auto":
            element = self.sent(k).element_size() + max(k.element_size(), 4)
            way = "gather" if sum(counts) * k.shape[1] * element <= GATHER_BYTES else "ring"
        return (Ring if way == "ring" else Gather)(counts, self.world)


def pairs_of_keys(
    pairs: Pairs, keys: slice, key_ids: Tensor | None
) -> tuple[Pairs, Tensor | slice]:
    """The pairs of a range of keys, counted from its first, and which of all pairs they are."""
    here = (pairs.indices >= keys.start) & (pairs.indices < keys.stop)
    if bool(here.all()):
        indices = pairs.indices - keys.start
        return Pairs(pairs.indptr, indices, pairs.query_ids, key_ids), slice(None)
    indptr = torch.nn.functional.pad(here.cumsum(0), (1, 0))[pairs.indptr]
    part = Pairs(indptr, pairs.indices[here] - keys.start, pairs.query_ids, key_ids)
    return part, here.nonzero()[:, 0]
