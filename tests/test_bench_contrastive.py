"""The benchmark of contrastive losses: all of its ways give one loss, its lines say enough."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import torch.nn.functional as F

MODULES = (
    "contrastive",
    "contrastive_baselines",
    "contrastive_jobs",
    "contrastive_large",
    "contrastive_report",
    "contrastive_step",
    "provenance",
    "records",
    "timing",
)
NAMES = ("tiled, one pass", "materialised", "row-chunked", "two one-directional passes")
CPU = ("--quick", "--device", "cpu", "--threads", 1)


@pytest.fixture(scope="module")
def run(run_bench):
    return functools.partial(run_bench, "contrastive.py")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, run):
    output = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    text = run(*CPU, "--output", output)
    return output, text


def test_every_line_tells_what_where_and_how(measured):
    output, text = measured
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    losses = [line for line in lines if line["operation"] == "loss"]
    shapes = {(line["B"], line["D"], line["dtype"]) for line in losses}
    pairs = ((64, 16), (128, 16), (64, 32))
    assert shapes == {(*pair, dtype) for pair in pairs for dtype in ("float32", "bfloat16")}
    for shape in shapes:
        here = {x["what"] for x in losses if (x["B"], x["D"], x["dtype"]) == shape}
        assert here > set(NAMES)
        assert len(here) == 5
    for line in losses:
        # Of bfloat16 a half is lost in the scores alone, at a scale of 20.
        worst = 1e-4 if line["dtype"] == "float32" else 0.5
        assert line["gradient_error"] < worst, line
        flops = 8 * line["B"] ** 2 * line["D"]
        assert line["gflop_per_s"] == pytest.approx(flops / line["median_ms"] / 1e6, abs=2e-3)
    steps = [line for line in lines if line["operation"] == "step"]
    assert {(line["B"], line["chunk"]) for line in steps} == {(8, 4), (16, 4)}
    assert len({line["what"] for line in steps}) == 3
    assert all(line["activation_bytes"] > 0 for line in steps)
    for line in lines:
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["runs"] == 3
        for name in ("threads", "torch", "numba", "python", "commit", "date", "dtype"):
            assert line[name], name
        assert line["command"].startswith("python scripts/bench/contrastive.py --quick")
    assert "loss B=128 D=16 float32, cpu: " in text
    assert str(output.parent) not in output.read_text()


def test_tables_and_plots_come_from_the_lines(measured, run):
    output, _ = measured
    text = run("--table", "--plot", "--output", output)
    for name in ("lines_loss.png", "lines_step.png"):
        assert output.with_name(name).read_bytes().startswith(b"\x89PNG")
        assert f"wrote {name}" in text
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    (line,) = (
        x
        for x in lines
        if x["operation"] == "loss"
        and (x["what"], x["B"], x["D"], x["dtype"]) == ("tiled, one pass", 128, 16, "float32")
    )
    assert "Symmetric loss with gradients, B=128, D=16, float32" in text
    assert f"| tiled, one pass | {line['median_ms']:,.1f} (" in text
    assert f" | {line['gradient_error']:.1e} |" in text
    assert "| dtype | variant | B=64 | B=128 |" in text
    assert "| dtype | variant | D=16 | D=32 |" in text
    assert "| float32 | gradient cache |" in text
    assert line["commit"] in text


def parsed(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["contrastive.py", *map(str, arguments)])
    return bench.contrastive.parse()


def test_a_large_batch_is_run_once_behind_a_bar(bench, tmp_path, monkeypatch):
    output = tmp_path / "lines.jsonl"
    options = parsed(bench, monkeypatch, *CPU, "--large", "--output", output)
    benchmark = bench.contrastive.Benchmark(options, {"device": "cpu", "threads": 1})
    assert options.measure
    assert not list(bench.contrastive._points(options, benchmark))
    benchmark.large()
    (line,) = map(json.loads, output.read_text().splitlines())
    assert (line["B"], line["runs"], line["what"]) == (3000, 1, "tiled, one pass")
    assert line["peak_above_import_bytes"] is None or (
        line["peak_above_import_bytes"] >= line["peak_extra_bytes"]
    )


def test_the_bar_of_a_large_batch_counts_every_tile(bench):
    shape = bench.contrastive_jobs.Shape(2500, 8)
    q, k = bench.contrastive_jobs.Inputs(shape, "cpu", batches=1)[0]
    with bench.contrastive_large.tiles_shown(shape) as bar:
        bench.contrastive_baselines.differentiated(bench.contrastive_baselines.tiled_loss)(q, k)
        (task,) = bar.tasks
        assert task.completed == task.total == 18


@pytest.mark.parametrize(("rows", "chunk"), [(70, 32), (33, 32), (5, 32)])
def test_all_ways_give_the_loss_and_gradients_of_the_definition(bench, rows, chunk, monkeypatch):
    b = bench.contrastive_baselines
    monkeypatch.setattr(b, "CHUNK_ROWS", chunk)
    q, k = (F.normalize(torch.randn(rows, 12), dim=1) for _ in range(2))
    exact, own = b.truth(q, k, sample=rows), torch.arange(rows)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    scores = b.SCALE * leaves[0] @ leaves[1].T
    loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    dq, dk = torch.autograd.grad(loss, leaves)
    assert exact.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(exact.dq, dq)
    torch.testing.assert_close(exact.dk, dk)
    ways = [b.mini_batched]
    for name in ("tiled", "materialised", "row_chunked", "two_directions"):
        ways.append(b.differentiated(getattr(b, f"{name}_loss")))
    for way in ways:
        of_loss, of_gradient = exact.errors(*way(q, k))
        assert of_loss < 1e-5
        assert of_gradient < 1e-5


def test_the_truth_of_a_sample_is_that_of_all_rows(bench):
    b = bench.contrastive_baselines
    q, k = (F.normalize(torch.randn(50, 6), dim=1) for _ in range(2))
    whole, some = b.truth(q, k), b.truth(q, k, sample=7)
    assert some.loss == whole.loss
    assert len(some.rows) == 7
    torch.testing.assert_close(some.dq, whole.dq[some.rows])
    torch.testing.assert_close(some.dk, whole.dk[some.rows])
    # An error is seen: here every gradient is 1% too long.
    of_loss, of_gradient = some.errors(
        torch.tensor(2 * some.loss), 1.01 * whole.dq, 1.01 * whole.dk
    )
    assert (of_loss, of_gradient) == (pytest.approx(1.0), pytest.approx(0.01))


def test_the_mini_batches_are_those_of_sentence_transformers(bench):
    pytest.importorskip("sentence_transformers")
    b = bench.contrastive_baselines
    q, k = (F.normalize(torch.randn(70, 12), dim=1) for _ in range(2))
    name, theirs = b.cached_loss()
    assert name == "sentence-transformers cached, mini-batch 32"
    exact = b.truth(q, k)
    assert max(exact.errors(*theirs(q, k))) < 1e-5
    assert [len(part) for part in theirs(q, k)[1]] == [
        len(part) for part in b.mini_batched(q, k)[1]
    ]


def test_what_would_take_or_hold_too_much_is_left_out(bench):
    jobs = bench.contrastive_jobs
    limits = jobs.Limits(dense_bytes=5 * 2**30, seconds=15, truth_flops=1e12)
    known = {"row-chunked": (jobs.Shape(1024), 100.0)}
    held = jobs.left_out("materialised", jobs.Shape(32_768), limits, {})
    assert held == "matrices of 16 GiB, more than --dense-gib"
    assert jobs.left_out("materialised", jobs.Shape(16_384), limits, {}) == ""
    long = jobs.left_out("row-chunked", jobs.Shape(16_384), limits, known)
    assert long == "about 26 s a run, more than --max-seconds"
    assert jobs.left_out("row-chunked", jobs.Shape(8192), limits, known) == ""
    assert jobs.left_out("tiled, one pass", jobs.Shape(16_384), limits, known) == ""


def test_all_ways_through_the_encoder_sum_their_chunks(bench):
    # A batch of one chunk, without dropout: the three steps are one and the same.
    step = bench.contrastive_step
    shape = step.StepShape(6, chunk=6, T=3, D=16, layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
        patch.setattr(F, "dropout", lambda x, *_, **__: x)
        made = []
        patch.setattr(step, "Encoder", lambda s, make=step.Encoder: made.append(make(s)) or made[0])
        jobs = list(step.step_jobs(shape, "cpu"))
        for layer in made[0].layers.layers:
            layer.self_attn.dropout = 0.0
        values, grads = [], []
        for job in jobs:
            values.append(float(job.run(0)))
            grads.append([p.grad.clone() for p in made[0].parameters()])
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5)
    for other in grads[1:]:
        for got, expected in zip(other, grads[0], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


def test_one_shape_is_measured_once_the_headline_before_the_rest(bench, monkeypatch):
    for device in ("cpu", "cuda"):
        options = parsed(bench, monkeypatch, "--device", "cpu")
        options.device = device
        points = list(bench.contrastive._points(options, bench.contrastive.Benchmark(options, {})))
        shapes = [shape for _, shape in points]
        assert len(set(shapes)) == len(shapes)
        head = bench.contrastive.HEADLINE[device]
        sizes = bench.contrastive.SIZES[device]
        first = [(shape.B, shape.D, shape.dtype) for shape in shapes[: len(sizes)]]
        assert first == [(size, head.D, head.dtype) for size in sizes]
        assert head in shapes
        assert {shape.B for shape in shapes if hasattr(shape, "chunk")} == {128, 256, 512, 1024}
        dims = {shape.D for shape in shapes if not hasattr(shape, "chunk")}
        assert dims >= {128, 256, 512, 1024}


def test_errors_name_the_rule(bench, monkeypatch, capsys):
    for arguments, message in (
        (("--dtypes", "int8"), "expected float32, bfloat16 or float16 by commas, got int8"),
        (("--sizes", "0,4"), "expected numbers of at least 1, got 0,4"),
    ):
        with pytest.raises(SystemExit):
            parsed(bench, monkeypatch, *arguments)
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_an_error(bench, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(bench, monkeypatch, "--device", "cuda", "--quick")
    assert "expected a CUDA device, got none" in capsys.readouterr().err
