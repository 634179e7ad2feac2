"""Training of a classifier: encoder by autograd, head by its fused step, both from one loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xmc.config import Config
from xmc.data.batches import BagStore, Dataset
from xmc.data.steps import epoch_steps
from xmc.distributed.data_parallel import own_part, own_rows
from xmc.distributed.sharding import RowShard
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.classifier import ClassifierHead
from xmc.heads.head import Head
from xmc.model import XMCModel
from xmc.nn.rewire_schedule import is_due, rewire_progress
from xmc.training.auxiliary import PartMeter, auxiliary_share
from xmc.training.backward import backward, pulled_back
from xmc.training.byte_meter import is_out_of_memory
from xmc.training.checkpoint import load_into
from xmc.training.encoder_optimizer import (
    clip_gradient_,
    coalesce_gradient_,
    make_encoder_optimizer,
    make_scaler,
)
from xmc.training.log import RunLog
from xmc.training.loop import StepReport, TrainingError
from xmc.training.passes import FittingPasses, make_passes
from xmc.training.progress import Track, untracked
from xmc.training.replay import random_states, set_random_states_
from xmc.training.replica import Replica
from xmc.training.schedule import lr_factor
from xmc.training.validation import validation_scores
from xmc.types import Bag, BagReps, Batch


class Trainer:
    """Trains `model` on `train_set`; `xmc.training.loop.TrainingLoop` runs it.

    Owns the encoder's optimizer and the position in the data.
    """

    def __init__(
        self,
        model: XMCModel,
        config: Config,
        train_set: Dataset,
        validation_set: Dataset | None,
        *,
        auxiliary: AuxiliaryHead | None = None,
    ) -> None:
        self.model = model
        self.auxiliary = auxiliary  # None from its cut-off on
        self.config = config
        self.train_set = train_set
        self.validation_set = validation_set
        self.device = next(model.encoder.parameters()).device
        self.replica = Replica(model, config)
        self.optimizer = make_encoder_optimizer(model.body, config)
        self.scaler = make_scaler(config, self.optimizer, self.device)
        self.overflows = 0  # steps that the encoder skipped, float16 only
        options = config.train
        self.head = model.classifier
        self.head.seed = options.seed
        self.rows_per_step = options.batch_size * options.accumulation
        self.steps_per_epoch = math.ceil(len(train_set) / self.rows_per_step)
        self.total_steps = options.epochs * self.steps_per_epoch
        self.auxiliary_steps = config.auxiliary.cutoff_epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps taken
        self.track: Track = untracked
        self.ages = None if config.rewire.method == "static" else self.head.slot_ages()
        self._step_reps: list[Tensor] = []  # of the step just taken, where a rewiring reads them
        self._passes = make_passes(config, train_set, self.device, self)

    def steps(self, epoch: int, start: int) -> Iterator[list[Tensor]]:
        """The micro-batches, row ids [R], of each step of an epoch."""
        return epoch_steps(self.train_set, self.config.train, epoch, start=start)

    def run_step(self, work: list[Tensor], log: RunLog, *, measure: bool) -> StepReport:
        """An optimizer step and, if it is due, a rewiring."""
        num_rows = sum(map(len, work))
        if self._passes is None:
            loss, grad_norm, parts = self._optimizer_step(work, num_rows=num_rows, measure=measure)
        else:
            work, (loss, grad_norm, parts) = self._fitting_step(self._passes, work, measure=measure)
            for width, rows in self._passes.news():
                log.write(
                    "passes", step=self.step, rows=rows, **({"tokens": width} if width else {})
                )
        rewired = self._rewire(work)
        if rewired:
            log.write("rewire", step=self.step, **rewired)
        values = {
            "encoder_grad_norm": grad_norm,
            **parts,
            "encoder_lr": self.optimizer.param_groups[0]["lr"],
            "classifier_lr": self.head.lr,
        }
        return StepReport(loss, num_rows, values)

    def after_step(self, log: RunLog) -> None:
        """Drop the auxiliary head at its cut-off."""
        if self.auxiliary is not None and self.step >= self.auxiliary_steps:
            self.auxiliary = None
            log.write("auxiliary_end", step=self.step)

    def _optimizer_step(
        self, chunks: list[Tensor], *, num_rows: int, measure: bool
    ) -> tuple[float, float, dict[str, float]]:
        """One step on chunks of `num_rows` row ids; returns the mean loss, encoder norm and parts.

        The norm costs a pass over the gradient: 0 where nobody measures or clips it, or where the
        encoder skips the step because its gradient overflowed float16; the heads' steps stand. The
        parts of the loss, for the log, are empty where nobody measures or where there is only one.
        """
        config, head = self.config, self.head
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
        self.replica.draw_apart_(self.step)
        for position, chunk in enumerate(chunks, start=1):
            last = position == len(chunks)
            batch, bag = self.replica.batch(self.train_set, chunk)
            with self.replica.one_pass(last=last):
                loss += self._pass(
                    batch, heads, bag=bag, num_rows=num_rows, update=last, meter=meter
                )
            if self._passes is not None:
                coalesce_gradient_(self.model.body)
        self.replica.sum_gradients_()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}: lower encoder_optimizer.lr "
                "or classifier_optimizer.lr"
            )
        norm = 0.0
        self.scaler.unscale_(self.optimizer)
        if measure or config.train.clip_norm:
            norm = clip_gradient_(self.model.body, config.train.clip_norm, self.model.world)
        parts = {} if meter is None else meter.values(self.replica.world)
        if self._encoder_step():
            norm = 0.0
        if measure and self.scaler.is_enabled():
            parts |= {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}
        self.step += 1
        return loss, norm, parts

    def _pass(
        self,
        batch: Batch,
        heads: Sequence[tuple[Head, float]],
        *,
        num_rows: int,
        update: bool,
        bag: Bag | None = None,
        meter: PartMeter | None = None,
    ) -> float:
        """Forward and backward of one pass of a step; returns its part of the loss.

        `batch` is this rank's share of the rows of the pass, `bag` what the encoder needs of all.
        """
        batch = batch.to(self.device)
        pooled = self.replica.encode(batch, bag)
        if self.scaler.is_enabled() and not bool(pooled.isfinite().all()):
            raise TrainingError(
                f"the encoder's activations overflow float16 at step {self.step}: "
                'train with encoder.autocast = "bfloat16" or "none"'
            )
        reps = self.model.intermediate(pooled)  # the same tensor where there is no such layer
        read: Any = self.model.head_inputs(reps, batch.inputs)
        if self.config.rewire.method == "rigl" and self._rewires_after(self.step + 1):
            self._step_reps.append(reps.detach())
        results = [
            part.loss_and_grad(
                x.detach(), batch.labels, num_rows=num_rows, update=update, weight=weight
            )
            # Of the classifier and of the auxiliary head.
            for (part, weight), x in zip(heads, (read, pooled), strict=False)
        ]
        reps = read.values if isinstance(read, BagReps) else reps
        if meter is not None:
            meter.add([pulled_back(results[0], reps, pooled), *results[1:]])
        backward((reps, pooled), [self.scaler.scale(result.d_reps) for result in results])
        return float(sum(result.loss for result in results))

    def _fitting_step(
        self, passes: FittingPasses, work: list[Tensor], *, measure: bool
    ) -> tuple[list[Tensor], tuple[float, float, dict[str, float]]]:
        """`_optimizer_step` in passes that fit into memory, which it returns too.

        A step that runs out of memory all the same is begun again in smaller passes, with the same
        random numbers, so that no row is lost or counted twice.
        """
        rows = torch.cat(work)
        random = random_states(self._drawing())
        while True:
            work = passes.cut(rows)
            steps = self.head.steps
            try:
                return work, self._optimizer_step(work, num_rows=len(rows), measure=measure)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.head.steps != steps or not passes.shrink(work):
                    error.add_note("give the training a lower train.memory_limit")
                    raise
            self._forget_gradient()
            set_random_states_(random)

    def trial(self, batch: Batch) -> None:
        """A pass that changes nothing, for its memory: every part of its loss weighs 0."""
        heads: list[tuple[Head, float]] = [(self.head, 0.0)]
        if self.auxiliary is not None:
            heads.append((self.auxiliary, 0.0))
        random = random_states(self._drawing())
        try:
            self._pass(batch, heads, num_rows=len(batch), update=False)
        finally:
            self._forget_gradient()
            set_random_states_(random)

    def _forget_gradient(self) -> None:
        """Of a step that is not to be taken."""
        self.optimizer.zero_grad(set_to_none=True)
        self._step_reps = []
        for head in self._classifiers():
            head.moments.grad_weight = head.moments.grad_bias = None

    def untouched_bytes(self) -> int:
        """Of moments that are not in memory yet, though the first step will touch them."""
        size = 0
        offloaded = self.config.encoder_optimizer.offload and self.device.type == "cuda"
        if not self.optimizer.state and not offloaded:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            size += sum(2 * p.numel() * p.itemsize for p in trained)
        for head in self._classifiers():
            # Made here, in no trial. Zeros: a CPU has none of their pages before they are written.
            tensors = head.training_state().values()
            if not head.steps and self.device.type != "cuda":
                size += sum(t.numel() * t.itemsize for t in tensors)
        return size

    def several_bytes(self, rows: Tensor) -> int:
        """The sparse gradient of a table over rows [R], and what adding one more pass's takes."""
        features = self.train_set.features
        if not isinstance(features, BagStore):
            return 0
        touched = features.rows(rows).ids.unique().numel()
        return 3 * 4 * touched * self.model.encoder.out_features

    def single_saving(self) -> int:
        """The heads' gradients, which one pass applies tile by tile."""
        layers = [head.layer for head in self._classifiers()]
        return sum(4 * (layer.weight.numel() + layer.out_features) for layer in layers)

    def _classifiers(self) -> list[ClassifierHead]:
        """The heads' parts that have moments."""
        found = [part for part in self.head.modules() if isinstance(part, ClassifierHead)]
        return found if self.auxiliary is None else [*found, self.auxiliary.classifier]

    def _drawing(self) -> list[torch.device]:
        """The devices whose random numbers a pass draws."""
        return list({torch.device("cpu"), self.device})

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
            rows = torch.cat([self.replica.rows(chunk) for chunk in chunks])
            labels = self.train_set.labels.rows(rows).to(self.device)
        report = self.head.rewire_(
            options,
            seed=self.config.train.seed,
            step=self.step,
            progress=rewire_progress(options, self.step, self.total_steps),
            reps=reps,
            labels=labels,
            ages=self.ages,
        )
        return report.to_dict()

    def validate(self) -> dict[str, float] | None:
        """Scores on the validation rows; None where there are none."""
        return validation_scores(
            self.model,
            self.validation_set,
            self.config,
            ks=_VALIDATION_KS,
            metrics=_VALIDATION_METRICS,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments of the heads and ages of slots, for a checkpoint."""
        tensors = {f"model.{k}": own_part(v) for k, v in self.model.weights().items()}
        tensors |= {f"head.{k}": v for k, v in self.head.training_state().items()}
        if self.ages is not None:
            tensors |= {f"rewire.{k}": v for k, v in self.ages.tensors().items()}
        if self.auxiliary is not None:
            tensors |= {f"auxiliary.{k}": v for k, v in self.auxiliary.training_state().items()}
        return tensors

    def row_shards(self) -> dict[str, RowShard]:
        """Which rows this rank has of tensors that are only a part here."""
        shards = {f"model.{name}": rows for name, rows in self.model.row_shards().items()}
        for name, tensor in self.model.weights().items():
            if (rows := own_rows(tensor)) is not None:
                shards[f"model.{name}"] = rows
        parts = {"head": self.head, "rewire": self.ages, "auxiliary": self.auxiliary}
        for prefix, part in parts.items():
            if part is not None:
                shards |= {f"{prefix}.{name}": rows for name, rows in part.row_shards().items()}
        return shards

    def state(self) -> dict[str, Any]:
        """Counters and the loss scale, for a checkpoint."""
        return {
            "head_steps": self.head.steps,
            "scaler": self.scaler.state_dict(),  # empty where there is none
            "overflows": self.overflows,
            "passes": None if self._passes is None else self._passes.state(),
            "auxiliary_steps": None if self.auxiliary is None else self.auxiliary.steps,
        }

    def restore_(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what a checkpoint holds; its optimizer is the loop's business."""
        weights = {name: own_part(tensor) for name, tensor in self.model.weights().items()}
        load_into(weights, tensors, "model.")
        load_into(self.head.training_state(), tensors, "head.")
        if self.auxiliary is not None and state["auxiliary_steps"] is None:
            self.auxiliary = None  # the checkpoint is from after the cut-off
        if self.auxiliary is not None:
            load_into(self.auxiliary.training_state(), tensors, "auxiliary.")
            self.auxiliary.steps = state["auxiliary_steps"]
        if self.ages is not None:
            load_into(self.ages.tensors(), tensors, "rewire.")
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
            self.overflows = state["overflows"]
        if self._passes is not None:
            self._passes.restore_(state["passes"])
        self.head.steps = state["head_steps"]


_VALIDATION_KS = (1, 3, 5)
_VALIDATION_METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "R@5")
