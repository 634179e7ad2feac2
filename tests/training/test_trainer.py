"""Whole trainings on a tiny data set: the result, and the same result after an interruption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from xmc.config import Config, from_dict
from xmc.data.batches import Dataset
from xmc.nn.fan_in import FixedFanInLinear
from xmc.training.encoder_optimizer import clip_gradient_
from xmc.training.log import read_log
from xmc.training.loop import TrainingError, TrainingLoop
from xmc.training.run import prepare_data
from xmc.training.trainer import Trainer


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24, "dropout": 0.3},
        "head": {"fan_in": 6},
        "encoder_optimizer": {"lr": 0.02},
        "train": {"epochs": 3, "batch_size": 32, "warmup_steps": 3, "checkpoint_every": 4},
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


EVERYTHING = {
    "rewire": {"method": "set", "interval": 5, "fraction": 0.3, "end": 0.9},
    "train": {"accumulation": 2, "batch_size": 20, "checkpoint_every": 4, "epochs": 3},
}


@pytest.mark.parametrize("call", [7, 21, 37])  # in the middle of an accumulated step, too
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_interrupted_and_resumed_equals_uninterrupted(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, call: int, optimizer: str
) -> None:
    options = config(**EVERYTHING, classifier_optimizer={"kind": optimizer, "lr": 0.05})
    whole = runs.train(options, tiny_data, tmp_path / "whole")
    start = partial(runs.train, options, tiny_data, tmp_path / "parts")
    runs.assert_same_run(whole, runs.stop_and_resume(start, [call]))


def test_a_crash_loses_only_the_steps_since_the_checkpoint(
    runs: ModuleType, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log lines and files after the last checkpoint are forgotten, and written again alike."""
    options = config(**EVERYTHING)
    whole = runs.train(options, tiny_data, tmp_path / "whole")

    def crash() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        runs.fail_at(patch, [31], crash)  # in step 16 of 27; checkpoints were written at 12 and 9
        with pytest.raises(MemoryError):
            runs.train(options, tiny_data, tmp_path / "parts")
    parts = runs.train(options, tiny_data, tmp_path / "parts", resume=True)
    runs.assert_same_run(whole, parts)


