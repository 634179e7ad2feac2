"""The training loop: encoder by autograd, head by its fused step, both from one loss."""

from __future__ import annotations

import functools
import math
import operator
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.data.batches import Dataset
from xmc.data.steps import epoch_steps
from xmc.evaluation.metrics import MetricAccumulator, evaluate
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.head import Head, HeadResult
from xmc.memory import peak_memory_bytes
from xmc.model import XMCModel, save_weights
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire_schedule import is_due, rewire_progress
from xmc.nn.slot_age import SlotAges
from xmc.training.auxiliary import PartMeter, auxiliary_share
from xmc.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_into,
    save_checkpoint,
)
from xmc.training.encoder_optimizer import (
    clip_gradient_,
    make_encoder_optimizer,
    make_scaler,
)
from xmc.training.log import RunLog
from xmc.training.progress import TrainingProgress
from xmc.training.schedule import lr_factor

_LOG_EVERY = 20  # optimizer steps per log line


class Interrupted(Exception):  # noqa: N818 - a request of the user, not an error
    """Training stopped on a signal, after writing a checkpoint."""


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Trainer:
    """Trains `model` on `train_set`, keeps the best epoch in `run/model`.

    Owns the encoder's optimizer, the position in the data and the run's files. Everything that
    decides the result is in the checkpoint, so an interrupted and resumed run ends with the same
    bits as an uninterrupted one (same machine, same number of threads).
    """

    def __init__(
        self,
        model: XMCModel,
        config: Config,
        train_set: Dataset,
        validation_set: Dataset | None,
        run: Path,
        *,
        auxiliary: AuxiliaryHead | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.auxiliary = auxiliary  # None from its cut-off on
        self.config = config
        self.train_set = train_set
        self.validation_set = validation_set
        self.run = run
        self.device = next(model.encoder.parameters()).device
        self.optimizer = make_encoder_optimizer(model.body, config)
        self.scaler = make_scaler(config, self.optimizer, self.device)
        self.overflows = 0  # steps that the encoder skipped, float16 only
        options = config.train
        model.head.seed = options.seed
        self.rows_per_step = options.batch_size * options.accumulation
        self.steps_per_epoch = math.ceil(len(train_set) / self.rows_per_step)
        self.total_steps = options.epochs * self.steps_per_epoch
        self.auxiliary_steps = config.auxiliary.cutoff_epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps taken
        self.ages = make_slot_ages(model.head.layer, config)
        self._step_reps: list[Tensor] = []  # of the step just taken, where a rewiring reads them
        self.best: dict[str, float] = {}
        self.bad_epochs = 0
        self.stopped_early = False
        self.seconds = 0.0  # spent training, earlier sessions of the run included
        self._show_progress = show_progress
        self._signalled: signal.Signals | None = None

    def fit(self, *, resume: bool = False) -> None:
        """Train to the end. Raises Interrupted, after a checkpoint, on SIGINT or SIGTERM."""
        log_bytes = self._restore() if resume else 0
        log = RunLog(self.run / "log.jsonl", log_bytes)
        try:
            with (
                TrainingProgress(self.total_steps, self.step, self._show_progress) as progress,
                self._signals(),
            ):
                while self.step < self.total_steps and not self.stopped_early:
                    self._epoch(log, progress)
            log.write("end", step=self.step, seconds=round(self.seconds, 3), **self.best)
        finally:
            log.close()

    def _epoch(self, log: RunLog, progress: TrainingProgress) -> None:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        self.model.train()
        for chunks in epoch_steps(self.train_set, self.config.train, epoch, start=done):
            started = time.perf_counter()
            num_rows = sum(map(len, chunks))
            loss, grad_norm, parts = self._optimizer_step(
                chunks, num_rows=num_rows, measure=self._logs(self.step + 1)
            )
            rewired = self._rewire(chunks)
            seconds = time.perf_counter() - started
            self.seconds += seconds
            progress.step(loss, num_rows / seconds, peak_memory_bytes(self.device))
            if rewired:
                log.write("rewire", step=self.step, **rewired)
            if self._logs(self.step):
                log.write(
                    "step",
                    step=self.step,
                    epoch=epoch,
                    loss=loss,
                    encoder_grad_norm=grad_norm,
                    **parts,
                    encoder_lr=self.optimizer.param_groups[0]["lr"],
                    classifier_lr=self.model.head.lr,
                    examples_per_second=round(num_rows / seconds, 1),
                    peak_memory_bytes=peak_memory_bytes(self.device),
                )
            if self.auxiliary is not None and self.step >= self.auxiliary_steps:
                self.auxiliary = None
                log.write("auxiliary_end", step=self.step)
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch(epoch, log, progress)
                self._checkpoint(log)
            elif self.step % self.config.train.checkpoint_every == 0:
                self._checkpoint(log)
            if self._signalled is not None and self.step < self.total_steps:
                self._checkpoint(log)
                raise Interrupted(f"stopped by {self._signalled.name} after step {self.step}")

    def _logs(self, step: int) -> bool:
        return step % _LOG_EVERY == 0 or step == self.total_steps

    def _optimizer_step(
        self, chunks: list[Tensor], *, num_rows: int, measure: bool
    ) -> tuple[float, float, dict[str, float]]:
        """One step on chunks of `num_rows` row ids; returns the mean loss, encoder norm and parts.

        The norm costs a pass over the gradient: 0 where nobody measures or clips it, or where the
        encoder skips the step because its gradient overflowed float16; the heads' steps stand. The
        parts of the loss, for the log, are empty where nobody measures or where there is only one.
        """
        config, head = self.config, self.model.head
        factor = lr_factor(
            self.step,
            total=self.total_steps,
            warmup=config.train.warmup_steps,
            kind=config.train.schedule,
        )
        head.lr = config.classifier_optimizer.lr * factor
        for group in self.optimizer.param_groups:
            group["lr"] = config.encoder_optimizer.lr * factor * group["lr_scale"]
        heads: list[tuple[Head, float]] = [(head, 1.0)]
        meter = None
        if self.auxiliary is not None:
            self.auxiliary.lr = config.auxiliary.lr * factor
            share = auxiliary_share(
                self.step, scale=config.auxiliary.scale, cutoff=self.auxiliary_steps
            )
            heads = [(head, 1 - share), (self.auxiliary, share)]
            meter = PartMeter(share) if measure else None
        loss = 0.0
        for position, chunk in enumerate(chunks, start=1):
            batch = self.train_set.batch(chunk).to(self.device)
            pooled = self.model.encoder(batch.inputs)
            if self.scaler.is_enabled() and not bool(pooled.isfinite().all()):
                raise TrainingError(
                    f"the encoder's activations overflow float16 at step {self.step}: "
                    'train with encoder.autocast = "bfloat16" or "none"'
                )
            reps = self.model.intermediate(pooled)  # the same tensor where there is no such layer
            if self.config.rewire.method == "rigl" and self._rewires_after(self.step + 1):
                self._step_reps.append(reps.detach())
            inputs = (reps, pooled)  # of the classifier and of the auxiliary head
            results = [
                part.loss_and_grad(
                    x.detach(),
                    batch.labels,
                    num_rows=num_rows,
                    update=position == len(chunks),
                    weight=weight,
                )
                for (part, weight), x in zip(heads, inputs, strict=False)
            ]
            if meter is not None:
                meter.add([pulled_back(results[0], reps, pooled), *results[1:]])
            backward(inputs, [self.scaler.scale(result.d_reps) for result in results])
            loss += float(sum(result.loss for result in results))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}: lower encoder_optimizer.lr "
                "or classifier_optimizer.lr"
            )
        norm = 0.0
        self.scaler.unscale_(self.optimizer)
        if measure or config.train.clip_norm:
            norm = clip_gradient_(self.model.body, config.train.clip_norm)
        parts = {} if meter is None else meter.values()
        if self._encoder_step():
            norm = 0.0
        if measure and self.scaler.is_enabled():
            parts |= {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}
        self.step += 1
        return loss, norm, parts

    def _encoder_step(self) -> bool:
        """Step with the unscaled gradient and forget it; True if it overflowed and was skipped."""
        scale = self.scaler.get_scale()  # 1 where there is none
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:
            return False
        self.overflows += 1
        if scale <= 1:
            raise TrainingError(
                f"the encoder's gradient overflows float16 without any scale at step {self.step}: "
                'train with encoder.autocast = "bfloat16" or "none"'
            )
        return True

    def _rewires_after(self, step: int) -> bool:
        return is_due(self.config.rewire, step, self.total_steps)

    def _rewire(self, chunks: list[Tensor]) -> dict[str, Any] | None:
        """Rewire if it is due after the step on these chunks of row ids; what to log of it."""
        if not self._rewires_after(self.step):
            return None
        options = self.config.rewire
        reps, labels = None, None
        if self._step_reps:
            # All passes of the step together: the gradient is that of the whole step.
            reps, self._step_reps = torch.cat(self._step_reps), []
            labels = self.train_set.labels.rows(torch.cat(chunks)).to(self.device)
        report = self.model.head.rewire_(
            options,
            seed=self.config.train.seed,
            step=self.step,
            progress=rewire_progress(options, self.step, self.total_steps),
            reps=reps,
            labels=labels,
            ages=self.ages,
        )
        return report.to_dict()

    def _end_epoch(self, epoch: int, log: RunLog, progress: TrainingProgress) -> None:
        """Validate, keep the weights if they are the best so far, decide on stopping."""
        options = self.config.train
        if self.validation_set is None:
            self.best = {"epoch": epoch + 1}
            save_weights(self.model, self.run / "model")
            return
        started = time.perf_counter()
        scores = evaluate(
            self.model.topk_of(max(_VALIDATION_KS)),
            self.validation_set.batches(options.eval_batch_size),
            MetricAccumulator(ks=_VALIDATION_KS),
        )
        values = {name: scores.values[name] for name in _VALIDATION_METRICS}
        log.write(
            "validation",
            step=self.step,
            epoch=epoch + 1,
            seconds=round(time.perf_counter() - started, 3),
            **values,
        )
        progress.validation(epoch + 1, values)
        if values[options.select_by] > self.best.get(options.select_by, -1.0):
            self.best = {"epoch": epoch + 1, **values}
            self.bad_epochs = 0
            save_weights(self.model, self.run / "model")
        else:
            self.bad_epochs += 1
            self.stopped_early = 0 < options.patience <= self.bad_epochs

    def _checkpoint(self, log: RunLog) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.weights().items()}
        tensors |= {f"head.{k}": v for k, v in self.model.head.training_state().items()}
        if self.ages is not None:
            tensors |= {f"rewire.{k}": v for k, v in self.ages.tensors().items()}
        if self.auxiliary is not None:
            tensors |= {f"auxiliary.{k}": v for k, v in self.auxiliary.training_state().items()}
        optimizer = self.optimizer.state_dict()["state"]
        counters: dict[str, dict[str, Any]] = {}
        for slot, values in optimizer.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{slot}.{name}"] = value
                else:
                    counters.setdefault(str(slot), {})[name] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "optimizer": counters,
            "head_steps": self.model.head.steps,
            "scaler": self.scaler.state_dict(),  # empty where there is none
            "overflows": self.overflows,
            "auxiliary_steps": None if self.auxiliary is None else self.auxiliary.steps,
            "best": self.best,
            "bad_epochs": self.bad_epochs,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "log_bytes": log.sync(),
        }
        save_checkpoint(self.run / "checkpoints", step=self.step, tensors=tensors, state=state)

    @torch.no_grad()
    def _restore(self) -> int:
        """Load the newest checkpoint, if there is one; returns the log's length at that time."""
        path = latest_checkpoint(self.run / "checkpoints")
        if path is None:
            return 0
        tensors, state = load_checkpoint(path)
        load_into(self.model.weights(), tensors, "model.")
        load_into(self.model.head.training_state(), tensors, "head.")
        if self.auxiliary is not None and state["auxiliary_steps"] is None:
            self.auxiliary = None  # the checkpoint is from after the cut-off
        if self.auxiliary is not None:
            load_into(self.auxiliary.training_state(), tensors, "auxiliary.")
            self.auxiliary.steps = state["auxiliary_steps"]
        if self.ages is not None:
            load_into(self.ages.tensors(), tensors, "rewire.")
        slots: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, slot, field = name.split(".", 2)
                slots.setdefault(int(slot), {})[field] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
            self.overflows = state["overflows"]
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step = int(path.name.removeprefix("step-"))
        self.model.head.steps = state["head_steps"]
        self.best = state["best"]
        self.bad_epochs = state["bad_epochs"]
        self.stopped_early = state["stopped_early"]
        self.seconds = state["seconds"]
        return int(state["log_bytes"])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM; a second SIGINT stops at once without a checkpoint."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signalled is not None:
                raise KeyboardInterrupt
            self._signalled = signal.Signals(number)

        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


