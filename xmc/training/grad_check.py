"""Does the gradient cache fit an encoder: its gradients against those of one backward pass."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xmc.training.autocast import without_autocast
from xmc.training.chunks import Chunk, tensors
from xmc.training.encoding import Encoder, Encoding, Getter, modules_of, referred
from xmc.training.grad_cache import cached_step, loss_of, make_encodings
from xmc.training.gradient_sync import synchronized
from xmc.training.replay import Recorder

_SHOWN = 10  # parameters in a printed report


@dataclass(frozen=True)
class Difference:
    """Of one parameter's two gradients."""

    name: str
    absolute: float  # largest of its elements
    relative: float  # to the largest element of the true gradient, or of all where that is noise


@dataclass(frozen=True)
class Report:
    """What a cached step and one backward pass make of the same batch, each parameter once."""

    loss: float  # absolute difference
    parameters: tuple[Difference, ...]  # largest relative difference first

    @property
    def largest_absolute(self) -> float:
        return max((p.absolute for p in self.parameters), default=0.0)

    @property
    def largest_relative(self) -> float:
        return max((p.relative for p in self.parameters), default=0.0)

    def __str__(self) -> str:
        lines = [
            f"loss differs by {self.loss:.1e}, gradients by at most {self.largest_absolute:.1e} "
            f"({self.largest_relative:.1e} of the parameter's largest)"
        ]
        lines += [
            f"  {p.absolute:.1e}  {p.relative:.1e}  {p.name}" for p in self.parameters[:_SHOWN]
        ]
        if len(self.parameters) > _SHOWN:
            lines.append(f"  and {len(self.parameters) - _SHOWN} parameters that differ less")
        return "\n".join(lines)


def check_equivalence(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Any],
    *,
    chunk: Chunk | Sequence[Chunk],
    undivided: bool = False,
    rep: Getter | Sequence[Getter] = None,
    loss_args: Sequence[Any] = (),
    loss_kwargs: Mapping[str, Any] | None = None,
    modules: Iterable[nn.Module] = (),
) -> Report:
    """Compare the gradients of `cached_step` with those of one backward pass over the same chunks.

    `undivided` compares with a forward pass that is not cut, which tells how much it matters that
    BatchNorm and dropout see one chunk at a time. Parameters are those of the encoders and those
    the loss refers to. Holds the graph of the whole batch: give it a small one. Gradients, buffers
    and torch's random numbers are left as they were.

    Raises ValueError, besides the errors of `cached_step`, for an encoder that gives other
    representations when it is run again from the same state, as with random numbers from outside
    torch, for one that changes its inputs, and where there are no parameters to compare.
    """
    modules, kwargs = list(modules), dict(loss_kwargs or {})
    encodings = make_encodings(encoders, inputs, chunk=chunk, rep=rep, modules=modules)
    named = dict(_named(encodings, loss, [*loss_args, *kwargs.values()]))
    if not named:
        raise ValueError(
            "expected parameters to compare, found none: modules= names the modules that encoders "
            "and loss do not refer to by name"
        )
    all_modules = [module for encoding in encodings for module in encoding.modules]
    devices = {device for encoding in encodings for device in encoding.devices}
    recorder = Recorder(all_modules, devices)
    grads = {parameter: parameter.grad for parameter in named}
    start = recorder.now()
    with recorder.preserved():
        try:
            recorder.restore_(start)
            _check_repeats(encodings, inputs)
            whole = make_encodings(
                encoders,
                inputs,
                chunk=sys.maxsize if undivided else chunk,
                rep=rep,
                modules=modules,
            )
            recorder.restore_(start)
            _clear(named)
            true_loss = _one_pass(whole, lambda *reps: loss(*reps, *loss_args, **kwargs))
            truth = {parameter: parameter.grad for parameter in named}
            recorder.restore_(start)
            _clear(named)
            result = cached_step(
                encoders,
                inputs,
                loss,
                chunk=chunk,
                rep=rep,
                loss_args=loss_args,
                loss_kwargs=kwargs,
                synchronize=False,
                modules=modules,
            )
            found = {parameter: parameter.grad for parameter in named}
        finally:
            for parameter, grad in grads.items():
                parameter.grad = grad
    value = result[0] if isinstance(result, tuple) else result
    return Report(abs(float(value) - true_loss), tuple(_differences(named, truth, found)))


