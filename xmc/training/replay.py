"""Forward passes that can be run again: random numbers and buffers as they were before each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Slot = tuple[nn.Module, str]  # a buffer by its owner, which may put another tensor in its place


@dataclass(frozen=True)
class State:
    """What a forward pass started from."""

    random: list[tuple[torch.device, Tensor]]  # generator states of the CPU and the devices used
    buffers: dict[_Slot, Tensor]  # only those that the forward pass changes


class Recorder:
    """Records the state before each forward pass of some modules, so that it can be run again.

    Which buffers forward passes change is seen in the first: running statistics of BatchNorm,
    vectors of a spectral norm. These are copied before each pass, the others never again.
    """

    def __init__(self, modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> None:
        self._devices = sorted({*devices, torch.device("cpu")}, key=str)
        owners = {owner: None for module in modules for owner in module.modules()}
        self._slots = [
            (owner, name)
            for owner in owners
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._is_first = True
        self._random: dict[torch.device, Tensor] = {}

    def now(self) -> State:
        """The present state; before the first forward pass with copies of all buffers."""
        for device, random in random_states(self._devices):
            # The CPU's takes 5 KB: states share it for as long as nothing draws from it.
            if device not in self._random or not torch.equal(self._random[device], random):
                self._random[device] = random
        return State(list(self._random.items()), {s: _get(s).clone() for s in self._slots})

    @contextmanager
    def recorded(self) -> Iterator[State]:
        """Run one forward pass inside; the state given is complete when the context is left."""
        state = self.now()
        yield state
        if self._is_first:
            self._is_first = False
            for slot in self._unchanged(state):
                del state.buffers[slot]
            self._slots = list(state.buffers)

    def restore_(self, state: State) -> None:
        """Start the next forward pass from `state`; only inside `preserved`."""
        set_random_states_(state.random)
        for (owner, name), value in state.buffers.items():
            # In a copy of its own: neither the recorded value nor the module's buffer changes.
            owner._buffers[name] = value.clone()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Random numbers and buffers are after the context what they were before it."""
        random = random_states(self._devices)
        buffers = {slot: _get(slot) for slot in self._slots}
        try:
            yield
        finally:
            set_random_states_(random)
            for (owner, name), buffer in buffers.items():
                owner._buffers[name] = buffer

    def _unchanged(self, state: State) -> list[_Slot]:
        same = []
        for slot, before in state.buffers.items():
            after = _get(slot)
            if after.shape == before.shape and after.dtype == before.dtype:
                same.append((slot, (after == before).all()))
        # One transfer for all, not one wait for the device each.
        flags = torch.stack([flag.cpu() for _, flag in same]).tolist() if same else []
        return [slot for (slot, _), flag in zip(same, flags, strict=True) if flag]


def random_states(devices: Iterable[torch.device]) -> list[tuple[torch.device, Tensor]]:
    """The state of each device's default generator."""
    return [(device, _generators(device).get_rng_state(*_which(device))) for device in devices]


def set_random_states_(states: Iterable[tuple[torch.device, Tensor]]) -> None:
    """Set default generators to states of `random_states`."""
    for device, state in states:
        _generators(device).set_rng_state(state, *_which(device))


def _generators(device: torch.device) -> Any:
    return torch.random if device.type == "cpu" else torch.get_device_module(device.type)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    # The CPU has one generator, and so has the only device of a Mac.
    return () if device.type in ("cpu", "mps") else (device,)


def _get(slot: _Slot) -> Tensor:
    owner, name = slot
    buffer = owner._buffers[name]
    assert buffer is not None
    return buffer
