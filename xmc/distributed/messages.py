"""Messages between two ranks that say themselves what they hold, and the threads that carry them.

A message is a header of fixed size, through the host, and then its tensors, one transfer each.
Because the header announces number, shapes and dtypes, no two messages need be alike.

gloo's point-to-point operations can only be waited for: `Work.is_completed()` stays False until
`wait()` and there is no future (torch 2.13). So each direction of each connection has a thread that
waits in the operating system, at no cost, and puts what came into one queue: the rank that reads
the queue acts on whatever arrived first, and what it sends leaves while it computes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Kind(IntEnum):
    ACTIVATION = 1  # outputs of a stage that will get their gradient
    EVALUATION = 2  # outputs of a stage that will not
    GRADIENT = 3  # the loss of a micro-batch, then the gradients of the tensors of an activation
    FAILURE = 4  # a text: a rank cannot go on


@dataclass(frozen=True)
class Message:
    """What one rank tells another about one micro-batch."""

    kind: Kind
    index: int = 0  # of the micro-batch
    total: int = 1  # number of micro-batches, and so of messages of this kind, in this sweep
    key: int = 0  # of the micro-batch's random numbers
    tensors: tuple[Tensor | None, ...] = ()  # detached
    wants_grad: tuple[bool, ...] = ()  # by tensor

    @classmethod
    def failure(cls, text: str) -> Message:
        data = torch.frombuffer(bytearray(text, "utf-8")[:_TEXT], dtype=torch.uint8)
        return cls(Kind.FAILURE, tensors=(data,), wants_grad=(False,))

    @property
    def text(self) -> str:
        """Of a failure."""
        assert self.tensors[0] is not None
        return bytes(self.tensors[0].tolist()).decode("utf-8", "replace")

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


@dataclass(frozen=True)
class Channel:
    """One direction of a connection of two ranks: a process group of these two."""

    group: Any  # dist.ProcessGroup
    peer: int  # the other rank, in the default group
    device: torch.device  # of the tensors on this rank
    direct: bool = False  # whether the group itself sends tensors of this device


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
                    message = _receive(self._channel, self._stream, self._user)
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
    """Sends messages in order; `put` returns at once unless `slots` of them are waiting."""

    def __init__(self, channel: Channel, inbox: Inbox, slots: int) -> None:
        super().__init__(name=f"to rank {channel.peer}", daemon=True)
        self.peer = channel.peer
        self._channel = channel
        self._inbox = inbox  # told where the connection breaks
        self._queue: queue.Queue[tuple[Message, Any] | None] = queue.Queue(slots)
        self._stream = _stream(channel.device)
        self.num_bytes = 0
        self.lost: Lost | None = None
        self.start()

    def put(self, message: Message, timeout: float) -> bool:
        """Send a message whose tensors nobody changes again; False where it had to wait too long.

        On a GPU it leaves once the work that is in the current stream now is done.
        """
        self.num_bytes += message.num_bytes
        return self._put((message, _event(self._channel.device)), timeout)

    def close(self, timeout: float) -> bool:
        """Wait until all is sent; False where it was not in time."""
        if not self._put(None, timeout):
            return False
        self.join(timeout)
        return not self.is_alive()

    def run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.lost is not None:
                continue
            message, event = item
            try:
                if event is not None:
                    event.synchronize()
                with _on(self._stream):
                    _send(self._channel, message, self._stream)
            except Exception as error:
                self.lost = Lost(self._channel.peer, error)
                self._inbox.put(self.lost)
            del item, message  # what is sent is no longer held while there is nothing to send

    def _put(self, item: tuple[Message, Any] | None, timeout: float) -> bool:
        try:
            self._queue.put(item, timeout=timeout)
        except queue.Full:
            return False
        return True


def _send(channel: Channel, message: Message, stream: Any) -> None:
    works = [_isend(channel, _pack(message))]
    kept = []  # until they are sent
    for tensor in message.tensors:
        if tensor is None or tensor.numel() == 0:
            continue
        data = tensor.contiguous()
        on_host = not channel.direct or message.kind == Kind.FAILURE
        data = data.cpu() if on_host else data
        kept.append(data)
        works.append(_isend(channel, _bytes(data)))
    for work in works:
        work.wait()
    if stream is not None:
        stream.synchronize()


def _receive(channel: Channel, stream: Any, user: Any) -> Message:
    header = torch.empty(_HEADER, dtype=torch.int64, device="cpu")
    _irecv(channel, header).wait()
    kind, index, total, key, layouts = _unpack(header)
    on_device = kind != Kind.FAILURE and channel.device.type != "cpu"
    tensors: list[Tensor | None] = []
    works = []
    for layout in layouts:
        if layout.dtype is None:
            tensors.append(None)
            continue
        place = channel.device if on_device and channel.direct else torch.device("cpu")
        pinned = on_device and not channel.direct
        tensor = torch.empty(layout.shape, dtype=layout.dtype, device=place, pin_memory=pinned)
        tensors.append(tensor)
        if tensor.numel():
            works.append(_irecv(channel, _bytes(tensor)))
    for work in works:
        work.wait()
    if on_device:
        tensors = [_owned(tensor, channel.device, user) for tensor in tensors]
        stream.synchronize()  # a message counts as here when its tensors are
    wants = tuple(layout.wants_grad for layout in layouts)
    return Message(kind, index, total, key, tuple(tensors), wants)


def _owned(tensor: Tensor | None, device: torch.device, user: Any) -> Tensor | None:
    """On its device, and not given away there before the user's stream is done with it."""
    if tensor is None:
        return None
    moved = tensor.to(device, non_blocking=True)
    moved.record_stream(user)
    return moved


