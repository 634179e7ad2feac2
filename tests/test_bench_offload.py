"""The benchmark of offloading: a baseline takes the steps that ours takes, lines say enough."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xmc.distributed.offload import OffloadedAdamW

MODULES = ("offload", "provenance", "records", "timing")


def test_masters_on_the_device_take_the_same_steps(bench: Any) -> None:
    shapes = bench.offload.Model(hidden=4, layers=1, vocabulary=7).shapes()
    ours, theirs = (bench.offload.Variant(shapes, torch.bfloat16, "cpu") for _ in range(2))
    optimizer = OffloadedAdamW(ours.parameters, **bench.offload.OPTIONS)
    step, adamw = bench.offload.with_masters(theirs)
    for _ in range(5):
        ours.run(optimizer.step)
        theirs.run(step)
    masters = adamw.param_groups[0]["params"]
    for parameter, other, master in zip(ours.parameters, theirs.parameters, masters, strict=True):
        assert torch.equal(optimizer.state[parameter]["master"], master)
        assert torch.equal(parameter, other)
        assert parameter.grad is None
    count = sum(p.numel() for p in ours.parameters)
    assert count == 4 * 7 + 4 * 512 + 4 * 16 + 2 * 64 + 9 * 4 + 16
    for variant, by in ((ours, optimizer), (theirs, adamw)):
        held = bench.offload.memory(variant, bench.offload.parts_of(by))
        steps = 4 * len(shapes)
        assert held == {"device_bytes": 14 * count + steps, "host_bytes": 0, "parameters": count}


def test_every_variant_has_a_line_and_the_table_a_row(
    tmp_path: Path,
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "lines.jsonl"

    def run(*arguments: object) -> str:
        given = ["scripts/bench/offload.py", "--output", output, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        bench.offload.main()
        return capsys.readouterr().out

    text = run("--device", "cpu", "--quick")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = [(r["what"], r.get("parameter_dtype"), r.get("bucket_size")) for r in lines]
    assert found == [
        ("AdamW, fused", "bfloat16", None),
        ("AdamW, fused", "float32", None),
        ("AdamW, fused, on masters", "bfloat16", None),
        ("OffloadedAdamW", "bfloat16", 2**18),
        ("OffloadedAdamW", "bfloat16", 2**22),
        ("OffloadedAdamW", "float32", 2**18),
        ("OffloadedAdamW", "float32", 2**22),
        ("torchao CPUOffloadOptimizer", None, None),
    ]
    for line in lines[:-1]:
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["hidden"] == 16
        for name in ("device", "torch", "commit", "date", "command", "device_bytes"):
            assert line[name], name
    assert lines[-1]["not_available"]  # not installed, or not on a CPU
    assert text.count("| OffloadedAdamW |") == 4
    assert run("--table") == text
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            run("--device", "cuda")
        error = capsys.readouterr().err
        assert "expected a CUDA device, got none: --device cpu tries the script" in error
