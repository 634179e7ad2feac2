"""Memory is the product: a million labels train, validate and checkpoint in a fraction of dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "million_labels.py"


def test_a_million_labels_train_within_a_gigabyte_and_a_half(tmp_path: Path) -> None:
    """L = 1,000,000, D = 512, F = 32, AdamW on both sides, SET, validation and checkpoints.

    Weights, gradient and moments of a dense classifier alone would take 8.2 GB; [B, L] scores of
    the validation batch 2 GB.
    """
    output = tmp_path / "million.jsonl"
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["labels"] == 1_000_000
    assert record["classifier_bytes"] == 1_000_000 * (32 * (4 + 2) + 4)
    assert record["peak_bytes_above_torch"] < 1.5e9, record
