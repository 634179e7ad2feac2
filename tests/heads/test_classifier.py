from __future__ import annotations

import pytest
import torch
from torch import nn

from xmc.config import HeadConfig, OptimizerConfig, RewireConfig
from xmc.heads.classifier import ClassifierHead
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import SparseLabels

B, D, L, F = 7, 24, 50, 6


@pytest.fixture
def labels() -> SparseLabels:
    rows = [[3, 10], [], [49], [0, 1, 2, 3], [3], [10, 20, 30], [0]]
    return SparseLabels.from_lists(rows, L)


def make_head(kind: str, optimizer: str = "sgd", loss: str = "bce") -> ClassifierHead:
    torch.manual_seed(1)
    config = HeadConfig(kind=kind, fan_in=F, loss=loss)  # type: ignore[arg-type]
    return ClassifierHead.from_config(D, L, config, OptimizerConfig(kind=optimizer, lr=0.1))  # type: ignore[arg-type]


def dense_weight(head: ClassifierHead) -> torch.Tensor:
    layer = head.layer
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().double()
    dense = torch.zeros(L, D, dtype=torch.float64)
    return dense.scatter_(1, layer.index.long(), layer.weight.detach().double())


def autograd_truth(
    head: ClassifierHead, reps: torch.Tensor, labels: SparseLabels
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, d_reps and the dense weight's gradient in float64, from autograd over [B, L]."""
    x = reps.double().requires_grad_()
    weight = dense_weight(head).requires_grad_()
    scores = x @ weight.T + head.layer.bias.detach().double()
    targets = labels.to_dense().double()
    if head.loss == "bce":
        loss = nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
    else:
        loss = (1 - (2 * targets - 1) * scores).clamp_min(0).square().sum()
    loss = loss / len(reps)
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_step_is_sgd_on_the_mean_loss(kind: str, loss: str, labels: SparseLabels) -> None:
    head = make_head(kind, loss=loss)
    reps = torch.randn(B, D)
    before = dense_weight(head)
    expected_loss, expected_d_reps, d_weight = autograd_truth(head, reps, labels)
    result = head.loss_and_grad(reps, labels)
    torch.testing.assert_close(result.loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.d_reps.double(), expected_d_reps, rtol=1e-4, atol=1e-6)
    stored = before != 0 if kind == "sparse" else torch.ones_like(before, dtype=torch.bool)
    expected = torch.where(stored, before - 0.1 * d_weight, 0.0)
    torch.testing.assert_close(dense_weight(head), expected, rtol=1e-4, atol=1e-6)
    assert head.steps == 1


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "adagrad"])
def test_accumulated_chunks_equal_one_batch(
    kind: str, optimizer: str, labels: SparseLabels
) -> None:
    """The gradient scale is that of the whole step, with a ragged last chunk too."""
    whole, chunked = make_head(kind, optimizer), make_head(kind, optimizer)
    for _ in range(3):
        reps = torch.randn(B, D)
        result = whole.loss_and_grad(reps, labels)
        parts = []
        for start, stop in ((0, 3), (3, 6), (6, 7)):
            part = labels.slice(start, stop)
            parts.append(
                chunked.loss_and_grad(reps[start:stop], part, num_rows=B, update=stop == B)
            )
        torch.testing.assert_close(sum(part.loss for part in parts), result.loss)
        d_reps = torch.cat([part.d_reps for part in parts])
        torch.testing.assert_close(d_reps, result.d_reps, rtol=1e-4, atol=1e-6)
    assert whole.steps == chunked.steps == 3
    torch.testing.assert_close(dense_weight(chunked), dense_weight(whole), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked.layer.bias, whole.layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_topk_never_returns_excluded_labels(kind: str, labels: SparseLabels) -> None:
    head = make_head(kind)
    reps = torch.randn(B, D)
    scores = reps.double() @ dense_weight(head).T + head.layer.bias.double()
    scores[labels.to_dense().bool()] = -torch.inf
    expected = scores.topk(5, dim=1)
    best = head.topk(reps, 5, exclude=labels)
    torch.testing.assert_close(best.scores.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(best.labels, expected.indices)


def test_rewiring_moves_the_moments_with_their_weights(labels: SparseLabels) -> None:
    head = make_head("sparse", "adamw")
    head.loss_and_grad(torch.randn(B, D), labels)
    assert isinstance(head.layer, FixedFanInLinear)

    def by_input(values: torch.Tensor) -> torch.Tensor:
        assert isinstance(head.layer, FixedFanInLinear)
        return torch.zeros(L, D).scatter_(1, head.layer.index.long(), values)

    state = head.training_state()
    before = by_input(head.layer.weight), by_input(state["weight_m"]), by_input(state["weight_v"])
    head.rewire_(RewireConfig(method="set", fraction=0.5), seed=3, step=10)
    state = head.training_state()
    after = by_input(head.layer.weight), by_input(state["weight_m"]), by_input(state["weight_v"])
    survived = after[0] != 0
    assert survived.sum(1).eq(F // 2).all()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, torch.where(survived, old, 0.0))


def test_a_dense_head_cannot_be_rewired() -> None:
    with pytest.raises(ValueError, match="dense head has no pattern"):
        make_head("dense").rewire_(RewireConfig(method="set"), seed=0, step=1)


def test_the_log_prior_bias_gives_the_base_rate() -> None:
    shares = torch.linspace(0.001, 0.5, L)
    head = ClassifierHead.from_config(D, L, HeadConfig(fan_in=F), label_shares=shares)
    scores = head.topk(torch.zeros(1, D), L)
    rates = torch.sigmoid(scores.scores[0])[scores.labels[0].argsort()]
    torch.testing.assert_close(rates, shares)


def test_features_that_are_not_finite_are_refused(labels: SparseLabels) -> None:
    reps = torch.randn(B, D)
    reps[4, 2] = torch.nan
    with pytest.raises(ValueError, match="row 4"):
        make_head("sparse").loss_and_grad(reps, labels)
