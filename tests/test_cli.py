"""The command as a user meets it: what works, and one line with exit code 2 for what does not."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = [
    "train.epochs=2",
    "train.batch_size=16",
    "encoder.dim=32",
    "head.fan_in=8",
    "features.min_df=1",
    "encoder_optimizer.lr=0.03",
]
Xmc = Callable[..., tuple[int, str, str]]


def settings(*values: str) -> list[str]:
    return [part for value in (*SMALL, *values) for part in ("--set", value)]


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run; tests that change it work on a copy."""
    import xmc

    folder = tmp_path_factory.mktemp("trained")
    overrides = [*SMALL, "train.epochs=12"]
    xmc.train(
        "quickstart",
        data=tiny_data,
        out=folder / "run",
        overrides=overrides,
        cache=folder / "cache",
    )
    return folder / "run"


def test_train_evaluate_predict(xmc: Xmc, tiny_data: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    common = ("--data", tiny_data, "--out", run, "--cache", cache)
    code, _, err = xmc("train", "quickstart", *common, *settings("train.epochs=12"))
    assert code == 0, err
    assert "epoch  12  P@1" in err
    code, out, err = xmc("evaluate", run, "--cache", cache)
    assert code == 0, err
    assert "nDCG" in out
    scores = json.loads((run / "evaluation-test.json").read_text())
    code, _, err = xmc("evaluate", run, "--cache", cache, "--baseline")
    assert code == 0, err
    baseline = json.loads((run / "baseline-test.json").read_text())
    # The words give the labels away, so that a model that learned anything is far above.
    assert scores["values"]["P@1"] > 0.9 > 0.5 > baseline["values"]["P@1"]
    code, out, err = xmc("predict", run, "--text", "word3 noise7", "-k", "2")
    assert code == 0, err
    assert out.splitlines()[0] == "word3 noise7"
    assert out.splitlines()[1].endswith("label 3")


def test_predict_streams_lines_and_json_lines(xmc: Xmc, trained: Path) -> None:
    code, out, err = xmc("predict", trained, "-k", "1", stdin=b"word1\nword2 noise3\n")
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["labels"][0]["label"] for a in answers] == ["label 1", "label 2"]
    assert [a["text"] for a in answers] == ["word1", "word2 noise3"]
    lines = b'{"title": "word4", "content": "noise1"}\n{"text": "word1"}\n'
    code, out, err = xmc("predict", trained, "-k", "1", "--jsonl", stdin=lines)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["labels"][0]["label"] for a in answers] == ["label 4", "label 1"]