def _check_repeats(encodings: list[Encoding], inputs: Any) -> None:
    before = [(name, tensor, tensor.clone()) for name, tensor in tensors(inputs)]
    for encoding in encodings:
        for index in range(len(encoding)):
            encoding.forward(index, graph=False)
        first, rows = encoding.take_representations()
        stop = 0
        with encoding.recorder.preserved(), torch.no_grad():
            for index, rep in enumerate(first.detach().split(rows)):
                start, stop = stop, stop + len(rep)
                difference = float((encoding.again(index) - rep).abs().max())
                # Sums in another order are forgiven: sqrt(eps) is 3e-4 in float32.
                if difference > torch.finfo(rep.dtype).eps ** 0.5 * float(rep.abs().max()):
                    raise ValueError(
                        f"expected {encoding.name} to give the same representations when its state "
                        f"is restored, but rows {start} to {stop - 1} differ by {difference:.2g}: "
                        "does it draw random numbers outside torch, or keep a state outside its "
                        "buffers?"
                    )
        torch.clear_autocast_cache()
    for name, tensor, value in before:
        if not torch.equal(tensor, value):
            raise ValueError(
                "expected encoders to leave their inputs as they are, but one changed "
                f"{name or 'its input'}"
            )


def _one_pass(encodings: list[Encoding], loss: Callable[..., Any]) -> float:
    """The loss, with its gradients by one backward pass through the graphs of all chunks."""
    wrappers = {wrapper for encoding in encodings for wrapper in encoding.wrappers}
    with ExitStack() as stack:
        stack.enter_context(synchronized(wrappers, ()))
        stack.enter_context(torch.enable_grad())
        reps = [
            torch.cat([encoding.run(index) for index in range(len(encoding))])
            for encoding in encodings
        ]
        value = loss_of(loss(*reps))
        with without_autocast(rep.device for rep in reps):
            value.backward()
    torch.clear_autocast_cache()
    return float(value.detach())


def _named(
    encodings: list[Encoding], loss: Callable[..., Any], given: list[Any]
) -> Iterator[tuple[Tensor, str]]:
    """Every trained parameter with a name, the first where it has several."""
    seen: set[Tensor] = set()
    owners = [(e.name, module) for e in encodings for module in e.modules]
    owners += [("loss", module) for value in [loss, *given] for module in modules_of(value)]
    values: list[tuple[str, Tensor]] = []
    values += [(f"{name}: {key}", p) for name, m in owners for key, p in m.named_parameters()]
    values += [(f"loss: {key}", tensor) for key, tensor in _referred(loss, given)]
    for name, tensor in values:
        if tensor.requires_grad and tensor.is_leaf and tensor not in seen:
            seen.add(tensor)
            yield tensor, name


def _referred(loss: Callable[..., Any], given: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a loss gets as arguments or knows by name."""
    if isinstance(loss, partial):
        yield from _referred(loss.func, [*loss.args, *loss.keywords.values()])
    elif inspect.isfunction(loss):
        yield from tensors(dict(referred(loss)))
    yield from tensors(given)


def _clear(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _differences(
    named: dict[Tensor, str],
    truth: dict[Tensor, Tensor | None],
    found: dict[Tensor, Tensor | None],
) -> list[Difference]:
    """Largest relative difference first."""
    sizes = {parameter: _largest(grad) for parameter, grad in truth.items()}
    largest = max(sizes.values(), default=0.0)
    differences = []
    for parameter, name in named.items():
        expected, got = truth[parameter], found[parameter]
        if expected is None or got is None:
            absolute = max(_largest(expected), _largest(got))
        else:
            absolute = _largest(got - expected)
        # A gradient that is zero in exact arithmetic, as of a key's bias in attention, is rounding.
        size = max(sizes[parameter], torch.finfo(parameter.dtype).eps ** 0.5 * largest)
        differences.append(Difference(name, absolute, absolute / size if size else absolute))
    return sorted(differences, key=lambda difference: -difference.relative)


def _largest(grad: Tensor | None) -> float:
    if grad is None:
        return 0.0
    values = grad.coalesce().values() if grad.is_sparse else grad
    return float(values.abs().max()) if values.numel() else 0.0
