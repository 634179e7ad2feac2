"""Classifier weights in fewer bits: a small real problem learns as well as in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from xmc.config import from_dict
from xmc.data.pydoc import build_pydoc
from xmc.training.log import read_log
from xmc.training.run import train
from xmc_kernels import rounding

STORED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
}


_RATES = {"sgd": 1.0, "momentum": 0.1, "adamw": 1e-2}


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What numpy's functions call, by their documentation: about 900 rows and 280 labels."""
    folder = tmp_path_factory.mktemp("numpy")
    build_pydoc(folder / "data", ["numpy"])
    return folder


def final_loss(
    functions: Path, out: Path, kind: str, moments: str = "float32", **head: Any
) -> float:
    """Mean loss of the last steps after 20 epochs; it starts at 15."""
    values = {
        "encoder": {"dim": 128, "dropout": 0.0},
        "head": {"fan_in": 32, **head},
        "encoder_optimizer": {"lr": 5e-3},
        "classifier_optimizer": {"kind": kind, "lr": _RATES[kind], "moments": moments},
        "train": {"epochs": 20, "batch_size": 64, "warmup_steps": 20, "validation": 0.0},
    }
    model = train(
        from_dict(values, source="test"),
        data=functions / "data",
        out=out,
        cache=functions / "cache",
        show_progress=False,
    )
    assert model.head.layer.weight.dtype == STORED[head["weight_dtype"]]
    losses = [event["loss"] for event in read_log(out / "log.jsonl") if event["event"] == "step"]
    return float(sum(losses[-8:]) / 8)


@pytest.mark.parametrize(("kind", "of_float8"), [("sgd", 0.01), ("adamw", 0.03)])
def test_stochastic_rounding_reaches_the_loss_of_float32(
    kind: str, of_float8: float, functions: Path, tmp_path: Path
) -> None:
    loss = {
        dtype: final_loss(functions, tmp_path / dtype, kind, weight_dtype=dtype)
        for dtype in ("float32", "bfloat16", "float8")
    }
    assert loss["float32"] < 5
    assert loss["bfloat16"] == pytest.approx(loss["float32"], rel=0.01)
    assert loss["float8"] == pytest.approx(loss["float32"], rel=of_float8)


@pytest.mark.parametrize(
    ("kind", "weight_dtype"),
    [("adamw", "float32"), ("adamw", "bfloat16"), ("adamw", "float8"), ("momentum", "float32")],
)
def test_moments_of_8_bits_reach_the_loss_of_float32(
    kind: str, weight_dtype: str, functions: Path, tmp_path: Path
) -> None:
    exact, rounded = (
        final_loss(functions, tmp_path / moments, kind, moments, weight_dtype=weight_dtype)
        for moments in ("float32", "float8")
    )
    assert exact < 5
    assert rounded == pytest.approx(exact, rel=0.02)


def test_rounding_to_nearest_does_not(
    functions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the noise is for: half a step added to every number rounds it to nearest."""
    exact = final_loss(functions, tmp_path / "float32", "sgd", weight_dtype="float32")

    def half(key: int, rows: torch.Tensor, columns: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.full(torch.broadcast_shapes(rows.shape, columns.shape), 2 ** (bits - 1))

    monkeypatch.setattr(rounding, "noise", half)
    nearest = final_loss(functions, tmp_path / "float8", "sgd", weight_dtype="float8")
    assert nearest > 1.05 * exact
