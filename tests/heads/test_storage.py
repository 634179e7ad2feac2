"""The classifier head on N:M patterns and on weights of fewer bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from xmc.config import ConfigError, HeadConfig, OptimizerConfig, RewireConfig, from_dict
from xmc.heads.classifier import ClassifierHead
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import SparseLabels
from xmc_kernels import float8

D, L = 32, 40


def make_head(**options: Any) -> ClassifierHead:
    config = HeadConfig(**{"fan_in": 8, **options})
    return ClassifierHead.from_config(D, L, config, OptimizerConfig(kind="sgd", lr=0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:8"},
        {"weight_dtype": "bfloat16"},
        {"weight_dtype": "bfloat16", "pattern": "4:16", "group_size": 4},
        {"weight_dtype": "float8"},
        {"weight_dtype": "bfloat16", "kind": "dense"},
    ],
    ids=str,
)
def test_steps_lower_the_loss_and_top_k_is_that_of_the_dense_matrix(options) -> None:
    head = make_head(**options)
    assert head.layer.bias is not None
    assert head.layer.bias.dtype == torch.float32
    rows = [[label, (label * 7 + 3) % L] for label in range(0, L, 5)]
    labels = SparseLabels.from_lists(rows, L)
    reps = torch.randn(len(rows), D)
    losses = [float(head.loss_and_grad(reps, labels).loss) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    best = head.topk(reps, 2)
    assert [sorted(row) for row in best.labels.tolist()] == [sorted(row) for row in rows]
    layer = head.layer
    dense = layer.to_dense() if isinstance(layer, FixedFanInLinear) else layer.float()
    expected = dense(reps).topk(2).values
    torch.testing.assert_close(best.scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "dense", "pattern": "2:8"},
            r"pattern = '2:8' needs kind = 'sparse', got 'dense'",
        ),
        ({"kind": "dense", "weight_dtype": "float8"}, r"weight_dtype = 'float8' needs kind"),
        ({"pattern": "2:6"}, r"head.pattern: string should match pattern"),
        ({"pattern": "0:8"}, r"head.pattern: string should match pattern"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict({"head": options}, source="test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"classifier_optimizer": {"kind": "sgd", "moments": "float8"}},
            "moments = 'float8' needs kind = 'adamw' or 'momentum', got 'sgd'",
        ),
        (
            {"classifier_optimizer": {"kind": "adagrad", "moments": "float8"}},
            "moments = 'float8' needs kind = 'adamw' or 'momentum', got 'adagrad'",
        ),
        (
            {"encoder_optimizer": {"moments": "float8"}},
            'encoder_optimizer.moments: the encoder remembers in "float32", got "float8"',
        ),
        (
            {"classifier_optimizer": {"moments": "int8"}},
            "classifier_optimizer.moments: input should be 'float32' or 'float8', got 'int8'",
        ),
    ],
)
def test_moments_that_cannot_be_are_named(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values, source="test")


def test_a_rewiring_moves_float8_moments_with_their_weights() -> None:
    """Numbers by label and input; scales stay, and what is new has none."""
    optimizer = OptimizerConfig(kind="adamw", lr=0.05, moments="float8")
    config = HeadConfig(fan_in=8, group_size=2, weight_dtype="bfloat16")
    head = ClassifierHead.from_config(D, L, config, optimizer)
    labels = SparseLabels.from_lists([[row, (3 * row + 1) % L] for row in range(10)], L)
    for _ in range(3):
        head.loss_and_grad(torch.randn(10, D), labels)

    def by_input() -> dict[str, dict[tuple[int, int], float]]:
        state, index = head.training_state(), head.index
        assert index is not None
        inputs = index.repeat_interleave(2, 0).tolist()
        tensors = {"weight": head.layer.weight.float()}
        for name in ("weight_m", "weight_v"):
            assert state[name].dtype == torch.float8_e4m3fn
            tensors[name] = float8.dequantize(state[name], state[f"{name}_scale"])
        return {
            name: {
                (label, column): value
                for label, row in enumerate(zip(inputs, tensor.tolist(), strict=True))
                for column, value in zip(*row, strict=True)
            }
            for name, tensor in tensors.items()
        }

    before = by_input()
    scales = {k: v.clone() for k, v in head.training_state().items() if k.endswith("scale")}
    report = head.rewire_(
        RewireConfig(method="set", fraction=0.4, anneal="constant"), seed=1, step=3
    )
    after = by_input()
    assert report.pruned == 3 * L // 2
    kept = before["weight"].keys() & after["weight"].keys()
    assert len(kept) == 5 * L
    for name, numbers in after.items():
        assert sum(before[name][slot] != 0 for slot in kept) > 4 * L
        assert all(value == before[name].get(slot, 0.0) for slot, value in numbers.items()), name
    assert all(torch.equal(head.training_state()[name], scale) for name, scale in scales.items())
    head.loss_and_grad(torch.randn(10, D), labels)


def test_a_pattern_must_make_the_fan_in() -> None:
    with pytest.raises(ValueError, match="expected fan-in 12 for 3 of every 8 of 32 features"):
        make_head(pattern="3:8")


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"weight_dtype": "bfloat16", "pattern": "2:8"}, {"kind": "momentum"}),
        ({"weight_dtype": "float8"}, {"kind": "momentum"}),
        ({"weight_dtype": "bfloat16", "group_size": 2}, {"kind": "adamw", "moments": "float8"}),
        ({"dense_share": 0.2}, {"kind": "momentum", "moments": "float8"}),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(
    options, optimizer, runs: ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    values = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24},
        "head": {"fan_in": 6, **options},
        "classifier_optimizer": {"lr": 0.05, **optimizer},
        "rewire": {"method": "set", "interval": 3},
        "train": {"epochs": 2, "batch_size": 40, "checkpoint_every": 4},
    }
    config = from_dict(values, source="test")

    whole = runs.train(config, tiny_data, tmp_path / "whole")
    start = partial(runs.train, config, tiny_data, tmp_path / "parts")
    runs.assert_same_run(whole, runs.stop_and_resume(start, [7]))
