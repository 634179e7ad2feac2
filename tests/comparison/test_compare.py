"""Whole comparisons on a tiny data set: table, JSON, picture, and what a second call does."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import load_file

import xmc
from xmc.comparison.compare import compare
from xmc.comparison.heads import make_variants
from xmc.comparison.plot import mean_over_runs
from xmc.comparison.report import Comparison, render
from xmc.comparison.runs import ComparisonError, Run, is_finished, train_apart, train_arguments
from xmc.config import ConfigError
from xmc.runs import RunError
from xmc.training.log import read_log
from xmc.training.loop import Interrupted
from xmc.training.run import train

SMALL = [
    "features.min_df=1",
    "encoder.dim=32",
    "train.epochs=2",
    "train.batch_size=32",
    "encoder_optimizer.lr=0.03",
    "rewire.interval=5",
]
METRICS = ["P@1", "P@3", "P@5", "PSP@5"]


def train_here(run: Run, recipe: str, *, data: Path, cache: Path) -> None:
    """A run without a process of its own, which takes seconds to start."""
    folder = run.folder
    overrides, resume = run.settings, (folder / "run.json").exists()
    train(recipe, data=data, out=folder, overrides=overrides, resume=resume, cache=cache)


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmc.comparison.compare.train_apart", train_here)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compared(
    tiny_data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Comparison, list[str]]:
    """The folder of a finished comparison, what it returned and what it said."""
    out, lines = tmp_path_factory.mktemp("compared") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmc.comparison.compare.train_apart", train_here)
        found = run_comparison(tiny_data, out, cache, note=lines.append)
    return out, found, lines


def run_comparison(data: Path, out: Path, cache: Path, **options: Any) -> Comparison:
    arguments: dict[str, Any] = {
        "heads": ["dense", "bottleneck", "rigl"],
        "num_seeds": 2,
        "fan_ins": [8],
        "settings": SMALL,
        "bootstrap": 200,
        "note": lambda line: None,
    }
    return compare("quickstart", data=data, out=out, cache=cache, **{**arguments, **options})


def shown(comparison: Comparison) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(render(comparison), soft_wrap=True)
    return capture.get()


def test_the_report_is_that_of_its_runs(compared: tuple[Path, Comparison, list[str]]) -> None:
    out, comparison, _ = compared
    report = json.loads((out / "compare.json").read_text())
    assert [head["name"] for head in report["heads"]] == ["dense", "bottleneck-8", "rigl-8"]
    assert (report["baseline"], report["seeds"], report["documents"]) == ("dense", [42, 43], 40)
    for head in report["heads"]:
        for metric in METRICS:
            values = [run["values"][metric] for run in head["runs"]]
            assert head["mean"][metric] == pytest.approx(statistics.fmean(values))
            assert head["deviation"][metric] == pytest.approx(statistics.stdev(values))
        for run in head["runs"]:
            best = run["best_epoch"]
            log = read_log(Path(run["folder"]) / "log.jsonl")
            validated = [event for event in log if event["event"] == "validation"]
            # Training scored the same rows with the same weights.
            for metric in METRICS[:3]:
                assert run["values"][metric] == pytest.approx(validated[best - 1][metric])
            assert run["epoch_seconds"] == pytest.approx(log[-1]["seconds"] / 2)
    dense, bottleneck, rigl = report["heads"]
    assert dense["difference"] is None
    for metric in METRICS:
        difference = rigl["difference"][metric]
        assert difference["low"] <= difference["mean"] <= difference["high"]
    table = shown(comparison)
    assert f"{100 * dense['mean']['P@1']:.2f} +-{100 * dense['deviation']['P@1']:.2f}" in table
    assert f"{100 * rigl['difference']['P@5']['mean']:+.2f} (" in table
    assert "difference to dense with its 95% interval" in table
    assert "rows that each seed held out" in table
    assert f"bottleneck-8: {_width(bottleneck)} outputs" in table
    assert "TEST" not in table


def _width(head: dict[str, Any]) -> int:
    (setting,) = (s for s in head["settings"] if s.startswith("encoder.intermediate="))
    return int(setting.partition("=")[2])


def test_classifier_bytes_are_those_of_a_checkpoint(
    compared: tuple[Path, Comparison, list[str]],
) -> None:
    """All tensors above the encoder that a run has to keep, for each kind of head."""
    for result in compared[1].results:
        (newest, *_) = sorted((result.runs[0].folder / "checkpoints").iterdir(), reverse=True)
        size = 0
        for name, tensor in load_file(newest / "tensors.safetensors").items():
            bytes_ = tensor.numel() * tensor.element_size()
            if name.startswith(("model.head.", "head.")):
                size += bytes_
            elif name.startswith("model.intermediate."):
                size += 3 * bytes_  # with the two moments of its AdamW
        assert result.variant.classifier_bytes == size, result.variant.name
    dense, bottleneck, rigl = (result.variant.classifier_bytes for result in compared[1].results)
    assert bottleneck <= rigl < dense


def test_the_picture_has_something_in_each_panel(
    compared: tuple[Path, Comparison, list[str]],
) -> None:
    picture = imread(compared[0] / "compare.png")[:, :, :3]
    height, width, _ = picture.shape
    assert width == 1650
    # Lines and bars are in colour, all else is grey.
    coloured = (picture.max(2) - picture.min(2)) > 0.2
    for row in (slice(0, height // 3), slice(height // 2, height)):
        for column in range(3):
            panel = coloured[row, column * width // 3 : (column + 1) * width // 3]
            assert panel.sum() > 100


def test_means_over_runs_need_all_of_them() -> None:
    runs = [[(20, 1.0), (40, 2.0), (60, 7.0)], [(20, 3.0), (40, 5.0)]]
    assert mean_over_runs(runs) == [(20, 2.0), (40, 3.5)]


def test_progress_is_told_with_the_time_that_all_will_take(
    compared: tuple[Path, Comparison, list[str]],
) -> None:
    lines = compared[2]
    assert lines[0] == "6 runs: 3 heads x 2 seeds, 0 finished already"
    assert lines[1] == "[1/6] dense seed 42: training"
    assert lines[2].startswith("[1/6] dense seed 42: P@1 ")
    assert re.search(r"so about \d+ (s|min) for all 6 runs, about \d+ (s|min) left$", lines[2])
    assert lines[-1].startswith("[6/6] rigl-8 seed 43: P@1 ")
    assert "left" not in lines[-1]


def test_a_second_call_trains_only_what_is_new(
    compared: tuple[Path, Comparison, list[str]],
    tiny_data: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, first, _ = compared
    trained: list[str] = []

    def watch(run: Run, *args: Any, **options: Any) -> None:
        trained.append(f"{run.variant.name} {run.seed}")
        train_here(run, *args, **options)

    monkeypatch.setattr("xmc.comparison.compare.train_apart", watch)
    before = (out / "compare.json").read_bytes()
    lines: list[str] = []
    run_comparison(tiny_data, out, cache, note=lines.append)
    assert trained == []
    assert (out / "compare.json").read_bytes() == before
    assert lines[0].endswith("6 finished already")
    assert not any("left" in line or "training" in line for line in lines)
    wider = run_comparison(tiny_data, out, cache, heads=["static", "rigl"])
    assert trained == ["static-8 42", "static-8 43"]
    assert wider.baseline == "static-8"  # the first, where dense is not asked for
    assert wider.results[1].runs[0].values == first.results[2].runs[0].values


def test_the_test_split_is_scored_as_by_evaluate_and_named(
    compared: tuple[Path, Comparison, list[str]], tiny_data: Path, cache: Path, tmp_path: Path
) -> None:
    out = compared[0]
    found = run_comparison(tiny_data, out, cache, split="test", heads=["rigl"], propensity="amazon")
    for run in found.results[0].runs:
        scores = xmc.evaluate(run.folder, "test", cache=cache, propensity="amazon").values
        assert run.values == pytest.approx({name: scores[name] for name in METRICS})
    table = shown(found)
    assert "split: TEST, 100 documents" in table
    assert "the test split was used: choose nothing by these numbers" in table


def test_a_folder_of_something_else_is_refused(
    compared: tuple[Path, Comparison, list[str]], tiny_data: Path, cache: Path, tmp_path: Path
) -> None:
    out = compared[0]
    changed = [*SMALL, "encoder.dropout=0.4"]
    with pytest.raises(RunError, match=r"dense.*seed-42: encoder.dropout was 0.3 there and is 0.4"):
        run_comparison(tiny_data, out, cache, settings=changed)
    run = Run(compared[1].results[0].variant, 42, out / "dense" / "seed-42")
    with pytest.raises(RunError, match="trained on other data"):
        is_finished(run, "another key")
    half = Run(run.variant, 42, tmp_path / "half")
    (half.folder / "model").mkdir(parents=True)
    with pytest.raises(RunError, match=r"half: .* without run.json"):
        is_finished(half, "key")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, r'--split: expected "validation" or "test", got "train"'),
        ({"num_seeds": 0}, "--seeds: expected at least 1, got 0"),
        ({"bootstrap": 0}, "--bootstrap: expected at least 1 replicate, got 0"),
        ({"settings": [*SMALL, "train.validation=0.0"]}, r"train.validation: 0 leaves nothing"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(
    tiny_data: Path, cache: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_comparison(tiny_data, tmp_path / "out", cache, **options)
    assert not (tmp_path / "out").exists()


def one_run(folder: Path, *settings: str) -> Run:
    (variant,) = make_variants("quickstart", ["set"], 30, fan_ins=[8], settings=[*SMALL, *settings])
    return Run(variant, 42, folder)


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_an_interrupted_run_goes_on_in_the_next_call(
    tiny_data: Path, cache: Path, tmp_path: Path
) -> None:
    """Ctrl-C reaches the process of the run, which then ends as if nothing had been."""
    settings = ["train.epochs=4", "train.batch_size=2"]
    run = one_run(tmp_path / "stopped", *settings)

    def interrupt() -> None:
        wait_for(run.folder / "log.jsonl")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match=r"stopped in .*stopped"):
        train_apart(run, "quickstart", data=tiny_data, cache=cache)
    thread.join()
    data_key = json.loads((run.folder / "run.json").read_text())["data_key"]
    assert not is_finished(run, data_key)
    assert train_arguments(run, "quickstart", tiny_data, cache)[-1] == "--resume"
    whole = one_run(tmp_path / "whole", *settings)
    assert train_arguments(whole, "quickstart", tiny_data, cache)[-1] != "--resume"
    for each in (run, whole):
        train_here(each, "quickstart", data=tiny_data, cache=cache)
        assert is_finished(each, data_key)
    weights = [each.folder / "model" / "weights.safetensors" for each in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "import sys; sys.exit('nearly there\\nxmc: the loss is nan at step 3')",
            "the loss is nan",
        ),
        ("import os; os._exit(7)", "exit code 7"),
    ],
)
def test_a_run_that_fails_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr("xmc.comparison.runs._TRAIN", script)
    run = one_run(tmp_path / "failed")
    with pytest.raises(ComparisonError, match=rf"failed: training failed: {reason}"):
        train_apart(run, "quickstart", data=tmp_path, cache=None)


Xmc = Callable[..., tuple[int, str, str]]


@pytest.mark.usefixtures("_in_process")
def test_the_command(xmc: Xmc, tiny_data: Path, cache: Path, tmp_path: Path) -> None:
    common = ["compare", "quickstart", "--data", tiny_data, "--cache", cache, "--seeds", 1]
    common += ["--out", tmp_path / "out", "--fan-in", "4,8"]
    for setting in [*SMALL, "train.epochs=1"]:
        common += ["--set", setting]
    own = ["--dense-set", "classifier_optimizer.lr=0.002", "--head-set", "set:rewire.fraction=0.5"]
    code, out, err = xmc(*common, "--heads", "dense,set", *own)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == f"quickstart on {tiny_data.name}"
    names = [line.split()[0] for line in lines[2:7] if not line.startswith(" ")]
    assert names == ["dense", "set-4", "set-8"]
    assert "+-" not in out  # there is no deviation of one seed
    assert "3 runs: 3 heads x 1 seeds, 0 finished already" in err
    assert f"written to {tmp_path / 'out' / 'compare.json'}" in err
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert report["heads"][0]["deviation"]["P@1"] is None
    configs = [
        json.loads((tmp_path / "out" / name / "seed-42" / "run.json").read_text())["config"]
        for name in ("dense", "set-4")
    ]
    assert [config["classifier_optimizer"]["lr"] for config in configs] == [0.002, 0.01]
    assert configs[1]["rewire"]["fraction"] == 0.5
    for heads, extra, message in [
        ("dense,sett", [], 'got "sett"'),
        ("dense", ["--fan-in", "4;8"], '--fan-in: expected numbers such as "32,64,128"'),
    ]:
        code, _, err = xmc(*common, "--heads", heads, *extra)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert message in err


def test_help_names_the_options(xmc: Xmc) -> None:
    code, out, _ = xmc("compare", "--help")
    assert code == 0
    for option in ("--heads", "--fan-in", "--seeds", "--dense-set", "--head-set", "--split"):
        assert option in out
