"""Whole trainings with the auxiliary objective, on a tiny data set."""

from __future__ import annotations

import math
import weakref
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from xmc.config import Config, ConfigError, from_dict
from xmc.data.batches import epoch_batches, epoch_order
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.head import HeadResult
from xmc.model import build_model, load_model
from xmc.nn.clusters import Clusters
from xmc.training.auxiliary import (
    PartMeter,
    auxiliary_share,
    cluster_shares,
    make_auxiliary,
)
from xmc.training.clusters import find_clusters
from xmc.training.loop import TrainingLoop
from xmc.training.run import prepare_data
from xmc.training.trainer import Trainer
from xmc.types import SparseLabels


def config(**sections: dict[str, Any]) -> Config:
    """360 training rows: 9 steps of 40 an epoch, each in two passes; 3 epochs, 2 with clusters."""
    values: dict[str, dict[str, Any]] = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24, "dropout": 0.3},
        "head": {"fan_in": 6},
        "auxiliary": {"kind": "clusters", "max_labels": 4, "cutoff_epochs": 2, "lr": 0.01},
        "encoder_optimizer": {"lr": 0.02},
        "train": {
            "epochs": 3,
            "batch_size": 20,
            "accumulation": 2,
            "warmup_steps": 3,
            "checkpoint_every": 4,
        },
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


