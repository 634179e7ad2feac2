"""Train a million labels on synthetic data and state the memory it took.

    python scripts/bench/million_labels.py [--labels 1000000] [--dim 512] [--fan-in 32]

Bag encoder, AdamW on both sides, SET, two epochs of 12 steps with validation (top-5 of 512 rows
over all labels) and checkpoints: everything a real run holds. Peak memory is that of the process
above `import torch`. Appends a JSON line to `scripts/bench/results/million_labels.jsonl`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from provenance import RESULTS, append, provenance

from xmc.memory import peak_memory_bytes

VOCABULARY = 20_000
BATCH = 64
STEPS = 12  # per epoch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--fan-in", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS / "million_labels.jsonl")
    options = parser.parse_args()
    before = peak_memory_bytes()

    from xmc.config import from_dict
    from xmc.data.synthetic import make_synthetic
    from xmc.data.vocab import Vocabulary
    from xmc.heads.classifier import ClassifierHead
    from xmc.model import XMCModel
    from xmc.nn.encoder import BagEncoder
    from xmc.training.log import read_log
    from xmc.training.loop import TrainingLoop
    from xmc.training.trainer import Trainer

    config = from_dict(
        {
            "features": {"vocabulary": "hashing"},
            "encoder": {"dim": options.dim},
            "head": {"fan_in": options.fan_in},
            "rewire": {"method": "set", "interval": 8, "end": 1.0},
            "train": {"epochs": 2, "batch_size": BATCH, "checkpoint_every": 10},
        },
        source="million_labels.py",
    )
    torch.manual_seed(0)
    encoder = BagEncoder(VOCABULARY, options.dim, config.encoder.dropout)
    head = ClassifierHead.from_config(
        options.dim, options.labels, config.head, config.classifier_optimizer
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "model").mkdir()
        # Neither texts nor label strings take part: ids go in, ids come out.
        model = XMCModel(config, Vocabulary.__new__(Vocabulary), [], encoder, head)
        train_set = make_synthetic(BATCH * STEPS, options.labels, VOCABULARY, seed=1)
        validation_set = make_synthetic(512, options.labels, VOCABULARY, seed=2)
        trainer = Trainer(model, config, train_set, validation_set)
        TrainingLoop(trainer, config.train, run).fit()
        log = read_log(run / "log.jsonl")
    steps = [event for event in log if event["event"] == "step"]
    layer = model.head.layer
    record = {
        "what": "training of a sparse classifier",
        "labels": options.labels,
        "dim": options.dim,
        "fan_in": options.fan_in,
        "batch": BATCH,
        "peak_bytes_above_torch": peak_memory_bytes() - before,
        "classifier_bytes": sum(t.numel() * t.element_size() for t in layer.state_dict().values()),
        # Weights, gradient and both moments of AdamW in float32.
        "dense_adamw_bytes": 4 * 4 * options.labels * options.dim,
        "examples_per_second": steps[-1]["examples_per_second"],
        **provenance(),
    }
    append(options.output, [record])
    print(
        f"{options.labels:,} labels: peak {record['peak_bytes_above_torch'] / 1e6:,.0f} MB above "
        f"torch, classifier {record['classifier_bytes'] / 1e6:,.0f} MB, dense AdamW would hold "
        f"{record['dense_adamw_bytes'] / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
