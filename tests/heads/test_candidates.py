"""Scores of chosen labels against the scores of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from xmc.heads.candidates import candidate_scores
from xmc.nn.compressed import Storage, WeightDtype, compress_
from xmc.nn.fan_in import FixedFanInLinear

LAYERS = {
    "free": {},
    "no bias": {"bias": False},
    "groups": {"group_size": 4},
    "bfloat16": {"dtype": torch.bfloat16},
    "float8 pattern": {"dtype": torch.float8_e4m3fn, "pattern": (2, 8)},
}


def expected(layer: FixedFanInLinear | nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    if isinstance(layer, FixedFanInLinear):
        weight = layer.matrix.to_dense()
    else:
        weight = layer.weight
    scores = x.double() @ weight.detach().double().T
    if layer.bias is not None:
        scores += layer.bias.detach().double()
    return torch.where(labels < 0, -torch.inf, scores.gather(1, labels.clamp(min=0)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("packed", [False, True])
def test_compressed_layers(dtype: WeightDtype, packed: bool) -> None:
    layer = FixedFanInLinear(100, 40, 7, group_size=4)
    nn.init.normal_(layer.bias)
    compress_(layer, Storage(dtype, packed))
    x, labels = torch.randn(7, 100), torch.randint(-1, 40, (7, 5))
    scores = candidate_scores(layer, x, labels).double()
    torch.testing.assert_close(scores, expected(layer, x, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_sparse_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmc.heads.candidates._NUMBERS", 100)  # several pieces
    layer = FixedFanInLinear(32, 40, 8, **LAYERS[name])  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x, labels = torch.randn(7, 32), torch.randint(-1, 40, (7, 5))
    torch.testing.assert_close(
        candidate_scores(layer, x, labels).double(),
        expected(layer, x, labels),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (6, 50)])
def test_a_dense_layer_and_odd_shapes(shape: tuple[int, int]) -> None:
    layer = nn.Linear(6, 9)
    x, labels = torch.randn(shape[0], 6), torch.randint(-1, 9, shape)
    scores = candidate_scores(layer, x, labels)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected(layer, x, labels), rtol=1e-5, atol=1e-5)


def test_labels_that_do_not_fit() -> None:
    layer, x = nn.Linear(6, 9), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 9\), got 0 to 9"):
        candidate_scores(layer, x, torch.tensor([[0, 9], [1, 2]]))
    with pytest.raises(ValueError, match=r"expected labels of shape \[2, C\] .* got \[3, 1\]"):
        candidate_scores(layer, x, torch.zeros(3, 1, dtype=torch.int64))
