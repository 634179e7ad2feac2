"""Messages between two ranks that say themselves what they hold.

A message is a header of fixed size, through the host, and then its tensors, one transfer each.
Because the header announces number, shapes and dtypes, no two messages need be alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def start_sending(channel: Channel, message: Message) -> Callable[[], None]:
    """Begin to send a message whose tensors nobody changes again; returns what waits for it."""
    works, kept = [_isend(channel, _pack(message))], []
    for tensor in message.tensors:
        if tensor is None or tensor.numel() == 0:
            continue
        through_host = not channel.direct or message.kind == Kind.FAILURE
        data = tensor.to("cpu" if through_host else channel.device).contiguous()
        kept.append(data)
        works.append(_isend(channel, _bytes(data)))

    def finish() -> None:
        for work in works:
            work.wait()
        if channel.device.type == "cuda":
            torch.cuda.current_stream(channel.device).synchronize()
        kept.clear()

    return finish


def receive(channel: Channel, user: Any) -> Message:
    """Wait for a message and all its tensors, which `user` is going to read (a GPU's stream)."""
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
        # A message counts as here when its tensors are.
        torch.cuda.current_stream(channel.device).synchronize()
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
