"""Threads that carry the messages of one rank while it computes.

gloo's point-to-point operations can only be waited for: `Work.is_completed()` stays False until
`wait()` and there is no future (torch 2.13). So each direction of each connection has a thread that
waits in the operating system, at no cost, and puts what came into one queue: the rank that reads
the queue acts on whatever arrived first, and what it sends leaves while it computes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from xmc.distributed.messages import Channel, Kind, Message, receive, start_sending


@dataclass(frozen=True)
class Lost:
    """Instead of a message: the connection to a rank is broken."""

    peer: int
    error: Exception


@dataclass
class Inbox:
    """What has arrived on any channel, in the order in which it did."""

    messages: queue.SimpleQueue[tuple[int, Message] | Lost] = field(
        default_factory=queue.SimpleQueue
    )

    def put(self, item: tuple[int, Message] | Lost) -> None:
        self.messages.put(item)

    def get(self, timeout: float) -> tuple[int, Message] | Lost | None:
        """The next arrival, or None after `timeout` seconds without any."""
        try:
            return self.messages.get(timeout=timeout)
        except queue.Empty:
            return None


class Receiver(threading.Thread):
    """Keeps a receive posted on a channel until as many messages came as the first announces.

    Holds back where `slots` messages have not been `taken` yet.
    """

    def __init__(self, channel: Channel, inbox: Inbox, slots: int) -> None:
        super().__init__(name=f"from rank {channel.peer}", daemon=True)
        self._channel = channel
        self._inbox = inbox
        self._slots = threading.Semaphore(slots)
        self._is_draining = False
        self._stream = _stream(channel.device)
        self._user = _current(channel.device)
        self.start()

    def taken(self) -> None:
        """Give back the slot of a message that was read from the inbox."""
        self._slots.release()

    def drain(self) -> None:
        """Throw away what still comes, so that the other rank can end."""
        self._is_draining = True
        self._slots.release(_MANY)

    def run(self) -> None:
        seen = 0
        try:
            while True:
                self._slots.acquire()
                with _on(self._stream):
                    message = receive(self._channel, self._user)
                if not self._is_draining:
                    self._inbox.put((self._channel.peer, message))
                seen += 1
                is_last = message.kind == Kind.FAILURE or seen == message.total
                del message  # its tensors are the reader's, who may be done with them first
                if is_last:
                    return
        except Exception as error:
            self._inbox.put(Lost(self._channel.peer, error))


class Sender(threading.Thread):
    """Sends messages in order; `put` returns at once unless `slots` of them are under way."""

    def __init__(self, channel: Channel, inbox: Inbox, slots: int) -> None:
        super().__init__(name=f"to rank {channel.peer}", daemon=True)
        self.channel = channel
        self._inbox = inbox  # told where the connection breaks
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(slots)
        self._stream = _stream(channel.device)
        self.num_bytes = 0
        self.lost: Lost | None = None
        self.start()

    def put(self, message: Message, timeout: float) -> bool:
        """Send a message whose tensors nobody changes again; False where it had to wait too long.

        From a GPU it leaves once the work that is in the current stream now is done.
        """
        if self.lost is not None:
            return True  # the inbox tells
        self.num_bytes += message.num_bytes
        try:
            finish = self._start(message)
        except Exception as error:
            self._lose(error)
            return True
        return self._put(finish, timeout)

    def close(self, timeout: float) -> bool:
        """Wait until all is sent; False where it was not in time."""
        if not self._put(None, timeout):
            return False
        self.join(timeout)
        return not self.is_alive()

    def run(self) -> None:
        while (finish := self._queue.get()) is not None:
            try:
                finish()
            except Exception as error:
                self._lose(error)
            del finish  # and what was sent, before it waits for more

    def _start(self, message: Message) -> Callable[[], None]:
        if self._stream is None:
            return start_sending(self.channel, message)  # at once: no thread has to wake up for it
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.channel.device))

        def send() -> None:
            event.synchronize()
            with _on(self._stream):
                start_sending(self.channel, message)()

        return send

    def _put(self, finish: Callable[[], None] | None, timeout: float) -> bool:
        try:
            self._queue.put(finish, timeout=timeout)
        except queue.Full:
            return False
        return True

    def _lose(self, error: Exception) -> None:
        if self.lost is None:
            self.lost = Lost(self.channel.peer, error)
            self._inbox.put(self.lost)


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _current(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
    else:
        with torch.cuda.stream(stream):
            yield


_MANY = 1 << 20
