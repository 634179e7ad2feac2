"""Every Triton kernel compiled for three architectures, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xmc_kernels.aot import COLUMNS, SHARED_LIMIT


def table(file: Path, *options: str) -> list[dict]:
    """`python -m xmc_kernels.aot` in a process whose kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xmc_kernels.aot", "--out", str(file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        assert tuple(row) == COLUMNS
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT[row["architecture"]], row
        assert 0 < row["registers"] <= 255, row
        # Products of labels that share an index, of a pattern's blocks, or of similarities run on
        # tensor cores.
        products = row["kernel"].startswith(("_blocks", "_similarity")) or any(
            group in row["config"] for group in (" G16 ", " G64 ")
        )
        assert (row["tensor_cores"] != "") == products, row


def test_kernels_in_bfloat16_fit_an_h100(tmp_path) -> None:
    rows = table(tmp_path / "table.jsonl", "--arch", "90", "--only", "G1 bf16 B128")
    assert len({row["config"] for row in rows}) == len(rows) > 10
    check(rows)


def test_symmetric_losses_in_bfloat16_fit_an_h100(tmp_path) -> None:
    rows = table(tmp_path / "table.jsonl", "--arch", "90", "--only", "symmetric gradient bf16 B4")
    rows += table(
        tmp_path / "table.jsonl", "--arch", "90", "--only", "symmetric statistics bf16 B4"
    )
    rows += table(tmp_path / "table.jsonl", "--arch", "90", "--only", "products both bf16 B4")
    assert [row["tensor_cores"] for row in rows] == ["wgmma"] * 3
    check(rows)


@pytest.mark.slow
def test_all_configurations_fit_an_architecture_each(tmp_path) -> None:
    """The whole table, `python -m xmc_kernels.aot --jobs 2`, takes more than ten minutes."""
    rows = table(tmp_path / "table.jsonl", "--jobs", "2", "--sample")
    assert {row["architecture"] for row in rows} == set(SHARED_LIMIT)
    assert len({row["config"] for row in rows}) == len(rows)
    check(rows)


def test_interpreted_kernels_have_no_resources() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    code = "from xmc_kernels.aot import resource_table; next(resource_table())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "RuntimeError: expected a process without TRITON_INTERPRET=1" in done.stderr
