"""A model in stages over ranks, driven by messages (AxoNN, Singh & Bhatele 2022, arXiv 2110.13005).

There is no schedule. Each rank acts on whichever message arrives first: an activation starts a
forward pass, a gradient a backward pass. The first stage lets `pipeline_limit` micro-batches in,
and one more for each whose gradient came home, so that no stage ever holds the activations of more.
The last stage computes the loss and starts the backward pass at once.

What depends on the order of arrival is time alone: every stage runs its forward passes in the order
of the micro-batches, and its backward passes too, and random numbers are those of the micro-batch
and the cut. A step repeats bitwise, and equals that of the same cuts on one rank to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from xmc.distributed.collectives import World, sum_
from xmc.distributed.gradient_sum import sum_gradients_
from xmc.distributed.links import PipelineError
from xmc.distributed.neighbours import Neighbours
from xmc.distributed.place import Place
from xmc.distributed.stage_runner import StageRunner, buffers_kept
from xmc.distributed.step_clock import StepClock, StepReport
from xmc.distributed.sweep import EvaluationSweep, Job, Loss, TrainingSweep, coupled, jobs

__all__ = ["Pipeline", "PipelineError", "Place", "StepReport", "StepResult", "differentiated"]

R = TypeVar("R")
CoupledLoss = Callable[[list[Any]], tuple[Tensor, Sequence[Any]]]


@dataclass(frozen=True)
class StepResult:
    """What one step gives on every rank."""

    loss: float  # summed over micro-batches, and over replicas where they were synchronised
    report: StepReport  # of this rank


class Pipeline:
    """This rank's stage of a model, and the messages that make it train with the other stages.

    `stage` is a module, or several to run one after the other (consecutive cuts of the model). It
    is called with the tensors that the stage before returned, the first one with a micro-batch (a
    tuple or list of tensors as `stage(*micro_batch)`), and returns a tensor or a tuple of up to
    eight. All that a later stage needs has to pass through those before it, such as an attention
    mask; only tensors that require a gradient get one. Shapes and dtypes are announced with each
    message, so that micro-batches may differ in rows and lengths, but nobody may change a received
    tensor in place.

    The ranks of torch's default process group are `num_stages` times any number of replicas; rank
    `replica * num_stages + stage` holds that stage (`place`), and `replicas` are the ranks that
    hold the same one. All ranks build the pipeline together: it makes process groups. Without
    torch.distributed there is one stage and one replica, which is the unpipelined step.

    `pipeline_limit` bounds how many micro-batches have activations anywhere; by default, as
    published, the number of stages. Twice as many hide more of what a slow or irregular stage
    costs the others; beyond that there is little to gain.

    `checkpointing` keeps of a micro-batch only what this stage received and computes the rest again
    before its backward pass, with the same random numbers; running statistics count it once. Not on
    the last stage, whose backward pass follows at once. `timeout` is for how many seconds a rank
    that has nothing to do waits for a message.

    Tensors on CPUs go through gloo. Those on GPUs go through NCCL where the default group has it
    ("cpu:gloo,cuda:nccl"), once the pass that makes them is done, and through host memory where
    it has not.

    Errors: a rank that fails raises what it met and tells the others, which raise PipelineError
    with its rank and its words; so do the neighbours of one that is gone. The pipeline cannot be
    used afterwards. Raises ValueError for a number of ranks that is no multiple of `num_stages`.
    """

    def __init__(
        self,
        stage: nn.Module | Sequence[nn.Module],
        *,
        num_stages: int,
        pipeline_limit: int | None = None,
        checkpointing: bool = False,
        timeout: float = 300.0,
        device: torch.device | str | None = None,  # default: that of the first parameter, or CPU
    ) -> None:
        cuts = [stage] if isinstance(stage, nn.Module) else list(stage)
        limit = num_stages if pipeline_limit is None else pipeline_limit
        if limit < 1 or timeout <= 0 or not cuts:
            raise ValueError(
                f"expected pipeline_limit, timeout and a number of cuts above 0, "
                f"got {limit}, {timeout} and {len(cuts)}"
            )
        parameters = [p for cut in cuts for p in cut.parameters()]
        first = parameters[0].device if parameters else torch.device("cpu")
        self.device = first if device is None else torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.place = Place.of(World.current(), num_stages)
        self._limit = limit
        self._neighbours = Neighbours(
            self.place, num_cuts=len(cuts), limit=limit, device=self.device, timeout=timeout
        )
        self.replicas = self._neighbours.replicas
        self._runner = StageRunner(
            cuts,
            first_cut=self._neighbours.first_cut,
            checkpointing=checkpointing and not self.is_last,
            device=self.device,
            name=str(self.place),
        )

    @property
    def is_first(self) -> bool:
        return self.place.is_first

    @property
    def is_last(self) -> bool:
        return self.place.is_last

    def step(
        self,
        inputs: Sequence[Any] | None = None,
        loss: Loss | None = None,
        *,
        seed: int | None = None,
        synchronize: bool = True,
    ) -> StepResult:
        """Forward and backward passes of all micro-batches; adds to the `.grad` of the parameters.

        The first stage gives the micro-batches, the last one `loss(outputs, i) -> (loss,
        d_outputs)` for micro-batch i, both detached, as `Head.loss_and_grad` returns them; what
        other stages give is not used. Losses and gradients are summed: each micro-batch's loss is
        its part of the global mean. Replicas may have different numbers of micro-batches.

        Gradients are then summed over replicas, once: they have to be zero or None before the
        step. `synchronize=False` leaves that to a later step. Sends the tensors between stages and
        their gradients once each, and the parameters' gradients once where there are replicas.

        `seed`, of the first stage, is that of dropout: micro-batch i of replica r draws as number
        i * replicas + r. Default: drawn from torch's default generator there.
        """
        return self._guarded(lambda: self._step(inputs, loss, seed, synchronize))

    def represent(
        self, inputs: Sequence[Any] | None = None, *, seed: int | None = None
    ) -> list[Any] | None:
        """Outputs of the last stage for all micro-batches, there; None elsewhere. Without graphs.

        Dropout, where modules are in training mode, is that of a step with the same seed.
        """
        return self._guarded(lambda: self._represent(inputs, seed))

    def coupled_step(
        self,
        inputs: Sequence[Any] | None = None,
        loss: CoupledLoss | None = None,
        *,
        seed: int | None = None,
        synchronize: bool = True,
    ) -> StepResult:
        """A step whose loss is one of all micro-batches, such as a contrastive one.

        The last stage gives `loss(list of outputs) -> (loss, list of d_outputs)`. One sweep
        without graphs, the loss of all representations and its gradients, then a step with those
        and the same random numbers: one forward pass more than a step, and no more memory than one
        but for the representations (the gradient cache, Gao et al. 2021, arXiv 2101.06983).

        With replicas each last stage gives the loss of its own outputs, to be summed; `replicas`
        is for the loss to gather those of the others.
        """
        return self._guarded(lambda: self._coupled_step(inputs, loss, seed, synchronize))

    def clip_gradients_(self, max_norm: float) -> float:
        """Scale the gradients of all stages where their common norm is larger; returns that norm.

        After `step`, on all ranks. Sends one number among the stages of a replica.
        """
        return self._guarded(lambda: self._clip_gradients_(max_norm))

    def close(self) -> None:
        """Give the process groups back; all ranks do."""
        self._neighbours.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guarded(self, work: Callable[[], R]) -> R:
        try:
            with self._neighbours.guarded():
                return work()
        finally:
            self._runner.clear()

    def _step(
        self,
        inputs: Sequence[Any] | None,
        loss: Loss | None,
        seed: int | None,
        synchronize: bool,
    ) -> StepResult:
        clock = StepClock(self.device)
        with self._neighbours.links() as links:
            waiting = self._jobs(inputs, seed)
            num_cuts = self._neighbours.num_cuts
            sweep = TrainingSweep(
                self._runner, links, clock, loss, place=self.place, num_cuts=num_cuts
            )
            sweep.run(waiting, self._limit)
        if synchronize:
            what = f"the sum over the replicas of stage {self.place.stage}"
            with clock.reducing(), self._neighbours.reducing(what):
                sum_gradients_(self._runner.cuts.parameters(), self.replicas)
                sum_(sweep.loss, self.replicas)
        report = clock.report(
            max_in_flight=sweep.max_in_flight,
            num_micro_batches=sweep.num_done,
            bytes_sent=links.num_bytes,
        )
        return StepResult(float(sweep.loss), report)

    def _sweep(
        self, inputs: Sequence[Any] | None, seed: int | None
    ) -> tuple[EvaluationSweep, StepReport]:
        clock = StepClock(self.device)
        with self._neighbours.links() as links:
            waiting = self._jobs(inputs, seed)
            sweep = EvaluationSweep(self._runner, links, clock, place=self.place)
            sweep.run(waiting)
        number = len(sweep.keys)
        report = clock.report(max_in_flight=0, num_micro_batches=number, bytes_sent=links.num_bytes)
        return sweep, report

    def _clip_gradients_(self, max_norm: float) -> float:
        parameters = [p for p in self._runner.cuts.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        square = norm.to(self.device, torch.float64) ** 2
        with self._neighbours.reducing("the sum over the stages"):
            total = sum_(square, self._neighbours.stages).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return float(total)

    def _represent(self, inputs: Sequence[Any] | None, seed: int | None) -> list[Any] | None:
        sweep, _ = self._sweep(inputs, seed)
        return sweep.outputs if self.is_last else None

    def _coupled_step(
        self,
        inputs: Sequence[Any] | None,
        loss: CoupledLoss | None,
        seed: int | None,
        synchronize: bool,
    ) -> StepResult:
        seed = self._seed(seed)
        with buffers_kept(self._runner.cuts):
            sweep, first = self._sweep(inputs, seed)
        clock = StepClock(self.device)
        cached = None
        if self.is_last:
            with clock.busy():
                cached = coupled(loss, sweep, self.device)
        between = clock.report(max_in_flight=0, num_micro_batches=0, bytes_sent=0)
        result = self._step(inputs, cached, seed, synchronize)
        return StepResult(result.loss, first + between + result.report)

    def _jobs(self, inputs: Sequence[Any] | None, seed: int | None) -> list[Job]:
        return jobs(inputs, self._seed(seed), self.place) if self.is_first else []

    def _seed(self, seed: int | None) -> int:
        """Only the first stage draws one: it travels with the messages."""
        if seed is None and self.is_first:
            return int(torch.randint(1 << 62, (), device="cpu"))
        return seed or 0


def differentiated(loss: Callable[[Any, int], Tensor]) -> Loss:
    """`loss(outputs, i)` with its gradients in the outputs, by autograd.

    Adds to the `.grad` of whatever else the loss reads.
    """

    def with_gradients(outputs: Any, index: int) -> tuple[Tensor, Any]:
        leaves = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in leaves)
        with torch.enable_grad():
            value = loss(leaves if isinstance(outputs, tuple) else leaves[0], index)
        value.backward()
        return value.detach(), tuple(x.grad for x in leaves)

    return with_gradients
