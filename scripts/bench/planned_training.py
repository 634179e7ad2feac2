"""A short training on synthetic data, whose memory and messages are compared with a plan.

Nothing is imported from xmc before it is called: who calls it measures that too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 2_000
STEPS = 3
VALIDATION_ROWS = 64


@dataclass(frozen=True)
class Trained:
    """What was trained, and what a step took."""

    config: Any  # xmc.config.Config
    workload: Any  # xmc.training.workload.Workload
    sent_bytes: int
    """That this process wrote in a step, to whatever it was; the last step."""
    summed_bytes: int
    """Of these, those for the sum of the encoder's gradients."""
    seconds: float
    """Of a step, median."""


def train_synthetic(num_labels: int, settings: list[str], world: Any = None) -> Trained:
    """A few steps with validation and checkpoint, bag encoder, as `xmc train` does.

    With a world (xmc.distributed.collectives.World) its ranks train together and all call this.
    """
    from xmc.config import load_recipe
    from xmc.data.label_features import label_features
    from xmc.data.synthetic import make_synthetic
    from xmc.data.vocab import Vocabulary
    from xmc.distributed.collectives import World
    from xmc.heads.arranged import ArrangedHead
    from xmc.heads.bag import BagClassifierHead
    from xmc.heads.classifier import ClassifierHead
    from xmc.heads.order import is_arranged
    from xmc.model import XMCModel
    from xmc.nn.encoder import BagEncoder
    from xmc.training.loop import TrainingLoop
    from xmc.training.trainer import Trainer
    from xmc.training.workload import Workload

    world = world or World.alone()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text("[train]\nepochs = 1\nbatch_size = 64\neval_batch_size = 64\n")
        config = load_recipe(recipe, ["features.vocabulary=hashing", *settings])
        run = Path(_agreed_folder(folder, world)) / "run"
        step_rows = config.train.batch_size * config.train.accumulation
        train_set = make_synthetic(STEPS * step_rows, num_labels, VOCABULARY, seed=1)
        validation_set = make_synthetic(VALIDATION_ROWS, num_labels, VOCABULARY, seed=2)
        torch.manual_seed(0)
        dim = config.encoder.dim
        encoder = BagEncoder(VOCABULARY, dim, config.encoder.dropout)
        make = ArrangedHead if is_arranged(num_labels, config.head) else ClassifierHead
        sizes = (num_labels, config.head, config.classifier_optimizer)
        head: ClassifierHead | ArrangedHead
        if words := config.head.bag_fan_in:
            head = BagClassifierHead.from_options(dim, VOCABULARY, *sizes, world=world)
            head.choose_features_(label_features(train_set, max_terms=words), 1.0)
        else:
            head = make.from_config(dim, *sizes, world=world)
        if world.rank == 0:
            (run / "model").mkdir(parents=True)
        # Neither texts nor label strings take part: ids go in, ids come out.
        model = XMCModel(config, Vocabulary.__new__(Vocabulary), [], encoder, head)
        trainer = Trainer(model, config, train_set, validation_set)
        steps = _counted(trainer)
        TrainingLoop(trainer, config.train, run, show_progress=False, world=world).fit()
        if world.size > 1:
            torch.distributed.barrier()  # nobody's folder goes before all are done
    workload = Workload(
        num_labels=num_labels,
        num_features=VOCABULARY,
        num_rows=len(train_set),
        num_positives=int(train_set.labels.indptr[-1]),
        row_entries=int(train_set.features.indptr[-1]) / len(train_set),
        validation_rows=VALIDATION_ROWS,
        label_chars=0,
    )
    seconds = statistics.median(step[0] for step in steps)
    return Trained(config, workload, *steps[-1][1:], seconds)


def _agreed_folder(folder: str, world: Any) -> str:
    from xmc.distributed.collectives import agreed

    return str(agreed(folder, world))


def _counted(trainer: Any) -> list[tuple[float, int, int]]:
    """Of every step that the trainer will take: seconds, bytes written, those of summing."""
    steps: list[tuple[float, int, int]] = []
    sums = [0]
    run_step, sum_gradients_ = trainer.run_step, trainer.replica.sum_gradients_

    def counted_sum() -> None:
        before = written_bytes()
        sum_gradients_()
        sums.append(written_bytes() - before)

    def counted_step(*arguments: Any, **options: Any) -> Any:
        started, before = time.perf_counter(), written_bytes()
        report = run_step(*arguments, **options)
        steps.append((time.perf_counter() - started, written_bytes() - before, sums[-1]))
        return report

    trainer.run_step, trainer.replica.sum_gradients_ = counted_step, counted_sum
    return steps


def written_bytes() -> int:
    """Bytes that this process has handed to the kernel, sockets included. Linux only."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])
