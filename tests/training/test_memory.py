"""Memory is the product: a million labels train, validate and checkpoint in a fraction of dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_RUN = """
import json, sys, warnings
import torch
from xmc.memory import peak_memory_bytes
before = peak_memory_bytes()

from pathlib import Path
from xmc.config import FeatureConfig, from_dict
from xmc.data.synthetic import make_synthetic
from xmc.data.vocab import Vocabulary
from xmc.model import XMCModel
from xmc.nn.encoder import BagEncoder
from xmc.heads.classifier import ClassifierHead
from xmc.training.trainer import Trainer

L, D, V = 1_000_000, 512, 20_000
config = from_dict({
    "encoder": {"dim": D},
    "head": {"fan_in": 32},
    "rewire": {"method": "set", "interval": 8, "end": 1.0},
    "train": {"epochs": 2, "batch_size": 64, "checkpoint_every": 10},
}, source="test")
torch.manual_seed(0)
encoder = BagEncoder(V, D, config.encoder.dropout)
head = ClassifierHead.from_config(D, L, config.head, config.classifier_optimizer)
model = XMCModel(config, None, range(L), encoder, head)
run = Path(sys.argv[1])
(run / "model").mkdir(parents=True)
Trainer(
    model,
    config,
    make_synthetic(64 * 12, L, V, seed=1),
    make_synthetic(512, L, V, seed=2),
    run,
).fit()
print(json.dumps({"extra": peak_memory_bytes() - before, "model": model.num_bytes()}))
"""


def test_a_million_labels_train_within_a_gigabyte_and_a_half(tmp_path: Path) -> None:
    """L = 1,000,000, D = 512, F = 32, AdamW on both sides, SET, validation and checkpoints.

    Weights and moments of a dense classifier alone would take 4 * 4 * L * D = 8.2 GB; [B, L]
    scores of the validation batch 2 GB.
    """
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["model"] < 260 * 2**20
    assert report["extra"] < 1.5e9, report
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
