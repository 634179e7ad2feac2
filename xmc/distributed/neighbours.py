"""The connections of one rank to the stages before and after it, and to its replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xmc.distributed.collectives import World, gather_rows
from xmc.distributed.couriers import Inbox, Receiver, Sender
from xmc.distributed.links import Links, PipelineError, first_line
from xmc.distributed.messages import Channel
from xmc.distributed.place import Place


class Neighbours:
    """The channels of one rank to the stages before and after it, and its group of replicas.

    A broken one stays broken: whatever fails inside `guarded` is told to both neighbours.
    """

    def __init__(
        self, place: Place, *, num_cuts: int, limit: int, device: torch.device, timeout: float
    ) -> None:
        self.place = place
        self.limit = limit
        self._timeout = timeout
        self._device = device
        self._broken: str | None = None
        self._links: Links | None = None
        self._groups: list[Any] = []
        self._incoming: list[Channel] = []
        self._before: Channel | None = None  # outgoing
        self._after: Channel | None = None
        self.replicas = World.alone()
        self.stages = World.alone()
        self.first_cut, self.num_cuts = 0, num_cuts
        if place.num_stages * place.num_replicas > 1:
            self._agree(num_cuts, limit)
            self._connect()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Tells the neighbours of what is raised inside, and refuses to go on after it."""
        if self._broken is not None:
            raise PipelineError(f"expected a pipeline that works, this one ended: {self._broken}")
        try:
            yield
        except BaseException as error:
            self._fail(_told(self.place, error))
            raise
        finally:
            self._links = None

    @contextmanager
    def links(self) -> Iterator[Links]:
        """Connections for one sweep; all is sent when they are left. Inside `guarded`."""
        self._links = self._open()
        yield self._links
        self._links.flush()
        self._links = None

    @contextmanager
    def reducing(self, what: str) -> Iterator[None]:
        """Words for what goes wrong in a sum over some ranks."""
        try:
            yield
        except RuntimeError as error:
            raise PipelineError(f"{what} failed on {self.place}: {first_line(error)}") from error

    def close(self) -> None:
        """Give the process groups back."""
        self._broken = self._broken or "it was closed"
        groups, self._groups = self._groups, []
        for group in groups:
            if dist.is_initialized():
                dist.destroy_process_group(group)

    def _open(self) -> Links:
        inbox = Inbox()
        receivers = {c.peer: Receiver(c, inbox, self.limit) for c in self._incoming}
        before, after = (
            None if channel is None else Sender(channel, inbox, self.limit)
            for channel in (self._before, self._after)
        )
        return Links(self.place, inbox, receivers, before, after, self._timeout)

    def _fail(self, text: str) -> None:
        self._broken = text
        links = self._links or self._open()
        if links.end(text):
            self.close()  # also wakes replicas that wait for this one

    def _agree(self, num_cuts: int, limit: int) -> None:
        """The same settings on all ranks, and how many cuts come before. Sends three integers."""
        place = self.place
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout))
        everyone = World(place.rank, place.num_stages * place.num_replicas, group)
        mine = torch.tensor([[place.num_stages, limit, num_cuts]], device="cpu")
        settings = gather_rows(mine, [1] * everyone.size, everyone)
        dist.destroy_process_group(group)
        if bool((settings[:, :2] != settings[0, :2]).any()):
            raise ValueError(
                "expected the same num_stages and pipeline_limit on all ranks, "
                f"got {settings[:, :2].tolist()}"
            )
        cuts = settings[:, 2].view(place.num_replicas, place.num_stages)
        if bool((cuts != cuts[0]).any()):
            raise ValueError(
                f"expected the same numbers of cuts in all replicas, got {cuts.tolist()}"
            )
        self.first_cut = int(cuts[0, : place.stage].sum())
        self.num_cuts = int(cuts[0].sum())

    def _connect(self) -> None:
        """All groups of all ranks, since torch wants each rank to make each."""
        place, device = self.place, self._device
        direct = device.type == "cuda" and "nccl" in str(dist.get_backend_config())
        backend = "cpu:gloo,cuda:nccl" if direct else "gloo"
        for rank in range(place.num_stages * place.num_replicas):
            this = Place(rank, place.num_stages, place.num_replicas)
            if this.is_last:
                continue
            pair = [rank, rank + 1]
            # A group each way: NCCL runs what one group is given in order, and a receive that
            # waits for a message would hold up a send the other way.
            onward, homeward = (
                # Threads wait as long as it takes; the rank itself counts the time.
                dist.new_group(pair, backend=backend, timeout=timedelta(days=1))
                for _ in range(2)
            )
            if place.rank not in pair:
                continue
            self._groups += [onward, homeward]
            if place.rank == rank:
                self._after = Channel(onward, rank + 1, device, direct)
                self._incoming.append(Channel(homeward, rank + 1, device, direct))
            else:
                self._before = Channel(homeward, rank, device, direct)
                self._incoming.append(Channel(onward, rank, device, direct))
        every = range(place.num_stages * place.num_replicas)
        for stage in range(place.num_stages):
            group = self._group(every[stage :: place.num_stages], backend)
            if stage == place.stage:
                self.replicas = World(place.replica, place.num_replicas, group)
        for replica in range(place.num_replicas):
            first = replica * place.num_stages
            group = self._group(every[first : first + place.num_stages], backend)
            if replica == place.replica:
                self.stages = World(place.stage, place.num_stages, group)

    def _group(self, ranks: range, backend: str) -> Any:
        """For collectives among these ranks; none where there is one."""
        if len(ranks) == 1:
            return None
        patience = timedelta(seconds=self._timeout)
        group = dist.new_group(list(ranks), backend=backend, timeout=patience)
        if self.place.rank in ranks:
            self._groups.append(group)
        return group


def _told(place: Place, error: BaseException) -> str:
    """What the others hear: the words of the rank where it began."""
    if isinstance(error, PipelineError):
        return str(error)
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    return f"{place} failed: {type(error).__name__}: {error}{notes}"
