"""One encoder over the chunks of its inputs: representations without a graph, then replays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from xmc.training.autocast import without_autocast
from xmc.training.chunks import Chunk, call, cut, num_rows, tensors
from xmc.training.gradient_sync import synchronizers
from xmc.training.replay import Recorder, State

Encoder = Callable[..., Any]
Getter = Callable[[Any], Tensor] | str | int | None


class Encoding:
    """An encoder, the chunks of its inputs, and what is needed to run any of them again."""

    def __init__(
        self,
        encoder: Encoder,
        inputs: Any,
        *,
        chunk: Chunk,
        rep: Getter = None,
        modules: Iterable[nn.Module] = (),
        name: str = "the encoder",
    ) -> None:
        self.name = name
        self._encoder = encoder
        self._rep = rep
        self._parts = cut(inputs, chunk)
        held = [tensor for _, tensor in tensors(inputs)]
        # Chunks that are loaded when asked for are not held: the first speaks for all.
        given = held or [tensor for _, tensor in tensors(self._parts[0])]
        if any(tensor.requires_grad and not tensor.is_leaf for tensor in given):
            raise ValueError(
                f"expected inputs of {name} that are leaves or need no gradient, got the result of "
                "a computation: its graph would be needed once a chunk"
            )
        self.modules = list(dict.fromkeys([*modules_of(encoder), *modules]))
        self.wrappers = synchronizers(self.modules)
        parameters = [p for module in self.modules for p in module.parameters()]
        # Without a module to look into, an encoder may well be trained.
        self.needs_grad = not self.modules or any(t.requires_grad for t in [*given, *parameters])
        self.devices = {tensor.device for tensor in [*given, *parameters]}
        self.tensors = [*held, *parameters]  # there whether a chunk is run or not
        self.recorder = Recorder(self.modules, self.devices)
        self._states: dict[int, State] = {}
        self._graphs: dict[int, Tensor] = {}
        self._reps: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._parts)

    def forward(self, index: int, *, graph: bool) -> None:
        """Represent chunk `index`, in order; `graph` keeps the graph for `backward`."""
        with self.recorder.recorded() as state, torch.set_grad_enabled(graph):
            rep = self.run(index)
        self._states[index] = state
        if graph:
            self._graphs[index] = rep
        self._reps.append(rep.detach())

    def drop_graph(self, index: int) -> None:
        """Let `backward` of chunk `index` run it again after all."""
        del self._graphs[index]

    def take_representations(self) -> tuple[Tensor, list[int]]:
        """All chunks in one leaf [B, ...], no longer held here, and their numbers of rows."""
        reps, self._reps = self._reps, []
        kinds = sorted({f"{list(rep.shape[1:])} {rep.dtype}" for rep in reps})
        if len(kinds) > 1:
            raise ValueError(
                f"expected representations of one shape and dtype from all chunks of {self.name}, "
                f"got {' and '.join(kinds)}"
            )
        whole = reps[0] if len(reps) == 1 else torch.cat(reps)
        return whole.requires_grad_(self.needs_grad), [len(rep) for rep in reps]

    def backward(self, index: int, d_rep: Tensor) -> None:
        """Add the gradients of chunk `index`; inside the recorder's `preserved`."""
        rep = self._graphs.pop(index, None)
        if rep is None:
            with torch.enable_grad():
                rep = self.again(index)
        if rep.requires_grad:
            with without_autocast(self.devices):
                torch.autograd.backward(rep, d_rep)

    def again(self, index: int) -> Tensor:
        """Chunk `index` as it was the first time; inside the recorder's `preserved`."""
        self.recorder.restore_(self._states[index])
        return self.run(index)

    def run(self, index: int) -> Tensor:
        """Representations [rows, ...] of chunk `index` from the present state, checked."""
        part = self._parts[index]
        before = [(name, tensor, _version(tensor)) for name, tensor in tensors(part)]
        rep = _get(call(self._encoder, part), self._rep, self.name)
        for name, tensor, version in before:
            if _version(tensor) != version:
                raise ValueError(
                    f"expected {self.name} to leave its inputs as they are, since they are read "
                    f"again, but it changed {name or 'its input'} in place"
                )
        rows = num_rows(part)
        if rep.dim() == 0 or rep.shape[0] != rows:
            raise ValueError(
                f"expected {self.name} to give {rows} representations for {rows} rows, "
                f"got shape {list(rep.shape)}"
            )
        return rep


def modules_of(encoder: Encoder) -> list[nn.Module]:
    """The modules an encoder calls: itself, its owner, or what a function refers to by name."""
    if isinstance(encoder, nn.Module):
        return [encoder]
    if isinstance(encoder, partial):
        values = [encoder.func, *encoder.args, *encoder.keywords.values()]
        return [module for value in values if callable(value) for module in modules_of(value)]
    if inspect.ismethod(encoder):
        return _modules_among([encoder.__self__], encoder.__code__.co_names)
    if inspect.isfunction(encoder):
        return _modules_among([value for _, value in referred(encoder)], encoder.__code__.co_names)
    return []


def referred(function: FunctionType) -> list[tuple[str, Any]]:
    """What a function knows by name from around it: enclosing functions, then its file."""
    code, found = function.__code__, []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            found.append((name, cell.cell_contents))
    known = function.__globals__
    return found + [(name, known[name]) for name in code.co_names if name in known]


def _modules_among(values: Iterable[Any], names: Iterable[str]) -> list[nn.Module]:
    """The values that are modules, and of others their attributes of these names that are."""
    found: list[Any] = []
    for value in values:
        own = getattr(value, "__dict__", {})
        found += [value] if isinstance(value, nn.Module) else [own.get(name) for name in names]
    return [module for module in found if isinstance(module, nn.Module)]


def _get(output: Any, getter: Getter, name: str) -> Tensor:
    if isinstance(getter, str):
        output = getattr(output, getter)
    elif isinstance(getter, int):
        output = output[getter]
    elif getter is not None:
        output = getter(output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"expected a tensor of representations from {name}, got {type(output).__name__}: "
            "rep= gets them from it, by a function, the name of a field or a position"
        )
    return output


def _version(tensor: Tensor) -> int:
    """Changes with every write in place; those to inference tensors are not counted."""
    return 0 if tensor.is_inference() else tensor._version
