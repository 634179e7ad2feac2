"""The auxiliary head and the weighted sum of two heads, against autograd in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from xmc.config import AuxiliaryConfig, HeadConfig, OptimizerConfig
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.classifier import ClassifierHead
from xmc.nn.clusters import Clusters
from xmc.types import SparseLabels

B, D, L, F, C = 7, 24, 50, 6, 8
LR = 0.1


@pytest.fixture
def labels() -> SparseLabels:
    rows = [[3, 10], [], [49], [0, 1, 2, 3], [3], [10, 20, 30], [0]]
    return SparseLabels.from_lists(rows, L)


@pytest.fixture
def clusters() -> Clusters:
    assignment = torch.randperm(L).argsort() % C
    return Clusters(assignment.int(), C, assignment.argsort(stable=True))


def make_auxiliary(clusters: Clusters, kind: str, reduction: str) -> AuxiliaryHead:
    torch.manual_seed(2)
    layer = nn.Linear(D, C)
    optimizer = OptimizerConfig(kind=kind, lr=LR)  # type: ignore[arg-type]
    head = ClassifierHead(layer, loss="bce", optimizer=optimizer)
    return AuxiliaryHead(head, clusters, reduction=reduction)


def make_classifier(kind: str, loss: str) -> ClassifierHead:
    torch.manual_seed(1)
    config = HeadConfig(fan_in=F, loss=loss)  # type: ignore[arg-type]
    return ClassifierHead.from_config(D, L, config, OptimizerConfig(kind=kind, lr=LR))  # type: ignore[arg-type]


class Truth:
    """Both parts as dense float64 matrices with torch's optimizers; labels read one by one."""

    def __init__(
        self, main: ClassifierHead, auxiliary: AuxiliaryHead, kind: str, loss: str, reduction: str
    ) -> None:
        self.loss, self.reduction, self.clusters = loss, reduction, auxiliary.clusters
        self.index = main.layer.index.long()  # type: ignore[union-attr]
        layers = (main.layer, auxiliary.classifier.layer)
        self.parameters = [
            tensor.detach().double().clone().requires_grad_()
            for layer in layers
            for tensor in (layer.weight, layer.bias)
        ]
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
        self.optimizer = make(self.parameters, lr=LR, weight_decay=0.0)

    def losses(self, reps: Tensor, labels: SparseLabels) -> tuple[Tensor, Tensor]:
        weight, bias, cluster_weight, cluster_bias = self.parameters
        dense = torch.zeros(L, D, dtype=torch.float64).scatter(1, self.index, weight)
        targets = labels.to_dense().double()
        scores = reps @ dense.T + bias
        if self.loss == "bce":
            main = nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
        else:
            main = (1 - (2 * targets - 1) * scores).clamp_min(0).square().sum()
        positive = torch.zeros(len(reps), C, dtype=torch.float64)
        for row, label in targets.nonzero().tolist():
            positive[row, int(self.clusters.assignment[label])] = 1
        auxiliary = nn.functional.binary_cross_entropy_with_logits(
            reps @ cluster_weight.T + cluster_bias, positive, reduction=self.reduction
        )
        return main / len(reps), auxiliary if self.reduction == "mean" else auxiliary / len(reps)

    def step(self, reps: Tensor, labels: SparseLabels, share: float) -> tuple[float, Tensor]:
        """One optimizer step on (1 - s) * main + s * auxiliary: its value and d_reps."""
        x = reps.double().requires_grad_()
        main, auxiliary = self.losses(x, labels)
        total = (1 - share) * main + share * auxiliary
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        assert x.grad is not None
        return total.item(), x.grad


