"""Work that leaves nothing behind if it fails: neither gradients nor random numbers nor buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xmc.training.replay import Recorder, set_random_states_


class Undo:
    """Runs attempts at adding to the gradient of some modules, which may run out of memory.

    An attempt's gradient is made apart and joins what was there before once the attempt is
    complete, so that of a failed one no part remains; that takes the memory of a second gradient.
    Random numbers and those buffers that forward passes change (running statistics of BatchNorm)
    go back to what they were. Leaves of the graph besides parameters are given as `leaves`.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        devices: Iterable[torch.device],
        leaves: Iterable[Tensor] = (),
    ) -> None:
        modules = list(modules)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._leaves = list(dict.fromkeys([*parameters, *leaves]))
        self._recorder = Recorder(modules, devices)

    def gradient_bytes(self) -> int:
        """Of the gradient so far."""
        size = 0
        for grad in (leaf.grad for leaf in self._leaves if leaf.grad is not None):
            parts = [grad._indices(), grad._values()] if grad.is_sparse else [grad]
            size += sum(part.numel() * part.itemsize for part in parts)
        return size

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Forward and backward inside; whatever is raised passes, after everything is undone."""
        before = [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        state = None
        try:
            with self._recorder.recorded() as state:
                yield
        except BaseException:
            for leaf, grad in zip(self._leaves, before, strict=True):
                leaf.grad = grad
            if state is not None:
                set_random_states_(state.random)
                for (owner, name), value in state.buffers.items():
                    buffer = owner._buffers[name]
                    assert buffer is not None
                    with torch.no_grad():
                        buffer.copy_(value)
            raise
        for leaf, grad in zip(self._leaves, before, strict=True):
            if grad is not None:
                leaf.grad = _sum_(grad, leaf.grad)


@torch.no_grad()
def _sum_(held: Tensor, new: Tensor | None) -> Tensor:
    """As autograd accumulates: in place where both are dense."""
    if new is None:
        return held
    if held.layout == new.layout == torch.strided:
        return held.add_(new)
    return new + held if held.is_sparse else held + new
