"""The classifier head on N:M patterns and on weights of fewer bits."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from xmc.config import ConfigError, HeadConfig, OptimizerConfig, from_dict
from xmc.heads.classifier import ClassifierHead
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import SparseLabels

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


def test_a_pattern_must_make_the_fan_in() -> None:
    with pytest.raises(ValueError, match="expected fan-in 12 for 3 of every 8 of 32 features"):
        make_head(pattern="3:8")


@pytest.mark.parametrize(
    "options", [{"weight_dtype": "bfloat16", "pattern": "2:8"}, {"weight_dtype": "float8"}], ids=str
)
def test_a_resumed_run_ends_with_the_same_bits(
    options, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc.training.run import train
    from xmc.training.trainer import Interrupted

    values = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24},
        "head": {"fan_in": 6, **options},
        "classifier_optimizer": {"kind": "momentum", "lr": 0.05},
        "train": {"epochs": 2, "batch_size": 40, "checkpoint_every": 4},
    }
    config = from_dict(values, source="test")

    def run(name: str, **more: Any) -> bytes:
        out = tmp_path / name
        train(config, data=tiny_data, out=out, cache=tmp_path / "cache", **more)
        return (out / "model" / "weights.safetensors").read_bytes()

    whole = run("whole")
    original, calls = ClassifierHead.loss_and_grad, []

    def interrupted(self: ClassifierHead, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierHead, "loss_and_grad", interrupted)
        with pytest.raises(Interrupted):
            run("parts")
    assert run("parts", resume=True) == whole
