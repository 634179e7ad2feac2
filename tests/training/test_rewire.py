"""Rewiring inside whole trainings: when, with what, what is logged, and the same after a resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xmc.config import Config, from_dict
from xmc.heads.classifier import ClassifierHead
from xmc.nn.rewire import RewireReport
from xmc.types import SparseLabels


def config(rewire: dict[str, Any], *, dropout: float = 0.3, **train_options: Any) -> Config:
    options = {"epochs": 3, "batch_size": 20, "accumulation": 2, "warmup_steps": 3}
    values = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24, "dropout": dropout},
        "head": {"fan_in": 6},
        "encoder_optimizer": {"lr": 0.02},
        "rewire": {"interval": 5, "fraction": 0.5, "end": 0.9, **rewire},
        "train": {**options, "checkpoint_every": 4, **train_options},
    }
    return from_dict(values, source="test")


def watch(monkeypatch: pytest.MonkeyPatch, attribute: str, seen: Any) -> None:
    """Call `seen(head, args, kwargs)` before each call of a method of the head."""
    original = getattr(ClassifierHead, attribute)

    def method(self: ClassifierHead, *args: Any, **kwargs: Any) -> Any:
        seen(self, args, kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ClassifierHead, attribute, method)


OPTIONS = [
    {"method": "rigl"},
    {"method": "rigl", "prune": "threshold", "threshold": 0.2, "init": "uniform"},
    {"method": "set", "init": "uniform", "moments": "keep"},
]


@pytest.mark.parametrize("rewire", OPTIONS)
@pytest.mark.parametrize("call", [9, 27])  # the first pass of step 5, which rewires, and of step 14
def test_interrupted_and_resumed_equals_uninterrupted(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, rewire: dict[str, Any], call: int
) -> None:
    options = config(rewire)
    whole = runs.train(options, tiny_data, tmp_path / "whole")
    start = partial(runs.train, options, tiny_data, tmp_path / "parts")
    runs.assert_same_run(whole, runs.stop_and_resume(start, [call]))
    assert {"rewire.slot_age", "rewire.rewirings"} <= runs.newest(whole).keys()


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_rewirings_are_counted_in_steps_and_logged(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """27 steps of two passes: at 5, 10, 15, 20 (the end is 24.3), never half way."""
    passes: list[int] = []
    between: list[int] = []
    watch(monkeypatch, "loss_and_grad", lambda *_: passes.append(1))
    watch(monkeypatch, "rewire_", lambda *_: between.append(len(passes)))
    run = runs.train(config({"method": method}), tiny_data, tmp_path)
    found = runs.events(run, "rewire")
    assert [event["step"] for event in found] == [5, 10, 15, 20]
    assert between == [10, 20, 30, 40]
    # round(6 * 0.25 (1 + cos(pi t / 24.3))) of 6 slots, of 30 labels
    assert [event["pruned"] for event in found] == [30 * n for n in (3, 2, 1, 0)]
    assert [event["churn"] for event in found] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    survival = [event["survival"] for event in found]
    assert survival == sorted(survival, reverse=True)
    assert survival[0] == 0.5
    assert 0.2 < survival[-1] <= 0.5  # what was grown last may well be the next to go
    assert all(event["age_p10"] <= event["age_p50"] <= event["age_p90"] for event in found)
    assert found[-1]["age_p90"] == 4
    assert all(event["dead_labels"] == 0 for event in found)


def test_rigl_sees_all_rows_of_the_step(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The representations of every pass of the step, in order, with the labels of these rows."""
    passes: list[tuple[Tensor, SparseLabels]] = []
    rewirings: list[dict[str, Any]] = []

    def saw_pass(_: ClassifierHead, args: tuple[Tensor, SparseLabels], __: Any) -> None:
        passes.append((args[0].clone(), args[1]))

    watch(monkeypatch, "loss_and_grad", saw_pass)
    watch(monkeypatch, "rewire_", lambda _, __, kwargs: rewirings.append(kwargs))
    runs.train(config({"method": "rigl"}, batch_size=15, accumulation=3), tiny_data, tmp_path)
    assert [kwargs["step"] for kwargs in rewirings] == [5, 10, 15, 20]
    for kwargs in rewirings:
        last = kwargs["step"] * 3
        step = passes[last - 3 : last]
        assert torch.equal(kwargs["reps"], torch.cat([reps for reps, _ in step]))
        dense = torch.cat([labels.to_dense() for _, labels in step])
        assert torch.equal(kwargs["labels"].to_dense(), dense)


def test_accumulation_rewires_as_the_larger_batch(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One RigL rewiring after the first step: one pass of 60 rows, or three of 20."""
    patterns = []
    original = ClassifierHead.rewire_

    def rewire_(self: ClassifierHead, *args: Any, **kwargs: Any) -> RewireReport:
        before = self.layer.index.clone()  # type: ignore[union-attr, operator]
        report = original(self, *args, **kwargs)
        patterns.append((before, self.layer.index.clone()))  # type: ignore[union-attr, operator]
        return report

    monkeypatch.setattr(ClassifierHead, "rewire_", rewire_)
    for batch_size, accumulation in ((60, 1), (20, 3)):
        options = config(
            {"method": "rigl", "interval": 1, "end": 0.3},  # of 6 steps
            **{"dropout": 0.0, "batch_size": batch_size, "accumulation": accumulation},
            epochs=1,
        )
        runs.train(options, tiny_data, tmp_path / str(batch_size))
    (start, one), (same_start, other) = patterns
    assert torch.equal(start, same_start)
    assert not torch.equal(start, one)
    assert torch.equal(one, other)


def test_a_static_pattern_leaves_no_trace(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    run = runs.train(config({"method": "static"}), tiny_data, tmp_path)
    assert not runs.events(run, "rewire")
    tensors = runs.newest(run)
    assert not any(name.startswith("rewire.") for name in tensors)
    first = load_file(run / "model" / "weights.safetensors")["head.layer.index"]
    assert torch.equal(first, tensors["model.head.layer.index"])