@pytest.mark.parametrize("bounds", [[0, B], [0, 3, 6, B]])  # whole, and in passes
@pytest.mark.parametrize(
    ("kind", "loss", "reduction"),
    [("sgd", "bce", "mean"), ("sgd", "squared_hinge", "sum"), ("adamw", "bce", "mean")],
)
def test_both_heads_train_on_the_weighted_sum(
    labels: SparseLabels,
    clusters: Clusters,
    bounds: list[int],
    kind: str,
    loss: str,
    reduction: str,
) -> None:
    """Weights of both heads, loss and d_reps, over steps whose share falls, however cut."""
    main = make_classifier(kind, loss)
    auxiliary = make_auxiliary(clusters, kind, reduction)
    truth = Truth(main, auxiliary, kind, loss, reduction)
    for share in (0.4, 0.25, 0.01):
        reps = torch.randn(B, D)
        total, d_reps = truth.step(reps, labels, share)
        results = []
        for start, stop in pairwise(bounds):
            parts = [
                head.loss_and_grad(
                    reps[start:stop],
                    labels.slice(start, stop),
                    num_rows=B,
                    update=stop == B,
                    weight=weight,
                )
                for head, weight in ((main, 1 - share), (auxiliary, share))
            ]
            results.append(parts[0] + parts[1])
        assert sum(float(result.loss) for result in results) == pytest.approx(total, rel=1e-5)
        mine = torch.cat([result.d_reps for result in results]).double()
        torch.testing.assert_close(mine, d_reps, rtol=1e-4, atol=1e-6)
    assert main.steps == auxiliary.steps == 3
    weights = [
        tensor.double()
        for layer in (main.layer, auxiliary.classifier.layer)
        for tensor in (layer.weight.detach(), layer.bias.detach())
    ]
    # AdamW magnifies the rounding of a gradient near zero.
    limits = {"rtol": 1e-4, "atol": 1e-6} if kind == "sgd" else {"rtol": 1e-3, "atol": 1e-3}
    for mine, expected in zip(weights, truth.parameters, strict=True):
        torch.testing.assert_close(mine, expected.detach(), **limits)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_weight_scales_loss_and_every_gradient(labels: SparseLabels, kind: str) -> None:
    """With SGD the update is the gradient: a quarter of the weight, a quarter of the update."""
    reps = torch.randn(B, D)
    found = []
    for weight in (1.0, 0.25):
        torch.manual_seed(1)
        config = HeadConfig(kind=kind, fan_in=F)  # type: ignore[arg-type]
        head = ClassifierHead.from_config(D, L, config, OptimizerConfig(kind="sgd", lr=LR))
        before = head.layer.weight.clone(), head.layer.bias.clone()
        result = head.loss_and_grad(reps, labels, weight=weight)
        moved = head.layer.weight - before[0], head.layer.bias - before[1]
        found.append((result.loss, result.d_reps, *moved))
    for whole, quarter in zip(*found, strict=True):
        torch.testing.assert_close(4 * quarter, whole, rtol=1e-4, atol=1e-6)


def test_a_fresh_head_starts_at_the_base_rates_and_draws_alone(clusters: Clusters) -> None:
    shares = torch.linspace(0.01, 0.9, C)
    state = torch.get_rng_state()
    config = AuxiliaryConfig(kind="clusters", lr=0.02)
    head, again, other = (
        AuxiliaryHead.from_config(D, clusters, config, seed=seed, shares=shares)
        for seed in (4, 4, 5)
    )
    assert torch.equal(torch.get_rng_state(), state)
    layer = head.classifier.layer
    torch.testing.assert_close(torch.sigmoid(layer.bias), shares)
    assert layer.weight.abs().max() <= 1 / math.sqrt(D)
    assert layer.weight.std() == pytest.approx(1 / math.sqrt(3 * D), rel=0.2)
    assert torch.equal(layer.weight, again.classifier.layer.weight)
    assert not torch.equal(layer.weight, other.classifier.layer.weight)
    assert head.lr == 0.02
    assert head.classifier.rule.kind == "adamw"
    without = AuxiliaryHead.from_config(D, clusters, config, seed=4)
    assert not without.classifier.layer.bias.any()


def test_the_training_state_is_all_that_a_step_writes(
    labels: SparseLabels, clusters: Clusters
) -> None:
    """A head given another's state and steps goes on bit for bit as that one."""
    config = AuxiliaryConfig(kind="clusters", lr=0.02)
    head = AuxiliaryHead.from_config(D, clusters, config, seed=1)
    head.loss_and_grad(torch.randn(B, D), labels, weight=0.3)
    copy = AuxiliaryHead.from_config(D, clusters, config, seed=9)
    for name, tensor in copy.training_state().items():
        tensor.copy_(head.training_state()[name])
    copy.steps = head.steps
    reps = torch.randn(B, D)
    results = [each.loss_and_grad(reps, labels, weight=0.2) for each in (head, copy)]
    assert torch.equal(results[0].d_reps, results[1].d_reps)
    for name, tensor in head.training_state().items():
        assert torch.equal(tensor, copy.training_state()[name]), name


def test_what_does_not_fit_is_refused(clusters: Clusters) -> None:
    with pytest.raises(ValueError, match="expected a classifier of 8 clusters, got 9"):
        AuxiliaryHead(ClassifierHead(nn.Linear(D, 9)), clusters)
    with pytest.raises(ValueError, match="expected a reduction of mean, sum, got 'max'"):
        AuxiliaryHead(ClassifierHead(nn.Linear(D, C)), clusters, reduction="max")
