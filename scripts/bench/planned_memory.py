"""Predicted against measured peak memory of a training on synthetic data.

    python scripts/bench/planned_memory.py [--labels 300000] [--set head.fan_in=32 ...]

A few steps with validation and checkpoint, bag encoder, as `xmc plan` counts them. Measured is the
highest resident set of this process, so one shape a process; run it twice where kernels are not
compiled yet. Linux only. Prints a JSON line and with --output appends it to a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from provenance import append, provenance

from xmc.memory import peak_memory_bytes

VOCABULARY = 2_000
STEPS = 3
VALIDATION_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=300_000)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    before = peak_memory_bytes()

    from xmc.config import load_recipe
    from xmc.data.label_features import label_features
    from xmc.data.synthetic import make_synthetic
    from xmc.data.vocab import Vocabulary
    from xmc.heads.arranged import ArrangedHead
    from xmc.heads.bag import BagClassifierHead
    from xmc.heads.classifier import ClassifierHead
    from xmc.heads.order import is_arranged
    from xmc.model import XMCModel
    from xmc.nn.encoder import BagEncoder
    from xmc.training.loop import TrainingLoop
    from xmc.training.planner import Workload, make_plan
    from xmc.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        recipe, run = Path(folder) / "recipe.toml", Path(folder) / "run"
        recipe.write_text("[train]\nepochs = 1\nbatch_size = 64\neval_batch_size = 64\n")
        config = load_recipe(recipe, ["features.vocabulary=hashing", *options.settings])
        step_rows = config.train.batch_size * config.train.accumulation
        train_set = make_synthetic(STEPS * step_rows, options.labels, VOCABULARY, seed=1)
        validation_set = make_synthetic(VALIDATION_ROWS, options.labels, VOCABULARY, seed=2)
        torch.manual_seed(0)
        dim = config.encoder.dim
        encoder = BagEncoder(VOCABULARY, dim, config.encoder.dropout)
        make = ArrangedHead if is_arranged(options.labels, config.head) else ClassifierHead
        sizes = (options.labels, config.head, config.classifier_optimizer)
        head: ClassifierHead | ArrangedHead
        if words := config.head.bag_fan_in:
            head = BagClassifierHead.from_options(dim, VOCABULARY, *sizes)
            head.choose_features_(label_features(train_set, max_terms=words), 1.0)
        else:
            head = make.from_config(dim, *sizes)
        (run / "model").mkdir(parents=True)
        # Neither texts nor label strings take part: ids go in, ids come out.
        model = XMCModel(config, Vocabulary.__new__(Vocabulary), [], encoder, head)
        trainer = Trainer(model, config, train_set, validation_set)
        TrainingLoop(trainer, config.train, run, show_progress=False).fit()
    measured = peak_memory_bytes() - before
    workload = Workload(
        num_labels=options.labels,
        num_features=VOCABULARY,
        num_rows=len(train_set),
        num_positives=int(train_set.labels.indptr[-1]),
        row_entries=int(train_set.features.indptr[-1]) / len(train_set),
        validation_rows=VALIDATION_ROWS,
        label_chars=0,
    )
    plan = make_plan(config, workload)
    record = {
        "what": "predicted and measured peak memory of a training",
        "labels": options.labels,
        "settings": options.settings,
        "predicted_bytes_above_torch": plan.peak_above_torch,
        "measured_bytes_above_torch": measured,
        "error": round(plan.peak_above_torch / measured - 1, 4),
        **provenance(),
    }
    if options.output:
        append(options.output, [record])
    print(json.dumps(record))


if __name__ == "__main__":
    main()