def test_several_runs_answer_together(xmc: Xmc, trained: Path, tmp_path: Path) -> None:
    """A run beside itself changes nothing but the name of the file."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    cache = trained.parent / "cache"
    code, _, err = xmc("evaluate", run, "--cache", cache)
    assert code == 0, err
    code, _, err = xmc("evaluate", run, trained, "--weights", "0.7,0.3", "--cache", cache)
    assert code == 0, err
    alone, together = (
        json.loads((run / f"{name}-test.json").read_text()) for name in ("evaluation", "ensemble")
    )
    assert together["values"] == alone["values"]
    _, alone, _ = xmc("predict", run, "--text", "word3")
    assert xmc("predict", run, trained, "--text", "word3") == (0, alone, "")
    refused = xmc("evaluate", run, trained, "--weights", "1,a")
    assert_refused(refused, '--weights: expected numbers such as "0.7,0.3", got "1,a"')


def test_more_labels_asked_for_than_there_are(xmc: Xmc, trained: Path) -> None:
    code, out, err = xmc("predict", trained, "--text", "word1", "-k", "1000")
    assert code == 0, err
    assert len(out.splitlines()) == 1 + 30


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["predict"], ["data", "build"]])
def test_help_names_the_options(xmc: Xmc, command: list[str]) -> None:
    code, out, _ = xmc(*command, "--help")
    assert code == 0
    assert "Usage" in out


def test_options_lists_every_key_with_its_meaning(xmc: Xmc) -> None:
    code, out, _ = xmc("options", "quickstart")
    assert code == 0
    lines = out.splitlines()
    assert "head.fan_in = 64" in lines
    assert lines[lines.index("head.fan_in = 64") + 1] == "    F: features that each label reads."
    meanings = [line for line in lines if line.startswith("    ")]
    assert len(meanings) == len(lines) / 2  # none without


def test_version(xmc: Xmc) -> None:
    assert xmc("--version")[:2] == (0, "0.1.0\n")


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, and one line on standard error that holds every part."""
    code, _, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("recipe", "extra", "parts"),
    [
        ("nowhere", [], ["nowhere: no such recipe file", "quickstart"]),
        ("quickstart", ["train.epoch=3"], ["train.epoch: unknown key", "did you mean epochs?"]),
        ("quickstart", ["train.epochs=many"], ["train.epochs", "integer", "'many'"]),
        ("quickstart", ["train.epochs=0"], ["train.epochs", "greater than 0", "0"]),
        ("quickstart", ["head.fan_in=33"], ["head.fan_in", "at most encoder.dim = 32", "33"]),
        ("quickstart", ["head.pattern=2:6"], ["head.pattern", "2:6"]),
        ("quickstart", ["encoder.kind=transformer"], ["encoder.model"]),
        ("quickstart", ["train"], ["--set train", "section.key=value"]),
        ("quickstart", ["rewire.method=set", "head.kind=dense"], ["rewire.method", "dense"]),
    ],
)
def test_a_bad_recipe_writes_nothing(
    xmc: Xmc, tiny_data: Path, tmp_path: Path, recipe: str, extra: list[str], parts: list[str]
) -> None:
    common = ("--data", tiny_data, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert_refused(xmc("train", recipe, *common, *settings(*extra)), *parts)
    assert not (tmp_path / "run").exists()


def edited(folder: Path, tmp_path: Path, name: str, number: int, line: str) -> Path:
    """A copy of a data folder with one line of one file replaced."""
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    with gzip.open(copy / name, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    lines[number - 1] = line
    with gzip.open(copy / name, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return copy


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"uid": "a", "title": "b", "target_ind": [1', ["trn.json.gz:17:", "JSON"]),
        ('{"title": "b", "target_ind": [30]}', ["trn.json.gz:17:", "30"]),
        ('{"title": "b", "target_ind": [-1]}', ["trn.json.gz:17:", "-1"]),
        ('{"title": "b", "target_ind": "3"}', ["trn.json.gz:17:", "target_ind"]),
        ("[1, 2]", ["trn.json.gz:17:", "object"]),
    ],
)
def test_a_bad_document_is_named_by_file_and_line(
    xmc: Xmc, tiny_data: Path, tmp_path: Path, line: str, parts: list[str]
) -> None:
    data = edited(tiny_data, tmp_path, "trn.json.gz", 17, line)
    common = ("--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert_refused(xmc("train", "quickstart", *common, *settings()), *parts)
    assert not (tmp_path / "run").exists()


def test_a_missing_data_folder(xmc: Xmc, tmp_path: Path) -> None:
    common = ("--data", tmp_path / "nothing", "--out", tmp_path / "run", "--cache", tmp_path / "c")
    assert_refused(xmc("train", "quickstart", *common), str(tmp_path / "nothing"))
    assert_refused(xmc("data", "info", tmp_path / "nothing"), str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(xmc: Xmc, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    common = ("--data", tiny_data, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert_refused(xmc("train", "quickstart", *common), "already exists", "--resume")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["mine.txt"]
    assert_refused(xmc("data", "build", "pydoc", "--out", tmp_path / "run"), str(tmp_path / "run"))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_resume_needs_the_same_recipe_and_an_intact_checkpoint(
    xmc: Xmc, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    common = ("--data", tiny_data, "--out", run, "--cache", tmp_path / "cache", "--resume")
    same = settings("train.epochs=12")
    assert_refused(
        xmc("train", "quickstart", *common, *same, "--set", "head.fan_in=4"),
        "head.fan_in was 8",
        "4",
    )
    newest = sorted((run / "checkpoints").iterdir())[-1]
    content = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(content[:-100])
    log = (run / "log.jsonl").read_bytes()
    assert_refused(xmc("train", "quickstart", *common, *same), "tensors.safetensors", "truncated")
    assert (run / "log.jsonl").read_bytes() == log
    nothing = ("--data", tiny_data, "--out", tmp_path / "none", "--resume")
    assert_refused(xmc("train", "quickstart", *nothing), str(tmp_path / "none"), "not a run")


def test_resuming_a_finished_run_changes_nothing(
    xmc: Xmc, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    weights = (run / "model" / "weights.safetensors").read_bytes()
    common = ("--data", tiny_data, "--out", run, "--cache", tmp_path / "cache", "--resume")
    code, _, err = xmc("train", "quickstart", *common, *settings("train.epochs=12"))
    assert code == 0, err
    assert (run / "model" / "weights.safetensors").read_bytes() == weights


def test_evaluate_and_predict_name_what_is_wrong(
    xmc: Xmc, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    assert_refused(xmc("evaluate", tmp_path), "run.json", "not a run folder")
    assert_refused(xmc("evaluate", trained, "--split", "dev"), "dev")
    assert_refused(xmc("evaluate", trained, "--split", "validation"), "val")
    assert_refused(xmc("evaluate", trained, "-k", "1,x"), "-k", "1,x")
    assert_refused(xmc("evaluate", trained, "--propensity", "mars"), "mars", "amazon")
    assert_refused(xmc("evaluate", trained, "--a", "0.5"), "both a and b")
    assert_refused(xmc("predict", tmp_path, "--text", "x"), "model.json")
    assert_refused(xmc("predict", trained, "--jsonl", stdin=b"{}\n[]\n"), "standard input:1")
    assert_refused(xmc("predict", trained, stdin=b"ok\n\xff\xfe\n"), "standard input:2", "UTF-8")
    assert_refused(xmc("data", "build", "wikipedia", "--out", tmp_path / "w"), "wikipedia")
    other = edited(tiny_data, tmp_path, "lbl.json.gz", 3, '{"uid": "2", "title": "renamed"}')
    assert_refused(xmc("evaluate", trained, "--data", other), "label 2", "renamed")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.json", ["model.json", "missing"]),
        ("weights.safetensors", ["weights.safetensors", "missing"]),
        ("labels.json.gz", ["labels.json.gz", "missing"]),
    ],
)
def test_a_model_without_one_of_its_files(
    xmc: Xmc, trained: Path, tmp_path: Path, name: str, parts: list[str]
) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    assert_refused(xmc("predict", tmp_path / "model", "--text", "x"), *parts)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "labels.json.gz"])
def test_a_damaged_model_file_is_named(xmc: Xmc, trained: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(xmc("predict", tmp_path / "model", "--text", "x"), name)
