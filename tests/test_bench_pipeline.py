"""The benchmark of pipelines: same gradients from all engines, lines that say enough, the ideal."""

from __future__ import annotations

import functools
import json
import sys

import numpy as np
import pytest

MODULES = ("pipeline", "pipeline_ideal", "pipeline_settings", "provenance", "records")
SCENARIOS = "even,one slow"


@pytest.fixture(scope="module")
def run(run_bench):
    return functools.partial(run_bench, "pipeline.py")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, run):
    output = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    size = ("--stages", 2, "--micro-batches", 5, "--forward-ms", 1, "--runs", 2)
    text = run(*size, "--scenarios", SCENARIOS, "--output", output, "--table", "--plot")
    return output, text


def test_every_line_tells_what_where_and_how(measured):
    output, text = measured
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    most = {
        "message-driven, limit 2": [2, 1],
        "message-driven, limit 4": [4, 1],
        "torch GPipe": [5, 5],
        "torch 1F1B": [2, 1],
    }
    scenarios = {(line["scenario"], line["slow_stage"]) for line in lines}
    assert scenarios == {("even", 0), ("one slow", 0), ("one slow", 1)}
    assert len(lines) == 3 * len(most)
    for line in lines:
        held = line["max_in_flight_by_rank"]
        assert all(got <= limit for got, limit in zip(held, most[line["what"]], strict=True))
        assert held[0] == most[line["what"]][0]
        assert line["gradient_difference"] < 1e-5  # of GPipe's, in float32
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["median_ms"] > line["ideal_ms"] >= 18  # ms of sleep at each stage alone
        assert 0 < line["idle_share"] < 1
        assert np.mean(line["idle_share_by_rank"]) == pytest.approx(line["idle_share"], abs=0.2)
        assert (line["runs"], line["threads"], line["factor"]) == (2, 1, 2.0)
        for name in ("torch", "transformers", "python", "commit", "date", "device"):
            assert line[name], name
        assert line["command"].startswith("python scripts/bench/pipeline.py --stages 2")
    assert "2 stages, 5 micro-batches, one slow, stage 1, 2x, 1 ms a forward pass" in text
    assert "| 2 | one slow, stage 0, 2x | torch 1F1B |" in text
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(output.parent) not in output.read_text()


def test_the_ideal_of_equal_stages_is_the_known_one(bench):
    """(M + P - 1) of the two passes, whatever the engine (GPipe, arXiv 1811.06965, 2.3)."""
    ideal = bench.pipeline_ideal
    for stages, micro_batches in ((2, 2), (2, 5), (4, 4), (4, 9)):
        seconds = np.tile([1.0, 2.0], (stages, micro_batches, 1))
        expected = pytest.approx(3 * (micro_batches + stages - 1))
        assert ideal.scheduled(seconds, ideal.gpipe(stages, micro_batches)) == expected
        assert ideal.scheduled(seconds, ideal.one_f_one_b(stages, micro_batches)) == expected
        assert ideal.message_driven(seconds, stages) == expected


def test_the_ideal_is_between_what_one_stage_and_all_stages_take(bench):
    ideal = bench.pipeline_ideal
    for seed in range(20):
        seconds = np.random.default_rng(seed).exponential(size=(3, 6, 2))
        assert ideal.message_driven(seconds, 1) == pytest.approx(seconds.sum())
        times = [ideal.message_driven(seconds, limit) for limit in (2, 6)]
        times += [ideal.scheduled(seconds, ideal.gpipe(3, 6))]
        times += [ideal.scheduled(seconds, ideal.one_f_one_b(3, 6))]
        for time in times:
            assert seconds.sum((1, 2)).max() < time < seconds.sum()


def test_a_slow_first_stage_costs_a_schedule_more_than_messages(bench):
    """By hand for P = 2, M = 2, passes 2 + 4 and 1 + 2, both micro-batches let in.

    GPipe: stage 0 is done with its forward passes at 4, stage 1 with its first backward pass at
    5 + 2, stage 0 at 7 + 8. By messages: the first gradient is home at 2 + 3, stage 0 at 5 + 8.
    """
    ideal = bench.pipeline_ideal
    seconds = np.array([[[2.0, 4.0]] * 2, [[1.0, 2.0]] * 2])
    assert ideal.scheduled(seconds, ideal.gpipe(2, 2)) == 15
    assert ideal.message_driven(seconds, 2) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenarios", "odd"), "expected some of even, one slow, one irregular, all irregular,"),
        (("--stages", "0,2"), "expected numbers of at least 1, got 0,2"),
        (("--stages", "1"), "expected at least 2 stages, got 1"),
        (("--micro-batches", "2"), "expected at least as many micro-batches as stages (4)"),
    ],
)
def test_wrong_arguments_are_named(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *arguments])
    with pytest.raises(SystemExit):
        bench.pipeline.parse()
    assert message in capsys.readouterr().err


def test_help_says_what_sleep_stands_for(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--help"])
    with pytest.raises(SystemExit):
        bench.pipeline.main()
    text = capsys.readouterr().out
    assert "the sleep\nstands for a device's work" in text
    assert "--slow-stages" in text
