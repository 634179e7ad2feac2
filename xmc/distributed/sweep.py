"""One sweep of micro-batches through a stage: what to do with each message that arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from xmc.distributed.keyed_random import keyed_random, mixed
from xmc.distributed.links import Links
from xmc.distributed.messages import Kind, Message
from xmc.distributed.place import Place
from xmc.distributed.stage_runner import StageRunner
from xmc.distributed.step_clock import StepClock

Loss = Callable[[Any, int], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Job:
    """A micro-batch to be run forward."""

    index: int
    total: int
    key: int = 0
    inputs: tuple[Any, ...] = ()


def jobs(inputs: Sequence[Any] | None, seed: int, place: Place) -> list[Job]:
    """Of the first stage; ValueError without micro-batches."""
    if inputs is None or len(inputs) == 0:
        got = "none" if inputs is None else "an empty sequence"
        raise ValueError(f"expected micro-batches on the first stage, got {got}")
    return [
        Job(
            index,
            len(inputs),
            mixed(seed, index * place.num_replicas + place.replica),
            tuple(micro_batch) if isinstance(micro_batch, tuple | list) else (micro_batch,),
        )
        for index, micro_batch in enumerate(inputs)
    ]


def received(message: Message, *, graph: bool) -> Job:
    """An activation as the inputs of a stage."""
    for tensor, wants_grad in zip(message.tensors, message.wants_grad, strict=True):
        if graph and wants_grad:
            assert tensor is not None
            tensor.requires_grad_()
    return Job(message.index, message.total, message.key, message.tensors)


class TrainingSweep:
    """Forward and backward passes of one stage over all micro-batches."""

    def __init__(
        self,
        runner: StageRunner,
        links: Links,
        clock: StepClock,
        loss: Loss | None,
        *,
        place: Place,
        num_cuts: int,  # of the whole model
    ) -> None:
        if place.is_last and loss is None:
            raise ValueError("expected a loss on the last stage, got none")
        self._runner, self._links, self._clock, self._loss = runner, links, clock, loss
        self._place, self._num_cuts = place, num_cuts
        self.loss = torch.zeros((), dtype=torch.float64, device=runner.device)
        self.max_in_flight = 0
        self.num_done = 0
        self._total: int | None = None

    def run(self, waiting: Sequence[Job], limit: int) -> None:
        """All passes; the first stage lets `limit` of the `waiting` micro-batches in at once."""
        queue = iter(waiting)
        for job in islice(queue, None if self._place.is_last else limit):
            self._forward(job)
        while self._total is None or self.num_done < self._total:
            # No name for the message: it would hold its tensors until the next one comes.
            if self._act(self._links.next()) == Kind.GRADIENT:
                for job in islice(queue, 1):
                    self._forward(job)

    def _act(self, message: Message) -> Kind:
        check_kind(message, Kind.ACTIVATION, Kind.GRADIENT)
        if message.kind == Kind.ACTIVATION:
            self._forward(received(message, graph=True))
        else:
            self._backward(message.index, message.tensors)
        return message.kind

    def _forward(self, job: Job) -> None:
        self._total = job.total
        with self._clock.busy(), _named("forward pass", job):
            outputs = self._runner.forward(job.index, job.inputs, job.key, graph=True)
            self.max_in_flight = max(self.max_in_flight, len(self._runner))
        if self._place.is_last:
            with self._clock.busy(), _named("loss", job):
                gradient = self._evaluate(job, outputs)
            self._backward(job.index, gradient)
            return
        wants = tuple(output.requires_grad for output in outputs)
        self._links.send_after(_message(Kind.ACTIVATION, job, outputs, wants))

    def _backward(self, index: int, gradient: tuple[Tensor | None, ...]) -> None:
        loss, *d_outputs = gradient
        assert loss is not None
        assert self._total is not None
        job = Job(index, self._total)
        with self._clock.busy(), _named("backward pass", job):
            d_inputs = self._runner.backward(index, tuple(d_outputs))
            self.loss += loss
        self.num_done += 1
        if not self._place.is_first:
            self._links.send_before(_message(Kind.GRADIENT, job, (loss, *d_inputs)))

    def _evaluate(self, job: Job, outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """The loss [] float64 and the gradients of the outputs."""
        assert self._loss is not None
        with keyed_random(mixed(job.key, self._num_cuts), self._runner.devices):
            loss, d_outputs = _pair(self._loss(given(outputs), job.index))
        d_outputs = d_outputs if isinstance(d_outputs, tuple | list) else (d_outputs,)
        return one_number(loss).to(self.loss), *d_outputs


class EvaluationSweep:
    """Forward passes of one stage over all micro-batches, without graphs."""

    def __init__(
        self, runner: StageRunner, links: Links, clock: StepClock, *, place: Place
    ) -> None:
        self._runner, self._links, self._clock, self._place = runner, links, clock, place
        self.outputs: list[Any] = []  # of the last stage
        self.keys: list[int] = []

    def run(self, waiting: Sequence[Job]) -> None:
        """All passes. Then hears that the next stage has made its own, so that it hears of errors.

        Those of later stages reach it with the next sweep.
        """
        for job in waiting:
            self._forward(job)
        total = len(waiting)
        while len(self.keys) < total or total == 0:
            total = self._act(self._links.next())
        if not self._place.is_first:
            self._links.send_before(Message(Kind.EVALUATION))
        if not self._place.is_last:
            check_kind(self._links.next(), Kind.EVALUATION)

    def _act(self, message: Message) -> int:
        check_kind(message, Kind.EVALUATION)
        self._forward(received(message, graph=False))
        return message.total

    def _forward(self, job: Job) -> None:
        with self._clock.busy(), _named("forward pass", job):
            outputs = self._runner.forward(job.index, job.inputs, job.key, graph=False)
        self.keys.append(job.key)
        if self._place.is_last:
            self.outputs.append(given(outputs))
        else:
            wants = (False,) * len(outputs)
            self._links.send_after(_message(Kind.EVALUATION, job, outputs, wants))


def coupled(
    loss: Callable[[list[Any]], Any] | None, sweep: EvaluationSweep, device: torch.device
) -> Loss:
    """The loss of all outputs and its gradients, as a loss of each micro-batch by itself."""
    if loss is None:
        raise ValueError("expected a loss on the last stage, got none")
    number = len(sweep.outputs)
    outputs, sweep.outputs = sweep.outputs, []
    with keyed_random(mixed(*sweep.keys), [device]):
        whole, d_outputs = _pair(loss(outputs))
    gradients: list[Any] = list(d_outputs)
    if len(gradients) != number:
        raise ValueError(f"expected gradients of {number} outputs, got {len(gradients)}")
    parts = [one_number(whole), *[torch.zeros_like(whole)] * (number - 1)]

    def part(outputs: Any, index: int) -> tuple[Tensor, Any]:
        gradient, gradients[index] = gradients[index], None
        return parts[index], gradient

    return part


def given(outputs: tuple[Tensor, ...]) -> Any:
    """Detached, and one tensor as itself."""
    detached = tuple(output.detach() for output in outputs)
    return detached[0] if len(detached) == 1 else detached


def one_number(loss: Any) -> Tensor:
    """A loss, detached; ValueError for anything but one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"expected a loss of one number, got {got}")
    return loss.detach().reshape(())


def check_kind(message: Message, *kinds: Kind) -> None:
    if message.kind not in kinds:
        wanted = " or ".join(kind.name.lower() for kind in kinds)
        raise ValueError(
            f"expected a message of kind {wanted}, got {message.kind.name.lower()}: all stages "
            "have to make the same calls"
        )


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"expected (loss, gradients of the outputs) from the loss, got {type(result).__name__}"
        )
    return result


def _message(
    kind: Kind, job: Job, tensors: tuple[Tensor | None, ...], wants_grad: tuple[bool, ...] = ()
) -> Message:
    sent = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    wants_grad = wants_grad or (False,) * len(sent)
    return Message(kind, job.index, job.total, job.key, sent, wants_grad)


@contextmanager
def _named(what: str, job: Job) -> Iterator[None]:
    """Errors inside say in which pass of which micro-batch, and of what it was given."""
    try:
        yield
    except Exception as error:
        shapes = [list(x.shape) for x in job.inputs if isinstance(x, Tensor)]
        of = f" with inputs of shapes {', '.join(map(str, shapes))}" if shapes else ""
        error.add_note(f"in the {what} of micro-batch {job.index}{of}")
        raise