@pytest.fixture(scope="module")
def whole_run(runs: ModuleType, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.train(config(), tiny_data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("call", [9, 42, 68, 72, 73, 80])
def test_interrupted_and_resumed_equals_uninterrupted(
    runs: ModuleType, whole_run: Path, tiny_data: Path, tmp_path: Path, call: int
) -> None:
    """Stopped before, at and after the cut-off, behind call 72: two heads by two passes a step."""
    step = 1 + (call - 1) // 4 if call <= 72 else 19 + (call - 73) // 2
    start = partial(runs.train, config(), tiny_data, tmp_path)
    parts = runs.stop_and_resume(start, [call], message=f"after step {step}")
    runs.assert_same_run(whole_run, parts)


def test_the_head_is_dropped_at_the_cutoff_and_never_in_the_model(
    runs: ModuleType, whole_run: Path
) -> None:
    assert not [name for name in runs.newest(whole_run) if name.startswith("auxiliary.")]
    assert len(runs.checkpoints(whole_run)) == 2  # both after step 18
    weights = load_file(whole_run / "model" / "weights.safetensors")
    assert {name.split(".")[0] for name in weights} == {"encoder", "head"}
    assert [event["step"] for event in runs.events(whole_run, "auxiliary_end")] == [18]
    load_model(whole_run / "model")


def test_the_cutoff_frees_the_head(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing holds it any longer when the epoch's validation starts."""
    heads: list[weakref.ref[AuxiliaryHead]] = []
    alive: list[bool] = []

    def make(*args: Any) -> AuxiliaryHead | None:
        head = make_auxiliary(*args)
        assert head is not None
        heads.append(weakref.ref(head))
        return head

    original = Trainer.validate

    def validate(self: Trainer) -> dict[str, float] | None:
        alive.append(heads[0]() is not None)
        return original(self)

    monkeypatch.setattr("xmc.training.run.make_auxiliary", make)
    monkeypatch.setattr(Trainer, "validate", validate)
    runs.train(config(), tiny_data, tmp_path)
    assert alive == [True, False, False]


def test_checkpoints_hold_the_head_until_the_cutoff(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    run = runs.train(config(auxiliary={"cutoff_epochs": 4}), tiny_data, tmp_path)
    names = {name for name in runs.newest(run) if name.startswith("auxiliary.")}
    parts = {"layer.weight", "layer.bias", "weight_m", "weight_v", "bias_m", "bias_v"}
    assert names == {f"auxiliary.{name}" for name in parts}


def test_steps_log_both_parts_until_the_cutoff(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    """The parts add up to the loss that is minimised; the share is that of the step."""
    options = config(auxiliary={"cutoff_epochs": 5}, train={"epochs": 5})
    run = runs.train(options, tiny_data, tmp_path)
    steps = runs.events(run, "step")
    assert [event["step"] for event in steps] == [20, 40, 45]
    for event in steps:
        share = event["auxiliary_share"]
        expected = 0.2 * (1 + math.cos(math.pi * (event["step"] - 1) / 45))
        assert share == pytest.approx(expected)
        total = (1 - share) * event["main_loss"] + share * event["auxiliary_loss"]
        assert event["loss"] == pytest.approx(total, rel=1e-5)
        assert event["main_reps_grad_norm"] > event["auxiliary_reps_grad_norm"] > 0


def test_the_meter_undoes_the_weights_and_joins_the_passes() -> None:
    meter = PartMeter(0.25)
    for main, auxiliary in (([3.0, 0.0], [1.0]), ([0.0, 4.0], [2.0, 2.0])):
        losses = (torch.tensor(0.75), torch.tensor(0.5))
        gradients = (torch.tensor(main), torch.tensor(auxiliary))
        meter.add([HeadResult(*pair) for pair in zip(losses, gradients, strict=True)])
    assert meter.values() == pytest.approx(
        {
            "auxiliary_share": 0.25,
            "main_loss": 2.0,
            "auxiliary_loss": 4.0,
            "main_reps_grad_norm": 5.0,
            "auxiliary_reps_grad_norm": 3.0,
        }
    )


def test_nothing_is_logged_or_written_without_it(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    run = runs.train(config(auxiliary={"kind": "none"}), tiny_data, tmp_path)
    assert not (run / "clusters.safetensors").exists()
    assert not any("auxiliary_share" in event for event in runs.events(run))


def test_the_run_keeps_its_clusters(whole_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    clusters = Clusters.load(whole_run / "clusters.safetensors")
    assert (clusters.num_labels, len(clusters)) == (30, 8)
    train_set = prepare_data(config(), tiny_data, tmp_path)[1]
    again = find_clusters(config(), train_set, [])
    assert again is not None
    assert torch.equal(again.order, clusters.order)


def test_training_equals_plain_torch(tiny_data: Path, tmp_path: Path) -> None:
    """One epoch of `(1 - s) * sum-BCE + s * mean-BCE` by autograd on dense float64 matrices."""
    options = config(
        encoder={"dropout": 0.0},
        train={"epochs": 1, "schedule": "constant", "warmup_steps": 0, "validation": 0.0},
        encoder_optimizer={"lr": 1e-3},
        classifier_optimizer={"kind": "sgd", "lr": 0.5},
        auxiliary={"cutoff_epochs": 1, "lr": 0.02},
    )
    features, train_set, _ = prepare_data(options, tiny_data, tmp_path / "cache")
    model = build_model(options, features, [str(n) for n in range(30)])
    clusters = find_clusters(options, train_set, [])
    device = torch.device("cpu")
    head = make_auxiliary(options, clusters, train_set, 24, device)
    assert clusters is not None
    assert head is not None

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double().clone().requires_grad_()

    table = leaf(model.encoder.table.weight)  # type: ignore[union-attr]
    shift = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    weight, bias = leaf(model.head.layer.weight), leaf(model.head.layer.bias)
    dense, dense_bias = leaf(head.classifier.layer.weight), leaf(head.classifier.layer.bias)
    starts = [tensor.detach().clone() for tensor in (table, weight, dense, dense_bias)]
    index = model.head.layer.index.long()  # type: ignore[union-attr]
    optimizers = [
        torch.optim.SparseAdam([table], lr=1e-3),
        torch.optim.AdamW([shift], lr=1e-3, weight_decay=0.0),
        torch.optim.SGD([weight, bias], lr=0.5),
        torch.optim.AdamW([dense, dense_bias], lr=0.02, weight_decay=0.0),
    ]
    losses = nn.functional.binary_cross_entropy_with_logits
    order = epoch_order(len(train_set), 42, 0)
    steps = list(epoch_batches(order, 40))
    for step, rows in enumerate(steps):
        batch = train_set.batch(rows)
        reps = torch.relu(
            nn.functional.embedding_bag(
                batch.inputs.ids,  # type: ignore[union-attr]
                table,
                batch.inputs.offsets,  # type: ignore[union-attr]
                mode="sum",
                per_sample_weights=batch.inputs.weights.double(),  # type: ignore[union-attr]
                include_last_offset=True,
                sparse=True,
            )
            + shift
        )
        full = torch.zeros(30, 24, dtype=torch.float64).scatter(1, index, weight)
        targets = batch.labels.to_dense().double()
        members = nn.functional.one_hot(clusters.assignment.long(), len(clusters)).double()
        main = losses(reps @ full.T + bias, targets, reduction="sum") / len(rows)
        positive = (targets @ members > 0).double()
        auxiliary = losses(reps @ dense.T + dense_bias, positive, reduction="mean")
        share = 0.2 * (1 + math.cos(math.pi * step / len(steps)))
        ((1 - share) * main + share * auxiliary).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    (tmp_path / "run" / "model").mkdir(parents=True)
    trainer = Trainer(model, options, train_set, None, auxiliary=head)
    TrainingLoop(trainer, options.train, tmp_path / "run").fit()
    assert trainer.auxiliary is None
    mine = (
        model.encoder.table.weight,  # type: ignore[union-attr]
        model.head.layer.weight,
        head.classifier.layer.weight,
        head.classifier.layer.bias,
    )
    for found, start, truth in zip(mine, starts, (table, weight, dense, dense_bias), strict=True):
        error = (found.detach().double() - truth.detach()).norm()
        assert error < 0.01 * (truth.detach() - start).norm()


def test_the_share_is_half_a_cosine() -> None:
    shares = [auxiliary_share(step, scale=0.4, cutoff=100) for step in range(120)]
    assert shares[0] == 0.4
    assert shares[50] == pytest.approx(0.2)
    assert shares[25] == pytest.approx(0.2 + 0.2 * math.cos(math.pi / 4))
    assert all(a > b > 0 for a, b in pairwise(shares[:100]))
    assert shares[100:] == [0.0] * 20


def test_cluster_shares_count_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmc.training.auxiliary._COUNT_ROWS", 2)
    assignment = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    clusters = Clusters(assignment, 2, torch.arange(4))
    labels = SparseLabels.from_lists([[0, 1], [1], [], [0, 2], [0]], 4)
    shares = cluster_shares(clusters, labels)
    torch.testing.assert_close(shares, torch.tensor([4.5 / 6, 1.5 / 6]))


def test_too_few_labels_are_a_clear_error(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    message = r"auxiliary\.max_labels: expected fewer than the 30 labels, .*, got 30"
    with pytest.raises(ConfigError, match=message):
        runs.train(config(auxiliary={"max_labels": 30}), tiny_data, tmp_path)
    assert not (tmp_path / "run").exists()


def test_resuming_without_the_clusters_is_a_clear_error(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    run = runs.train(config(train={"epochs": 1}), tiny_data, tmp_path)
    (run / "clusters.safetensors").unlink()
    with pytest.raises(ValueError, match=r"clusters\.safetensors: expected label clusters, got no"):
        runs.train(config(train={"epochs": 1}), tiny_data, tmp_path, resume=True)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_scale_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"auxiliary\.scale: input should be .* than"):
        config(auxiliary={"scale": value})
