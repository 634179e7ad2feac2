"""The connections of a rank to its neighbours for one sweep, and what is said when they fail."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn

from xmc.distributed.couriers import Inbox, Lost, Receiver, Sender
from xmc.distributed.messages import Kind, Message
from xmc.distributed.place import Place


class PipelineError(RuntimeError):
    """Another rank failed or is gone, or the connection to it is."""


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
        senders = [
            # One that has ended its part of the sweep has to begin again.
            sender if sender.is_alive() else Sender(sender.channel, self.inbox, 1)
            for sender in self._senders
        ]
        for sender in senders:
            sender.put(Message.failure(text), max(until - time.monotonic(), 0.1))
        ended = [sender.close(max(until - time.monotonic(), 0.1)) for sender in senders]
        for receiver in self.receivers.values():
            receiver.join(max(until - time.monotonic(), 0.1))
            ended.append(not receiver.is_alive())
        return all(ended)

    def _send(self, sender: Sender, message: Message) -> None:
        if not sender.put(message, self.timeout):
            raise PipelineError(self._stuck(sender))

    def _stuck(self, sender: Sender) -> str:
        peer, rank = sender.channel.peer, self.place.rank
        return (
            f"expected rank {peer} to take a message of rank {rank} within {self.timeout:g} s, "
            "it did not"
        )

    def _raise_lost(self, lost: Lost) -> NoReturn:
        """With the words of a failure, if some came before the connection was closed."""
        until = time.monotonic() + 1.0
        while (left := until - time.monotonic()) > 0:
            item = self.inbox.get(left)
            if isinstance(item, tuple) and item[1].kind == Kind.FAILURE:
                raise PipelineError(item[1].text) from lost.error
        peer = self.place.moved(lost.peer - self.place.rank)
        raise PipelineError(f"{peer} is gone: {first_line(lost.error)}") from lost.error


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


_GRACE = 5.0  # seconds for the neighbours to hear of a failure, at most