_VALIDATION_KS = (1, 3, 5)
_VALIDATION_METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "R@5")


def backward(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """One pass through everything below the heads' inputs, given the gradient of each head.

    The inputs are what each head read, [B, D] each, perhaps the same tensor.
    """
    if len(gradients) > 1 and inputs[0] is inputs[1]:
        gradients = [functools.reduce(operator.add, gradients)]
    # A frozen encoder has no use for a gradient.
    roots = [(x, d_x) for x, d_x in zip(inputs, gradients, strict=False) if x.requires_grad]
    if roots:
        torch.autograd.backward([x for x, _ in roots], [d_x for _, d_x in roots])


def pulled_back(result: HeadResult, reps: Tensor, pooled: Tensor) -> HeadResult:
    """A result on `reps` with its gradient in `pooled`, from which they were made."""
    if reps is pooled:
        return result
    if not pooled.requires_grad:
        return HeadResult(result.loss, torch.zeros_like(pooled))
    (d_pooled,) = torch.autograd.grad(reps, pooled, result.d_reps, retain_graph=True)
    return HeadResult(result.loss, d_pooled)


def make_slot_ages(layer: nn.Module, config: Config) -> SlotAges | None:
    """Ages of the layer's slots, where its pattern evolves."""
    if config.rewire.method == "static" or not isinstance(layer, FixedFanInLinear):
        return None
    index = layer.index
    return SlotAges(index.shape[0], layer.fan_in, device=index.device)
