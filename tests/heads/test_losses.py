"""Label smoothing and propensity weights in the head, against autograd on dense float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from xmc.config import Config, ConfigError, HeadConfig, OptimizerConfig, RewireConfig, from_dict
from xmc.evaluation.propensity import PRESETS, inverse_propensity
from xmc.heads.classifier import ClassifierHead
from xmc.heads.growth import growth_scores
from xmc.model import build_model, load_model
from xmc.nn.fan_in import FixedFanInLinear
from xmc.training.run import prepare_data, train
from xmc.types import SparseLabels

B, D, L, F = 9, 25, 48, 5
WEIGHT = torch.linspace(1, 12, L)


def make_labels() -> SparseLabels:
    rows = [[3, 10], [], [47], [0, 1, 2, 3], [3], [10, 20, 30], [0], [5], list(range(40))]
    return SparseLabels.from_lists(rows, L)


def make_head(loss: str, smoothing: float, weight: Tensor | None, **options: Any) -> ClassifierHead:
    torch.manual_seed(1)
    config = HeadConfig(fan_in=F, loss=loss, label_smoothing=smoothing, **options)  # type: ignore[arg-type]
    optimizer = OptimizerConfig(kind="sgd", lr=0.1)
    head = ClassifierHead.from_config(D, L, config, optimizer, positive_weight=weight)
    nn.init.normal_(head.layer.bias)  # type: ignore[arg-type]
    return head


def truth(head: ClassifierHead, reps: Tensor, labels: SparseLabels) -> tuple[Tensor, ...]:
    """Mean over rows of the loss, and its gradients in reps and the dense weight [L, D]."""
    x = reps.double().requires_grad_()
    layer = head.layer
    weight = (layer.to_dense() if isinstance(layer, FixedFanInLinear) else layer).weight.detach()
    weight = weight.double().requires_grad_()
    assert layer.bias is not None
    scores = x @ weight.T + layer.bias.double()
    targets, e = labels.to_dense().double(), head.label_smoothing
    if head.loss == "bce":
        entries = nn.functional.softplus(scores) - targets * (1 - e) * scores
    else:
        kept, flipped = (torch.relu(1 - y * scores) ** 2 for y in (1, -1))
        entries = targets * ((1 - e) * kept + e * flipped) + (1 - targets) * flipped
    factor = torch.ones(L) if head.positive_weight is None else head.positive_weight
    entries = entries * (1 + targets * (factor - 1))
    loss = entries.sum() / len(reps)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


CASES = [(0.2, None), (0.0, WEIGHT), (0.1, WEIGHT)]
losses = pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
cases = pytest.mark.parametrize(("smoothing", "weight"), CASES)


@losses
@cases
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_step_is_sgd_on_the_loss(
    loss: str, smoothing: float, weight: Tensor | None, kind: str
) -> None:
    head, labels, reps = make_head(loss, smoothing, weight, kind=kind), make_labels(), None
    reps = torch.randn(B, D)
    value, d_reps, d_weight = truth(head, reps, labels)
    if isinstance(head.layer, FixedFanInLinear):
        d_weight = d_weight.gather(1, head.layer.index.long())
    expected = head.layer.weight.double() - 0.1 * d_weight
    parts = [
        head.loss_and_grad(
            reps[start:stop], labels.slice(start, stop), num_rows=B, update=stop == B
        )
        for start, stop in ((0, 4), (4, B))
    ]
    limits = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(sum(part.loss for part in parts).double(), value, **limits)  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat([p.d_reps for p in parts]).double(), d_reps, **limits)
    torch.testing.assert_close(head.layer.weight.double(), expected, **limits)


@losses
@cases
@pytest.mark.parametrize("group_size", [1, 3])
def test_rigl_grows_by_the_gradient_of_this_loss(
    loss: str, smoothing: float, weight: Tensor | None, group_size: int
) -> None:
    head, labels = make_head(loss, smoothing, weight, group_size=group_size), make_labels()
    reps = torch.randn(B, D)
    gradient = truth(head, reps, labels)[2]
    score = gradient.abs().view(-1, group_size, D).mean(1)
    layer = head.layer
    assert isinstance(layer, FixedFanInLinear)
    options = {"loss": loss, "smoothing": smoothing, "positive_weight": weight}
    growth = growth_scores(reps, labels, layer.weight, layer.index, layer.bias, **options)
    found = growth(0, L // group_size)
    torch.testing.assert_close(found.double(), score, rtol=1e-4, atol=1e-6)
    index, magnitude = layer.index.long(), layer.weight.view(-1, group_size, F).abs().mean(1)
    kept = index.gather(1, magnitude.sort(1).indices[:, 2:])
    score.scatter_(1, index, -1.0)
    wanted = torch.cat([kept, score.topk(2).indices], 1).sort(1).values
    head.rewire_(
        RewireConfig(method="rigl", fraction=0.4), seed=0, step=1, reps=reps, labels=labels
    )
    assert torch.equal(layer.index.long(), wanted)


def config(**head: Any) -> Config:
    values = {
        "features": {"min_df": 1},
        "encoder": {"dim": 16},
        "head": {"fan_in": 6, "positive_weight": "propensity", **head},
        "train": {"epochs": 1, "batch_size": 60, "validation": 0.25},
    }
    return from_dict(values, source="test")


@pytest.mark.parametrize(
    ("options", "a", "b"),
    [
        ({}, 0.55, 1.5),
        ({"propensity": "amazon"}, 0.6, 2.6),
        ({"propensity_a": 0.3, "propensity_b": 2.0}, 0.3, 2.0),
    ],
)
def test_a_run_weighs_by_propensities_of_its_training_rows(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    a: float,
    b: float,
) -> None:
    seen: list[Tensor | None] = []
    original = ClassifierHead.loss_and_grad

    def loss_and_grad(self: ClassifierHead, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.positive_weight)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ClassifierHead, "loss_and_grad", loss_and_grad)
    model = train(config(**options), data=tiny_data, out=tmp_path / "run", cache=tmp_path / "cache")
    train_set = prepare_data(config(), tiny_data, tmp_path / "cache")[1]
    counts = [0] * 30
    for row in range(300):
        for label in train_set.labels.slice(row, row + 1).indices.tolist():
            counts[label] += 1
    expected = inverse_propensity(torch.tensor(counts), 300, a, b).float()
    assert all(torch.equal(weight, expected) for weight in seen if weight is not None)
    assert len(seen) == 5
    assert model.head.positive_weight is None  # a model that predicts holds none
    assert "head.positive_weight" not in model.weights()
    assert "head.positive_weight" not in load_model(tmp_path / "run" / "model").weights()


def test_presets_of_recipes_are_those_of_the_evaluation() -> None:
    assert set(get_args(get_type_hints(HeadConfig)["propensity"])) == set(PRESETS)


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected positive_weight of shape \[48\], got \[47\]"):
        make_head("bce", 0.0, WEIGHT[1:])
    for value in (-1.0, torch.inf, torch.nan):
        weight = WEIGHT.clone()
        weight[7] = value
        with pytest.raises(ValueError, match=f"of at least 0, got {value} for label 7"):
            make_head("bce", 0.0, weight)
    with pytest.raises(ValueError, match=r"expected positive_weight \[2\] for this .* None"):
        build_model(config(), None, ["a", "b"])  # type: ignore[arg-type]
    message = "head: expected both propensity_a and propensity_b above 0, or neither, got 0.5 and 0"
    with pytest.raises(ConfigError, match=message):
        config(propensity_a=0.5)
    with pytest.raises(ConfigError, match=r"head\.label_smoothing: input should be less than 0\.5"):
        config(label_smoothing=0.5)
