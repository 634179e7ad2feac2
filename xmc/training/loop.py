"""The loop around any training: epochs, log, progress, checkpoints, the best epoch, signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from xmc.config import TrainConfig
from xmc.distributed.collectives import World, agreed, sum_
from xmc.distributed.data_parallel import own_rows
from xmc.distributed.sharding import RowShard
from xmc.memory import peak_memory_bytes
from xmc.model import XMCModel, save_weights
from xmc.training.checkpoint import latest_checkpoint, load_checkpoint
from xmc.training.checkpoint_writer import CheckpointWriter
from xmc.training.log import RunLog
from xmc.training.progress import Track, TrainingProgress

_LOG_EVERY = 20  # optimizer steps per log line
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that ask for a checkpoint and the end


class Interrupted(Exception):  # noqa: N818 - a request of the user, not an error
    """Training stopped on a signal, after writing a checkpoint."""


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class StepReport:
    """What a loop shows and logs of an optimizer step."""

    loss: float
    num_rows: int
    values: dict[str, Any]
    """More for the log's line of the step, where it was measured."""


class Task(Protocol):
    """What is trained, one optimizer step at a time; all that decides the result is its own.

    A checkpoint holds `tensors()`, `state()`, the optimizer and torch's random state.
    """

    model: XMCModel
    device: torch.device
    step: int  # optimizer steps taken
    steps_per_epoch: int
    total_steps: int
    track: Track  # shows work between two steps; set by the loop

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of everything that autograd trains."""
        ...

    def steps(self, epoch: int, start: int) -> Iterator[Any]:
        """What `run_step` takes, for each step of an epoch from `start` on."""
        ...

    def run_step(self, work: Any, log: RunLog, *, measure: bool) -> StepReport:
        """One optimizer step, which counts `step` up; other events of it go into the log."""
        ...

    def after_step(self, log: RunLog) -> None:
        """What changes between two steps."""
        ...

    def validate(self) -> dict[str, float] | None:
        """Scores after an epoch; None where there is nothing to score on."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        ...

    def row_shards(self) -> dict[str, RowShard]:
        """Which rows this rank has of those of `tensors()` that are only a part here.

        May name others, too.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Counters and the like, for JSON; the same on every rank."""
        ...

    def restore_(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `tensors` and `state` gave."""
        ...


class TrainingLoop:
    """Runs a task to its end, keeps the best epoch in `run/model`.

    Everything that decides the result is in the checkpoint, so an interrupted and resumed run ends
    with the same bits as an uninterrupted one (same machine, same number of threads).

    All ranks of a world run it together: the first keeps log and progress, and what is decided
    between two steps is decided for all. Each sends two integers a step beside what the task does.
    """

    def __init__(
        self,
        task: Task,
        options: TrainConfig,
        run: Path,
        *,
        show_progress: bool = True,
        world: World = World.alone(),
    ) -> None:
        self.task = task
        self.options = options
        self.run = run
        self.best: dict[str, float] = {}
        self.bad_epochs = 0
        self.stopped_early = False
        self.seconds = 0.0  # spent training, earlier sessions of the run included
        self.world = world
        self._leads = world.rank == 0
        self._show_progress = show_progress and self._leads
        self._signalled: signal.Signals | None = None
        self._folder = run / "checkpoints"
        self._writer = CheckpointWriter(
            self._folder, world=world, background=options.async_checkpoint
        )

    def fit(self, *, resume: bool = False) -> None:
        """Train to the end. Raises Interrupted, after a checkpoint, on SIGINT or SIGTERM."""
        task = self.task
        log_bytes = self._restore() if resume else 0
        log = RunLog(self.run / "log.jsonl" if self._leads else None, log_bytes)
        try:
            with (
                TrainingProgress(task.total_steps, task.step, self._show_progress) as progress,
                self._signals(),
                self._writer,
            ):
                task.track = progress.track
                while task.step < task.total_steps and not self.stopped_early:
                    self._epoch(log, progress)
            log.write("end", step=task.step, seconds=round(self.seconds, 3), **self.best)
        finally:
            log.close()

    def _epoch(self, log: RunLog, progress: TrainingProgress) -> None:
        task = self.task
        epoch, done = divmod(task.step, task.steps_per_epoch)
        task.model.train()
        for work in task.steps(epoch, done):
            started = time.perf_counter()
            report = task.run_step(work, log, measure=self._logs(task.step + 1))
            seconds = time.perf_counter() - started
            self.seconds += seconds
            rate = report.num_rows / seconds
            progress.step(report.loss, rate, peak_memory_bytes(task.device))
            if self._logs(task.step):
                log.write(
                    "step",
                    step=task.step,
                    epoch=epoch,
                    loss=report.loss,
                    **report.values,
                    examples_per_second=round(rate, 1),
                    peak_memory_bytes=peak_memory_bytes(task.device),
                )
            task.after_step(log)
            if task.step % task.steps_per_epoch == 0:
                self._end_epoch(epoch, log, progress)
                self._checkpoint(log)
            elif task.step % self.options.checkpoint_every == 0:
                self._checkpoint(log)
            signalled = self._signalled_anywhere()
            if signalled is not None and task.step < task.total_steps:
                self._checkpoint(log)
                self._writer.wait()
                raise Interrupted(f"stopped by {signalled.name} after step {task.step}")

    def _logs(self, step: int) -> bool:
        return step % _LOG_EVERY == 0 or step == self.task.total_steps

    def _end_epoch(self, epoch: int, log: RunLog, progress: TrainingProgress) -> None:
        """Validate, keep the weights if they are the best so far, decide on stopping."""
        task, options = self.task, self.options
        started = time.perf_counter()
        values = agreed(task.validate(), self.world)
        if values is None:
            self.best = {"epoch": epoch + 1}
            save_weights(task.model, self.run / "model")
            return
        log.write(
            "validation",
            step=task.step,
            epoch=epoch + 1,
            seconds=round(time.perf_counter() - started, 3),
            **values,
        )
        if self._leads:
            progress.validation(epoch + 1, values)
        if values[options.select_by] > self.best.get(options.select_by, -1.0):
            self.best = {"epoch": epoch + 1, **values}
            self.bad_epochs = 0
            save_weights(task.model, self.run / "model")
        else:
            self.bad_epochs += 1
            self.stopped_early = 0 < options.patience <= self.bad_epochs

    def _checkpoint(self, log: RunLog) -> None:
        task = self.task
        tensors = task.tensors()
        optimizer = task.optimizer.state_dict()["state"]
        counters: dict[str, dict[str, Any]] = {}
        for slot, values in optimizer.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{slot}.{name}"] = value
                else:
                    counters.setdefault(str(slot), {})[name] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        if task.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(task.device)
        state = {
            **task.state(),
            "optimizer": counters,
            "best": self.best,
            "bad_epochs": self.bad_epochs,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "log_bytes": log.sync(),
        }
        shards = self._row_shards()
        self._writer.save(
            step=task.step,
            tensors=tensors,
            state=state,
            row_shards={name: rows for name, rows in shards.items() if name in tensors},
        )

    def _row_shards(self) -> dict[str, RowShard]:
        """Of the task's tensors, and of the moments of parameters that ranks share."""
        shards = self.task.row_shards()
        groups = self.task.optimizer.param_groups
        for slot, parameter in enumerate(p for group in groups for p in group["params"]):
            if (rows := own_rows(parameter)) is not None:
                for name in ("exp_avg", "exp_avg_sq"):
                    shards[f"optimizer.{slot}.{name}"] = rows
        return shards

    @torch.no_grad()
    def _restore(self) -> int:
        """Load the newest checkpoint, if there is one; returns the log's length at that time."""
        latest = latest_checkpoint(self._folder)
        newest = agreed(None if latest is None else latest.name, self.world)
        if newest is None:
            return 0
        path, task = self._folder / newest, self.task
        tensors, state = load_checkpoint(path, world=self.world, row_shards=self._row_shards())
        task.restore_(tensors, state)
        slots: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, slot, field = name.split(".", 2)
                slots.setdefault(int(slot), {})[field] = tensor
        groups = task.optimizer.state_dict()["param_groups"]
        task.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        torch.set_rng_state(tensors["rng.cpu"])
        if task.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], task.device)
        task.step = int(path.name.removeprefix("step-"))
        self.best = state["best"]
        self.bad_epochs = state["bad_epochs"]
        self.stopped_early = state["stopped_early"]
        self.seconds = state["seconds"]
        return int(state["log_bytes"])

    def _signalled_anywhere(self) -> signal.Signals | None:
        """The signal that a rank noted, if any did: torchrun may reach them in different steps."""
        noted = torch.tensor([int(self._signalled is number) for number in _SIGNALS])
        counts = sum_(noted, self.world).tolist()
        return next((s for s, count in zip(_SIGNALS, counts, strict=True) if count), None)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM; a second SIGINT stops at once without a checkpoint."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signalled is not None:
                raise KeyboardInterrupt
            self._signalled = signal.Signals(number)

        old = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
