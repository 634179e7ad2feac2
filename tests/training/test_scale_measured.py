"""What a plan says of a rank's memory and messages is what gloo processes take and send."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "planned_ranks.py"


def test_a_rank_of_two_is_predicted_within_a_tenth() -> None:
    """Peak resident set above `import torch`, and the bytes that the kernel sees in a step."""
    command = [sys.executable, str(_SCRIPT), "--ranks", "2", "--no-measure"]
    command += ["--labels", "300000", "--set", "encoder.dim=256", "--set", "head.fan_in=32"]
    for _ in range(2):  # the first may compile kernels, which takes memory of its own
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout.strip().splitlines()[-1])
        if abs(record["error"]) < 0.1:
            break
    assert abs(record["error"]) < 0.1, record
    # gloo heads every message with some bytes of its own.
    sent = record["measured_head_bytes"] / record["predicted_head_bytes"]
    assert 1 <= sent < 1.05, record
    # The encoder's bias alone: what the table needs is gathered beside what heads send.
    assert 0 <= record["measured_gradient_bytes"] - record["predicted_gradient_bytes"] < 1000
