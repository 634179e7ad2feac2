"""The benchmark of the classifier: its baselines compute what ours does, its lines say enough."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xmc_kernels.classifier import UpdateRule, classifier_step_, make_state
from xmc_kernels.fan_in import fan_in_linear

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "classifier",
    "classifier_baselines",
    "classifier_jobs",
    "classifier_report",
    "provenance",
    "records",
    "timing",
)


@pytest.fixture(scope="module")
def run(run_bench):
    return functools.partial(run_bench, "classifier.py")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, run):
    """A quick sweep over labels, everything that runs the reference included."""
    output = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    run(
        *("--quick", "--sweep", "labels", "--plot", "--reference", "--device", "cpu"),
        *("--threads", 1, "--output", output),
    )
    return output


def test_every_line_tells_what_where_and_how(measured):
    lines = [json.loads(line) for line in measured.read_text().splitlines()]
    assert {line["operation"] for line in lines} == {"step", "top-k"}
    assert {line["L"] for line in lines} == {512, 1024}
    names = {line["what"] for line in lines}
    assert names >= {
        "sparse G1 float32",
        "sparse G16 float32",
        "sparse G64 bfloat16",
        "sparse G1 1:16 float32",
        "sparse G1 float8",
        "dense float32",
        "dense bfloat16",
    }
    for line in lines:
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["runs"] == 3
        assert line["peak_extra_bytes"] is None or line["peak_extra_bytes"] >= 0
        factor = 6 if line["operation"] == "step" else 2
        flops = factor * line["B"] * line["L"] * line["F"]
        # Times are rounded to 0.1 us.
        assert line["gflop_per_s"] == pytest.approx(flops / line["median_ms"] / 1e6, rel=0.05)
        share = line["state_gb_per_s"] / line["copy_gb_per_s"]
        assert line["share_of_copy"] == pytest.approx(share, rel=0.05, abs=1e-3)
        assert line["backend"] in ("numba", "torch", "reference")
        assert line["device"].startswith("cpu: ")
        for name in ("threads", "torch", "numba", "python", "commit", "date", "dtype", "G"):
            assert line[name], name
        assert line["command"].startswith("python scripts/bench/classifier.py --quick")
    text = measured.read_text()
    assert str(measured.parent) not in text
    assert str(ROOT) not in text


def test_state_counts_weights_indices_biases_once(measured):
    lines = [json.loads(line) for line in measured.read_text().splitlines()]
    labels, fan_in, half = 1024, 8, 2
    expected = {
        ("top-k", "sparse G1 float32"): labels * (4 * fan_in + 2 * fan_in + 4),
        ("step", "sparse G1 float32"): labels * (4 * fan_in + 2 * fan_in + 4 + 4 * fan_in + 4),
        ("top-k", "sparse G16 bfloat16"): labels * (half * fan_in + 4) + labels // 16 * 2 * fan_in,
        # Four bits a slot; a byte a weight and a scale a label.
        ("top-k", "sparse G1 1:16 float32"): labels * (4 * fan_in + fan_in // 2 + 4),
        ("top-k", "sparse G1 float8"): labels * (fan_in + 2 * fan_in + 4 + 4),
    }
    for (operation, what), size in expected.items():
        (line,) = (
            x for x in lines if (x["operation"], x["what"], x["L"]) == (operation, what, labels)
        )
        moved = line["state_gb_per_s"] * line["median_ms"] * 1e6
        assert moved == pytest.approx(size, rel=0.05), what


def test_tables_and_plots_come_from_the_lines(measured, run):
    plot = measured.with_name("lines_labels.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not measured.with_name("lines_batch.png").exists()  # one batch size is no line
    text = run("--quick", "--table", "--output", measured)
    lines = [json.loads(line) for line in measured.read_text().splitlines()]
    (line,) = (
        x
        for x in lines
        if (x["operation"], x["what"], x["L"]) == ("step", "sparse G16 float32", 1024)
    )
    assert f"| step | sparse G16 float32 | 8 | {line['median_ms']:.2f} (" in text
    assert "| step | sparse G1 float8 (plain torch reference) |" in text
    assert line["commit"] in text


def test_a_table_needs_lines(tmp_path, run):
    text = run("--table", "--output", tmp_path / "none.jsonl", expected=1)
    assert "expected measured lines in" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_an_error(run):
    text = run("--device", "cuda", "--quick", expected=2)
    assert "expected a CUDA device, got none" in text


def one_job(jobs, operation, what):
    (job,) = (job for job in jobs if (job.operation, job.what) == (operation, what))
    return job


def test_sparse_baselines_compute_our_forward(bench):
    shape = bench.classifier_jobs.Shape(L=128, D=32, F=4, B=8)
    inputs = bench.classifier_jobs.Inputs(shape, "cpu")
    layer = bench.classifier_jobs.make_layer(shape, bench.classifier_jobs.Variant(), "cpu")
    expected = fan_in_linear(inputs.x(2, torch.float32), layer.weight, layer.index)
    jobs = list(bench.classifier_baselines.torch_sparse_jobs(inputs, layer, "cpu"))
    for what in ("F.embedding_bag float32", "torch CSR float32"):
        ours = one_job(jobs, "forward", what).run(2).T
        torch.testing.assert_close(ours, expected)
    with pytest.raises(RuntimeError, match="needs a GPU's sparse tensor cores"):
        one_job(jobs, "forward", "torch 2:4 bfloat16").run(0)


def test_dense_baseline_is_a_training_step(bench):
    rows, labels, features, lr = 6, 48, 16, 0.3
    torch.manual_seed(2)
    x, weight = torch.randn(rows, features), torch.randn(labels, features)
    bias = torch.randn(labels)
    positives = torch.stack([torch.randperm(labels)[:3].sort().values for _ in range(rows)])
    own_weight, own_bias = weight.clone(), bias.clone()
    rule = UpdateRule("sgd")
    _, expected = classifier_step_(
        *(x, own_weight, None, own_bias),
        torch.arange(rows + 1) * 3,
        positives.flatten().int(),
        loss="bce",
        rule=rule,
        state=make_state(own_weight, own_bias, rule),
        lr=lr,
        step=1,
        grad_scale=1 / rows,
    )
    owner = torch.arange(rows).repeat_interleave(3)
    d_x = torch.zeros_like(x)
    for start in (0, 20):  # by tiles of labels, as for millions
        tile = slice(start, 20 if start == 0 else labels)
        local = positives.flatten() - start
        d_x += bench.classifier_baselines.dense_step(x, weight[tile], bias[tile], owner, local, lr)
    torch.testing.assert_close(d_x, expected)
    torch.testing.assert_close(weight, own_weight)
    torch.testing.assert_close(bias, own_bias)


@pytest.mark.parametrize("what", ["sparse G1 4:8 float32", "sparse G16 4:8 bfloat16"])
def test_pattern_layers_are_valid(bench, what):
    jobs = bench.classifier_jobs
    dtype, group = (torch.float32, 1) if "G1 " in what else (torch.bfloat16, 16)
    variant = jobs.Variant(dtype, group, (4, 8))
    assert variant.name == what
    shape = jobs.Shape(L=64, D=32, F=16, B=2)
    layer = jobs.make_layer(shape, variant, "cpu")
    from xmc_kernels.checks import validate_index

    validate_index(layer.index, shape.D, layer.pattern)
    out = fan_in_linear(torch.randn(2, 32), layer.weight, layer.index, pattern=layer.pattern)
    assert out.shape == (2, 64)


def test_a_pattern_is_chosen_near_the_fan_in(bench):
    nearest = bench.classifier_jobs.nearest_pattern
    assert nearest(32, 768) == (1, 32)  # 24 of 768; 1:16 would be 48
    assert nearest(384, 768) == (2, 4)
    assert nearest(96, 768) == (1, 8)
    assert nearest(8, 128) == (1, 16)
    with pytest.raises(ValueError, match="expected features in multiples of 4, got 30"):
        nearest(4, 30)


def test_labels_come_in_whole_groups(bench):
    with pytest.raises(ValueError, match="expected labels in multiples of 64, got 100"):
        bench.classifier_jobs.Shape(L=100)


def test_times_are_interleaved_and_failures_become_lines(bench, monkeypatch):
    timing, order = bench.timing, []
    duration = {"fast": 2.0, "slow": 700.0, "copy": 10.0}

    def clock(run):
        name = run()
        order.append(name)
        return duration[name]

    def broken(number):
        raise RuntimeError("no kernel in /home/someone/cache.so\nsecond line")

    monkeypatch.setattr(timing, "cpu_clock", clock)
    monkeypatch.setattr(timing, "peak_extra_bytes", lambda run, device: 7)
    jobs = [
        timing.Job("copy", "memory copy", lambda n: "copy", state_bytes=200),
        timing.Job("step", "fast", lambda n: "fast", flops=4e6, state_bytes=10),
        timing.Job("step", "slow", lambda n: "slow"),
        timing.Job("step", "torch's", broken),
        timing.Job("step", "ours", broken, ours=True),
    ]
    records, failures = timing.time_jobs(jobs, "cpu", seconds=0.06, repeats=8)
    copy, fast, slow, theirs, ours = records
    assert order[:6] == ["copy", "fast", "slow"] * 2
    assert (copy["runs"], fast["runs"], slow["runs"]) == (5, 8, 3)
    assert fast["gflop_per_s"] == 2.0  # 4e6 in 2 ms
    assert fast["share_of_copy"] == 0.25  # 5 bytes per ms against 20
    assert fast["peak_extra_bytes"] == 7
    assert theirs["not_available"] == "RuntimeError: no kernel in PATH"
    assert failures == ["step, ours: RuntimeError: no kernel in PATH"]
    assert ours["not_available"] == theirs["not_available"]


def test_one_shape_is_measured_once_with_all_that_is_wanted(bench):
    points = bench.classifier.sweep_points("all")
    shapes = [point.shape for point in points]
    assert len(set(shapes)) == len(shapes)
    assert points[0].operations == bench.classifier_jobs.OPERATIONS
    assert points[0].extras and points[0].dense
    default = bench.classifier_jobs.Shape()
    here = {
        (p.shape.F, p.shape.B) for p in points if "step" in p.operations and p.shape.L == default.L
    }
    assert here >= {(f, b) for f in (32, 64, 128) for b in (32, 64, 128, 256)}
    few = {p.shape.B for p in points if "top-k" in p.operations and p.shape.L == 1_000_000}
    assert few == {1, 4, 8, 16}


def test_reports_take_the_last_line_of_the_last_device(bench):
    def line(device, milliseconds):
        record = {"device": device, "threads": 2, "operation": "step", "what": "dense float32"}
        return record | {"L": 64, "D": 8, "F": 8, "B": 1, "median_ms": milliseconds}

    lines = [line("b", 1.0), line("a", 2.0), line("b", 3.0)]
    assert [r["median_ms"] for r in bench.classifier_report.latest(lines)] == [3.0]


def test_commands_in_results_name_no_machine(bench, monkeypatch):
    root, shorten = str(ROOT), "--output=/tmp/somewhere/x.jsonl"
    arguments = [f"{root}/scripts/bench/classifier.py", "--only", "a/b", shorten]
    monkeypatch.setattr(sys, "argv", arguments)
    command = bench.provenance.provenance()["command"]
    assert command == "python scripts/bench/classifier.py --only a/b --output=x.jsonl"


def test_dense_variants_stop_where_they_grow_too_large(bench):
    shape = bench.classifier_jobs.Shape(L=262_144)
    fits = bench.classifier_baselines.dense_fits
    assert fits(shape, torch.float32, 1) and not fits(shape, torch.float32, 0.7)
    assert fits(shape, torch.bfloat16, 0.7)


def test_only_names_what_is_timed(tmp_path, run):
    output = tmp_path / "lines.jsonl"
    only = ("--quick", "--device", "cpu", "--threads", 1, "--output", output, "--only")
    run(*only, "forward, sparse G1 float32")
    (line,) = map(json.loads, output.read_text().splitlines())
    assert (line["operation"], line["what"]) == ("forward", "sparse G1 float32")
    text = run(*only, "a typo", expected=1)
    assert "expected --only to name a job that is compiled here, got 'a typo'" in text


def test_gpu_check_goes_on_after_a_failure_and_fails(tmp_path):
    command = ["scripts/gpu_check", "--device", "cpu", "--quick", "--sweep", "nothing"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "invalid choice: 'nothing'" in (tmp_path / "classifier.txt").read_text()
    assert "== table" in done.stdout
    assert (tmp_path / "contrastive.jsonl").read_text().count('"operation": "loss"') == 30
    assert (tmp_path / "offload.jsonl").read_text().count('"operation": "step"') == 8
    assert "gpu_check: failed: classifier table" in done.stderr
