"""The benchmark of exported models, on few labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def test_every_form_is_measured(run_bench: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "exports.jsonl"
    run_bench("exports.py", "--labels", 2000, "--threads", 1, "--output", output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    sizes = {record["weight_dtype"]: record["classifier_bytes"] for record in records}
    # 32 weights, 9 bits for each of 32 inputs, bias; a scale for integers.
    assert sizes == {
        "float32": 2000 * (128 + 36 + 4),
        "bfloat16": 2000 * (64 + 36 + 4),
        "int8": 2000 * (32 + 36 + 4 + 4),
        "int4": 2000 * (16 + 36 + 4 + 4),
    }
    assert all(record["open_seconds"] > 0 for record in records)
    assert all(record["query_ms"]["p50"] <= record["query_ms"]["p99"] for record in records)


def test_a_wrong_call_is_told(run_bench: Callable[..., str]) -> None:
    assert "expected a run or --labels" in run_bench("exports.py", expected=2)
    assert "expected --data with a run" in run_bench("exports.py", "somewhere", expected=2)