def test_training_equals_plain_torch(tiny_data: Path, tmp_path: Path) -> None:
    """Same start, same order of rows: a dense torch model with masked weights learns the same."""
    options = config(
        encoder={"dim": 24, "dropout": 0.0},
        train={"epochs": 2, "schedule": "constant", "warmup_steps": 0, "batch_size": 50},
        encoder_optimizer={"lr": 1e-3},
        classifier_optimizer={"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    )
    features, train_set, validation_set = prepare_data(options, tiny_data, tmp_path / "cache")
    from xmc.data.batches import epoch_batches, epoch_order
    from xmc.model import build_model

    model = build_model(options, features, [str(n) for n in range(30)])
    layer = model.head.layer
    assert isinstance(layer, FixedFanInLinear)
    index = layer.index.long()
    first_weight = layer.weight.detach().clone()
    first_table = model.encoder.table.weight.detach().clone()  # type: ignore[union-attr]
    table = model.encoder.table.weight.detach().double().clone().requires_grad_()  # type: ignore[union-attr]
    bias = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach().double().clone().requires_grad_()
    label_bias = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    sparse = torch.optim.SparseAdam([table], lr=1e-3)
    dense = torch.optim.AdamW(
        [
            {"params": [bias], "weight_decay": 0.0, "lr": 1e-3},
            {"params": [weight], "weight_decay": 0.1, "lr": 1e-2},
            {"params": [label_bias], "weight_decay": 0.0, "lr": 1e-2},
        ]
    )
    for epoch in range(2):
        for rows in epoch_batches(epoch_order(len(train_set), 42, epoch), 50):
            batch = train_set.batch(rows)
            bag = nn.functional.embedding_bag(
                batch.inputs.ids,  # type: ignore[union-attr]
                table,
                batch.inputs.offsets,  # type: ignore[union-attr]
                mode="sum",
                per_sample_weights=batch.inputs.weights.double(),  # type: ignore[union-attr]
                include_last_offset=True,
                sparse=True,
            )
            full = torch.zeros(30, 24, dtype=torch.float64).scatter(1, index, weight)
            scores = torch.relu(bag + bias) @ full.T + label_bias
            loss = nn.functional.binary_cross_entropy_with_logits(
                scores, batch.labels.to_dense().double(), reduction="sum"
            ) / len(rows)
            loss.backward()
            for optimizer in (sparse, dense):
                optimizer.step()
                optimizer.zero_grad()

    (tmp_path / "run" / "model").mkdir(parents=True)
    trainer = Trainer(model, options, train_set, validation_set)
    TrainingLoop(trainer, options.train, tmp_path / "run").fit()
    trained = model.encoder.table.weight.detach()  # type: ignore[union-attr]
    # Adam magnifies the rounding of a gradient near zero, so that single numbers may differ.
    for mine, start, truth in (
        (trained, first_table, table),
        (layer.weight, first_weight, weight),
        (layer.bias, torch.zeros(30), label_bias),
    ):
        error = (mine.detach().double() - truth.detach()).norm()
        assert error < 0.01 * (truth.detach() - start).norm()


def test_accumulation_equals_the_larger_batch(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    weights = []
    for batch_size, accumulation in ((60, 1), (20, 3)):
        options = config(
            encoder={"dim": 24, "dropout": 0.0},
            train={"batch_size": batch_size, "accumulation": accumulation, "epochs": 1},
        )
        run = runs.train(options, tiny_data, tmp_path / str(batch_size))
        weights.append(load_file(run / "model" / "weights.safetensors"))
    for name in weights[0]:
        one, other = weights[0][name].double(), weights[1][name].double()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_early_stopping_keeps_the_best_epoch(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    """A rate so high that the first epochs are the best: training stops `patience` later."""
    options = config(train={"epochs": 30, "patience": 2, "select_by": "P@1", "batch_size": 16})
    run = runs.train(options, tiny_data, tmp_path)
    events = read_log(run / "log.jsonl")
    scores = [event["P@1"] for event in events if event["event"] == "validation"]
    best = scores.index(max(scores))
    assert len(scores) == best + 1 + 2 < 30
    assert events[-1]["event"] == "end"
    assert events[-1]["epoch"] == best + 1


def test_a_loss_that_is_not_finite_stops_with_advice(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    options = config(encoder_optimizer={"lr": 1e38}, classifier_optimizer={"lr": 1e38})
    with pytest.raises((TrainingError, ValueError), match=r"encoder_optimizer\.lr|finite"):
        runs.train(options, tiny_data, tmp_path)


def test_training_without_validation_keeps_the_last_epoch(
    runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    run = runs.train(config(train={"validation": 0.0, "epochs": 2}), tiny_data, tmp_path)
    events = read_log(run / "log.jsonl")
    assert not [event for event in events if event["event"] == "validation"]
    last = runs.newest(run)
    kept = load_file(run / "model" / "weights.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(tensor.long(), last[f"model.{name}"].long())


def test_clipping_scales_dense_and_sparse_gradients_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 2))
            self.bias = nn.Parameter(torch.zeros(2))

    module = Two()
    entries = [[1, 1]], [[1.0, 0.0], [2.0, 4.0]]  # row 1 twice: its gradient is (3, 4)
    module.table.grad = torch.sparse_coo_tensor(*entries, (4, 2), check_invariants=True)
    module.bias.grad = torch.tensor([12.0, 0.0])
    assert clip_gradient_(module, 0.0) == pytest.approx(13.0)  # sqrt(3^2 + 4^2 + 12^2)
    assert clip_gradient_(module, 6.5) == pytest.approx(13.0)
    expected = torch.zeros(4, 2)
    expected[1] = torch.tensor([1.5, 2.0])
    assert module.table.grad is not None
    assert torch.allclose(module.table.grad.to_dense(), expected)
    assert torch.allclose(module.bias.grad, torch.tensor([6.0, 0.0]))


def total(dataset: Dataset) -> Tensor:
    return dataset.labels.counts().sum()


def test_the_validation_rows_are_not_trained_on(tiny_data: Path, tmp_path: Path) -> None:
    _, train_set, validation_set = prepare_data(config(), tiny_data, tmp_path)
    assert validation_set is not None
    assert (len(train_set), len(validation_set)) == (360, 40)
    whole = prepare_data(config(train={"validation": 0.0}), tiny_data, tmp_path)[1]
    assert total(train_set) + total(validation_set) == total(whole)