@dataclass(frozen=True)
class _Layout:
    dtype: torch.dtype | None  # None: no tensor in this place
    wants_grad: bool
    shape: tuple[int, ...]


def check_tensors(tensors: tuple[Tensor | None, ...], name: str) -> None:
    """Raise ValueError for what a header cannot announce."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"expected at most {MAX_TENSORS} tensors from {name}, got {len(tensors)}")
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dim() > MAX_DIMS:
            raise ValueError(
                f"expected tensors of at most {MAX_DIMS} dims from {name}, got {tensor.dim()}"
            )
        if tensor.dtype not in _CODES or tensor.layout != torch.strided:
            raise ValueError(
                f"expected dense tensors of plain dtypes from {name}, "
                f"got {tensor.dtype}, {tensor.layout}"
            )


def _pack(message: Message) -> Tensor:  # [_HEADER] int64
    numbers = [_MAGIC, message.kind, message.index, message.total, message.key]
    numbers.append(len(message.tensors))
    for tensor, wants_grad in zip(message.tensors, message.wants_grad, strict=True):
        if tensor is None:
            numbers += [-1, 0, 0, *[0] * MAX_DIMS]
        else:
            rest = [0] * (MAX_DIMS - tensor.dim())
            code = _CODES[tensor.dtype]
            numbers += [code, int(wants_grad), tensor.dim(), *tensor.shape, *rest]
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)), device="cpu")


def _unpack(header: Tensor) -> tuple[Kind, int, int, int, list[_Layout]]:
    magic, kind, index, total, key, count, *rest = header.tolist()
    if magic != _MAGIC:
        raise ValueError(f"expected the header of a message, got one that starts with {magic}")
    layouts = []
    for position in range(count):
        code, wants_grad, dims, *shape = rest[position * _ENTRY : (position + 1) * _ENTRY]
        dtype = None if code < 0 else _DTYPES[code]
        layouts.append(_Layout(dtype, bool(wants_grad), tuple(shape[:dims])))
    return Kind(kind), index, total, key, layouts


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory: backends differ in the dtypes they send."""
    return tensor.view(-1).view(torch.uint8)


def _isend(channel: Channel, data: Tensor) -> Any:
    return dist.isend(data, channel.peer, channel.group)


def _irecv(channel: Channel, data: Tensor) -> Any:
    return dist.irecv(data, channel.peer, channel.group)


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _current(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _event(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
    else:
        with torch.cuda.stream(stream):
            yield


MAX_TENSORS = 9  # eight of a stage, or a loss and their gradients
MAX_DIMS = 8
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_MAGIC = 0x786D63  # "xmc"
_ENTRY = 3 + MAX_DIMS
_HEADER = 6 + MAX_TENSORS * _ENTRY
_TEXT = 2000  # bytes of the text of a failure
_MANY = 1 << 20
