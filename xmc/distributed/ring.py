"""Rows that every rank sees: they go round a ring, or all are gathered; what they earn comes home.

`visit(which, tensors)` is called with rows of all ranks, `which` of them counted in order of rank,
and returns numbers for each of these rows, or None on every rank. The visits of a row are merged,
by `merge(earlier, later)` or as a sum, and come back to the rank that holds the row.

Both ways give the same, and a rank alone visits its own rows and sends nothing. A ring holds the
rows of two ranks at a time and sends while a visit computes; gathering holds all, in one visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from xmc.distributed.collectives import World, gather_rows, scatter_sum

Visit = Callable[[slice, list[Tensor]], Tensor | None]
Merge = Callable[[Tensor, Tensor], Tensor]


class Ring:
    """Rows go from rank to rank: each rank sends those of all others on, once, and what they earn.

    Of tensors with b rows of s bytes, and r bytes a row for what a visit gives, a rank sends about
    `(N - 1) b s + N b r` bytes, to the next rank alone.
    """

    def __init__(self, counts: Sequence[int], world: World) -> None:
        self.counts, self.world = list(counts), world

    def visit(
        self, tensors: Sequence[Tensor], visit: Visit, merge: Merge | None = None
    ) -> Tensor | None:
        """See the top of this file; tensors are this rank's rows, not changed."""
        world, here, owner = self.world, list(tensors), self.world.rank
        earned: Shift | None = None  # on its way here, by the visits of other ranks
        for hop in range(world.size):
            following = (owner - 1) % world.size
            moving = None
            if hop + 1 < world.size:  # before the visit: it computes while they travel
                moving = Shift(here, self.counts[following], world)
            start = sum(self.counts[:owner])
            new = visit(slice(start, start + self.counts[owner]), here)
            if new is not None:
                if earned is not None:
                    new = (merge or torch.add)(earned.wait()[0], new)
                # At the last hop the following owner is this rank.
                earned = Shift([new], self.counts[following], world, tag=len(here))
            if moving is not None:
                here = moving.wait()
            owner = following
        return None if earned is None else earned.wait()[0]


class Gather:
    """Every rank holds the rows of all; each tensor is gathered once, however often it is visited.

    With b, s and r as for `Ring`: one all-gather, `(N - 1) b s` bytes, and a reduce-scatter, or
    with `merge` an all-to-all, of `(N - 1) b r`.
    """

    def __init__(self, counts: Sequence[int], world: World) -> None:
        self.counts, self.world = list(counts), world
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def visit(
        self, tensors: Sequence[Tensor], visit: Visit, merge: Merge | None = None
    ) -> Tensor | None:
        """See the top of this file; tensors are this rank's rows, not changed."""
        new = visit(slice(0, sum(self.counts)), [self._whole(own) for own in tensors])
        if new is None:
            return None
        if merge is None:
            return scatter_sum(new, self.counts, self.world)
        parts = to_owners(new, self.counts, self.world)
        merged = parts[0]
        for part in parts[1:]:
            merged = merge(merged, part)
        return merged

    def _whole(self, own: Tensor) -> Tensor:
        for tensor, whole in self._gathered:
            if tensor is own:
                return whole
        whole = gather_rows(own, self.counts, self.world)
        self._gathered.append((own, whole))
        return whole


class Shift:
    """Tensors on their way to the next rank, and as many on their way from the one before.

    Every rank starts the same shifts in the same order. Sends the tensors.
    """

    def __init__(
        self, tensors: Sequence[Tensor], num_incoming: int, world: World, *, tag: int = 0
    ) -> None:
        self._outgoing = [tensor.contiguous() for tensor in tensors]  # held until they are sent
        self._incoming = self._outgoing
        self._works: list[dist.Work] = []
        if world.size == 1:
            return
        to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        self._incoming = [t.new_empty((num_incoming, *t.shape[1:])) for t in self._outgoing]
        operations = []
        for offset, (out, into) in enumerate(zip(self._outgoing, self._incoming, strict=True)):
            for operation, tensor, peer in ((dist.isend, out, to), (dist.irecv, into, source)):
                if tensor.numel():
                    more = {"group": world.group, "tag": tag + offset, "group_peer": peer}
                    operations.append(dist.P2POp(operation, tensor, **more))
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """What came, once all has come and gone."""
        for work in self._works:
            work.wait()
        self._works, self._outgoing = [], []
        return self._incoming


def to_owners(
    x: Tensor,  # [sum B_r, ...], something for the rows of all
    counts: Sequence[int],  # [N]
    world: World,
) -> list[Tensor]:  # N times [B_r, ...]
    """What each rank has for this rank's rows. Sends to each other rank what is for its rows."""
    if world.size == 1:
        return [x]
    mine = counts[world.rank]
    parts = x.new_empty((world.size * mine, *x.shape[1:]))
    dist.all_to_all_single(
        parts, x.contiguous(), [mine] * world.size, list(counts), group=world.group
    )
    return list(parts.split(mine)) if mine else [parts] * world.size
