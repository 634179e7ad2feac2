"""Where a rank stands in a grid of stages and replicas, and its connections there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from xmc.distributed.collectives import World, gather_rows
from xmc.distributed.messages import Channel, Inbox, Kind, Lost, Message, Receiver, Sender


class PipelineError(RuntimeError):
    """Another rank failed or is gone, or the connection to it is."""


@dataclass(frozen=True)
class Place:
    """A rank's stage and replica; neighbouring stages are neighbouring ranks."""

    rank: int
    num_stages: int
    num_replicas: int

    @classmethod
    def of(cls, world: World, num_stages: int) -> Place:
        """Raises ValueError where the ranks are no multiple of the stages."""
        if num_stages < 1 or world.size % num_stages:
            raise ValueError(
                f"expected a number of ranks that is a multiple of {num_stages} stages, "
                f"got {world.size}"
            )
        return cls(world.rank, num_stages, world.size // num_stages)

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def replica(self) -> int:
        return self.rank // self.num_stages

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def __str__(self) -> str:
        replica = f", replica {self.replica}" if self.num_replicas > 1 else ""
        return f"rank {self.rank} (stage {self.stage} of {self.num_stages}{replica})"

    def moved(self, stages: int) -> Place:
        """The place so many stages later in the same replica."""
        return Place(self.rank + stages, self.num_stages, self.num_replicas)


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
            raise PipelineError(f"{what} failed on {self.place}: {_first_line(error)}") from error

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


@dataclass
class Links:
    """The threads of one sweep."""

    place: Place
    inbox: Inbox
    receivers: dict[int, Receiver]  # by rank
    before: Sender | None
    after: Sender | None
    timeout: float

    @property
    def num_bytes(self) -> int:
        """Sent so far."""
        return sum(sender.num_bytes for sender in self._senders)

    @property
    def _senders(self) -> list[Sender]:
        return [sender for sender in (self.before, self.after) if sender is not None]

    def next(self) -> Message:
        """Whatever arrived first; waits for it."""
        item = self.inbox.get(self.timeout)
        if item is None:
            ranks = " or ".join(str(rank) for rank in self.receivers)
            raise PipelineError(
                f"expected a message from rank {ranks} on rank {self.place.rank} within "
                f"{self.timeout:g} s, got none"
            )
        if isinstance(item, Lost):
            self._raise_lost(item)
        rank, message = item
        if message.kind == Kind.FAILURE:
            raise PipelineError(message.text)
        self.receivers[rank].taken()
        return message

    def send_after(self, message: Message) -> None:
        """To the next stage."""
        assert self.after is not None
        self._send(self.after, message)

    def send_before(self, message: Message) -> None:
        """To the stage before."""
        assert self.before is not None
        self._send(self.before, message)

    def flush(self) -> None:
        """Wait until all is sent."""
        for sender in self._senders:
            if not sender.close(self.timeout):
                raise PipelineError(self._stuck(sender))
            if sender.lost is not None:
                self._raise_lost(sender.lost)
        for receiver in self.receivers.values():
            receiver.join(self.timeout)

    def end(self, text: str) -> bool:
        """Tell the neighbours of a failure; True where all connections came to rest."""
        for receiver in self.receivers.values():
            receiver.drain()
        until = time.monotonic() + min(self.timeout, _GRACE)
        for sender in self._senders:
            if sender.is_alive():
                sender.put(Message.failure(text), max(until - time.monotonic(), 0.1))
        ended = [sender.close(max(until - time.monotonic(), 0.1)) for sender in self._senders]
        for receiver in self.receivers.values():
            receiver.join(max(until - time.monotonic(), 0.1))
            ended.append(not receiver.is_alive())
        return all(ended)

    def _send(self, sender: Sender, message: Message) -> None:
        if not sender.put(message, self.timeout):
            raise PipelineError(self._stuck(sender))

    def _stuck(self, sender: Sender) -> str:
        return (
            f"expected rank {sender.peer} to take a message of rank {self.place.rank} within "
            f"{self.timeout:g} s, it did not"
        )

    def _raise_lost(self, lost: Lost) -> NoReturn:
        """With the words of a failure, if some came before the connection was closed."""
        until = time.monotonic() + 1.0
        while (left := until - time.monotonic()) > 0:
            item = self.inbox.get(left)
            if isinstance(item, tuple) and item[1].kind == Kind.FAILURE:
                raise PipelineError(item[1].text) from lost.error
        peer = self.place.moved(lost.peer - self.place.rank)
        raise PipelineError(f"{peer} is gone: {_first_line(lost.error)}") from lost.error


def _told(place: Place, error: BaseException) -> str:
    """What the others hear: the words of the rank where it began."""
    if isinstance(error, PipelineError):
        return str(error)
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    return f"{place} failed: {type(error).__name__}: {error}{notes}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


_GRACE = 5.0  # seconds for the neighbours to hear of a failure, at most
