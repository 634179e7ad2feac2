"""The benchmark of losses over ranks: same gradients from all variants, lines that say enough."""

from __future__ import annotations

import functools
import json
import sys

import pytest

MODULES = ("provenance", "records", "ring")


@pytest.fixture(scope="module")
def run(run_bench):
    return functools.partial(run_bench, "ring.py")


def test_every_line_tells_what_where_and_how(run, tmp_path):
    output = tmp_path / "lines.jsonl"
    size = ("--ranks", 2, "--rows", 40, "--dim", 16, "--runs", 2)
    text = run(*size, "--output", output, "--table")
    lines = {line["what"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert list(lines) == ["materialised", "ring", "ring bfloat16", "gather", "gather bfloat16"]
    for line in lines.values():
        assert line["gradient_difference"] < (1e-5 if line["wire"] == "float32" else 0.02)
        assert 0 < line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert (line["ranks"], line["B"], line["D"], line["runs"]) == (2, 80, 16, 2)
        assert line["peak_extra_bytes"] is None or line["peak_extra_bytes"] >= 0
        for name in ("torch", "numba", "python", "commit", "date", "device"):
            assert line[name], name
        assert line["command"].startswith("python scripts/bench/ring.py --ranks 2")
    features = 40 * 16
    statistics = 40 * (2 * 16 + 12)
    # Beside what is counted in test_ring_losses.py: some numbers that ranks agree on.
    ring = 2 * 4 * features + 2 * 4 * features + statistics
    assert 0 < lines["ring"]["sent_bytes"] - ring < 400
    assert lines["ring"]["sent_bytes"] - lines["ring bfloat16"]["sent_bytes"] == 2 * 2 * features
    gather = 4 * features + 4 * features + 40 * (16 + 12)
    assert 0 < lines["gather"]["sent_bytes"] - gather < 400
    # Queries and keys and gradients of both.
    assert lines["materialised"]["sent_bytes"] == 4 * 4 * features
    assert "2 ranks, 80 rows of all, 16 features" in text
    assert "| 2 | 80 | ring bfloat16 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "expected at least 2 ranks, got 1"),
        (["--rows", "0"], "expected numbers of at least 1, got 0"),
    ],
)
def test_errors(arguments, message, bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ring.py", *arguments])
    with pytest.raises(SystemExit):
        bench.ring.parse()
    assert message in capsys.readouterr().err


def test_without_lines_there_is_no_table(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ring.py", "--table", "--output", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="expected measured lines in"):
        bench.ring.main()


def test_help_tells_what_is_measured(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ring.py", "--help"])
    with pytest.raises(SystemExit):
        bench.ring.parse()
    assert "keys round a ring, gathered, and materialised" in capsys.readouterr().out
