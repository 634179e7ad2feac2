"""One rank's part of a model: forward and backward passes of micro-batches in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xmc.distributed.keyed_random import keyed_random, mixed
from xmc.distributed.messages import MAX_TENSORS, check_tensors


@dataclass
class _Held:
    """What a backward pass needs of its forward pass."""

    inputs: tuple[Any, ...]
    key: int
    shapes: list[torch.Size]
    outputs: tuple[Tensor, ...] | None  # with their graph; None: to be computed again


class StageRunner:
    """Consecutive cuts of a model on one rank; `first_cut` counts those of earlier ranks.

    Each cut's random numbers in a forward pass are those of (the micro-batch's key, the number of
    the cut), so that a pass gives the same whenever and wherever it is run, and again.
    """

    def __init__(
        self,
        cuts: Sequence[nn.Module],
        *,
        first_cut: int,
        checkpointing: bool,
        device: torch.device,
        name: str,
    ) -> None:
        self.cuts = nn.ModuleList(cuts)
        self.name = name
        self._first_cut = first_cut
        self._checkpointing = checkpointing
        self.device = device
        self.devices = sorted({device, *(p.device for p in self.cuts.parameters())}, key=str)
        self._held: dict[int, _Held] = {}

    def __len__(self) -> int:
        """The number of micro-batches whose backward pass is to come."""
        return len(self._held)

    def forward(
        self, index: int, inputs: tuple[Any, ...], key: int, *, graph: bool
    ) -> tuple[Tensor, ...]:
        """Outputs for micro-batch `index`; with `graph` they are held for `backward`."""
        if not graph:
            with torch.no_grad():
                outputs = self._run(inputs, key)
            # Weights that autocast has cast without a graph would take no gradient in one.
            torch.clear_autocast_cache()
            return outputs
        with torch.enable_grad():
            outputs = self._run(inputs, key)
        shapes = [output.shape for output in outputs]
        # A graph that is not kept is made all the same: it tells which outputs want a gradient.
        kept = None if self._checkpointing else outputs
        self._held[index] = _Held(inputs, key, shapes, kept)
        return outputs

    def backward(
        self, index: int, d_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Add the gradients of the parameters; returns those of the inputs, and lets go of all."""
        held = self._held.pop(index)
        outputs = held.outputs
        if outputs is None:
            with torch.enable_grad(), buffers_kept(self.cuts):
                outputs = self._run(held.inputs, held.key)
            shapes = [output.shape for output in outputs]
            if shapes != held.shapes:
                raise ValueError(
                    f"expected {self.name} to give {_list(held.shapes)} again for micro-batch "
                    f"{index}, got {_list(shapes)}"
                )
        if len(d_outputs) != len(outputs):
            raise ValueError(
                f"expected {len(outputs)} gradients for the outputs of {self.name}, "
                f"got {len(d_outputs)}"
            )
        wanted, gradients = [], []
        for output, d_output in zip(outputs, d_outputs, strict=True):
            if d_output is None or not output.requires_grad:
                continue
            if d_output.shape != output.shape:
                raise ValueError(
                    f"expected a gradient of shape {list(output.shape)} like the output of "
                    f"{self.name}, got {list(d_output.shape)}"
                )
            wanted.append(output)
            gradients.append(d_output.to(output.dtype))
        if wanted:
            with _without_autocast(self.devices):
                torch.autograd.backward(wanted, gradients)
        return tuple(_taken_grad(x) for x in held.inputs)

    def clear(self) -> None:
        """Forget all micro-batches."""
        self._held.clear()

    def _run(self, inputs: tuple[Any, ...], key: int) -> tuple[Tensor, ...]:
        for number, cut in enumerate(self.cuts, self._first_cut):
            with keyed_random(mixed(key, number), self.devices):
                outputs = cut(*inputs)
            inputs = self._checked(outputs)
        return inputs

    def _checked(self, outputs: Any) -> tuple[Tensor, ...]:
        outputs = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        for output in outputs:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected a tensor or a tuple of tensors from {self.name}, "
                    f"got {type(output).__name__}"
                )
        check_tensors(outputs, self.name)
        if len(outputs) >= MAX_TENSORS:
            raise ValueError(
                f"expected at most {MAX_TENSORS - 1} tensors from {self.name}, got {len(outputs)}"
            )
        return outputs


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Forward passes inside change copies of the buffers: running statistics count them not."""
    slots = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    for owner, name, buffer in slots:
        owner._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for owner, name, buffer in slots:
            owner._buffers[name] = buffer


def _taken_grad(x: Any) -> Tensor | None:
    """The gradient of a tensor that came in a message; a caller's own keeps what it has."""
    return x.grad if isinstance(x, Tensor) and x.requires_grad and x.is_leaf else None


@contextmanager
def _without_autocast(devices: Sequence[torch.device]) -> Iterator[None]:
    """Backward passes run in the types that their forward pass chose."""
    with ExitStack() as stack:
        for kind in sorted({"cpu", *(device.type for device in devices)}):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _list(shapes: list[torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
