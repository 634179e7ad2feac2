"""RigL in the head: the gradient of dense weights, and the inputs it picks."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from xmc.config import HeadConfig, OptimizerConfig, RewireConfig
from xmc.heads import growth as growth_file
from xmc.heads.classifier import ClassifierHead
from xmc.heads.growth import growth_scores
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import SparseLabels
from xmc_kernels.classifier import LOSSES

B, D, L, F = 9, 25, 48, 5


def make_labels() -> SparseLabels:
    rows = [[3, 10], [], [47], [0, 1, 2, 3], [3], [10, 20, 30], [0], [5], list(range(40))]
    return SparseLabels.from_lists(rows, L)


def make_head(group_size: int = 1, loss: str = "bce", kind: str = "adamw") -> ClassifierHead:
    torch.manual_seed(1)
    config = HeadConfig(fan_in=F, loss=loss, group_size=group_size)  # type: ignore[arg-type]
    optimizer = OptimizerConfig(kind=kind, lr=0.05)  # type: ignore[arg-type]
    head = ClassifierHead.from_config(D, L, config, optimizer)
    head.layer.bias.data.normal_()  # type: ignore[union-attr]
    return head


def dense_gradient(
    oracle: ModuleType, head: ClassifierHead, reps: Tensor, labels: SparseLabels
) -> Tensor:
    """dL/dW [L, D] in float64 by autograd, of the mean over rows."""
    assert isinstance(head.layer, FixedFanInLinear)
    dense = oracle.dense_weight(head.layer.weight, head.layer.index, D)
    targets = oracle.dense_targets(labels.indptr, labels.indices, L)
    bias = head.layer.bias
    gradients = oracle.loss_and_grads(reps, dense, bias, targets, head.loss, 1 / len(reps))
    gradient: Tensor = gradients[2]
    return gradient


def picked(score: Tensor, index: Tensor, kept: Tensor, count: int) -> list[set[int]]:
    """The best unread inputs of each row, by a full sort in float64."""
    rows = []
    for row in range(len(index)):
        free = [column for column in range(D) if column not in index[row].tolist()]
        best = sorted(free, key=lambda column: -float(score[row, column]))[:count]
        rows.append(set(kept[row].tolist()) | set(best))
    return rows


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("tile", [2**20, 200])  # 200 numbers: 8 labels, or 2 groups, at a time
def test_scores_are_the_mean_magnitude_of_the_dense_gradient(
    oracle: ModuleType, monkeypatch: pytest.MonkeyPatch, loss: str, group_size: int, tile: int
) -> None:
    monkeypatch.setattr(growth_file, "_TILE", tile)
    head, labels = make_head(group_size, loss), make_labels()
    reps = torch.randn(B, D)
    gradient = dense_gradient(oracle, head, reps, labels)
    expected = gradient.abs().view(-1, group_size, D).mean(1)
    layer = head.layer
    assert isinstance(layer, FixedFanInLinear)
    growth = growth_scores(reps, labels, layer.weight, layer.index, layer.bias, loss=loss)
    rows = L // group_size
    for start, stop in ((0, rows), (0, 5), (5, 6), (7, rows)):
        score = growth(start, stop)
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), expected[start:stop], rtol=1e-4, atol=1e-6)
    without = growth_scores(reps, labels, layer.weight, layer.index, None, loss=loss)
    layer.bias.data.zero_()  # type: ignore[union-attr]
    gradient = dense_gradient(oracle, head, reps, labels)
    expected = gradient.abs().view(-1, group_size, D).mean(1)
    torch.testing.assert_close(without(0, rows).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("group_size", [1, 3])
def test_rigl_grows_exactly_the_oracles_inputs(
    oracle: ModuleType, loss: str, group_size: int
) -> None:
    head, labels = make_head(group_size, loss), make_labels()
    reps = torch.randn(B, D)
    head.loss_and_grad(reps, labels)
    assert isinstance(head.layer, FixedFanInLinear)
    gradient = dense_gradient(oracle, head, reps, labels)  # at the weights after the step
    score = gradient.abs().view(-1, group_size, D).mean(1)
    index = head.layer.index.long()
    magnitude = head.layer.weight.double().abs().view(-1, group_size, F).mean(1)
    kept = index.gather(1, magnitude.sort(1).indices[:, 2:])
    expected = picked(score, index, kept, 2)
    config = RewireConfig(method="rigl", fraction=0.4)
    report = head.rewire_(config, seed=0, step=1, reps=reps, labels=labels)
    assert [set(row) for row in head.layer.index.tolist()] == expected
    assert report.pruned == 2 * L // group_size


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("pattern", ["", "3:8"])
@pytest.mark.parametrize("init", ["zero", "uniform"])
def test_layers_of_any_storage_are_rewired(
    oracle: ModuleType, monkeypatch: pytest.MonkeyPatch, weight_dtype: str, pattern: str, init: str
) -> None:
    """RigL at D = 32, F = 12: 4 slots of each row, within its blocks where there are blocks."""
    monkeypatch.setattr(growth_file, "_TILE", 200)  # 3 groups at a time
    torch.manual_seed(4)
    config = HeadConfig(fan_in=12, group_size=2, pattern=pattern, weight_dtype=weight_dtype)  # type: ignore[arg-type]
    head = ClassifierHead.from_config(32, L, config, OptimizerConfig(kind="adamw", lr=0.05))
    reps, labels = torch.randn(B, 32), make_labels()
    head.loss_and_grad(reps, labels)
    layer = head.layer
    assert isinstance(layer, FixedFanInLinear)
    dense = layer.matrix.to_dense().double()
    moment = head.training_state()["weight_m"].clone()
    index = layer.matrix.inputs().long()
    targets = oracle.dense_targets(labels.indptr, labels.indices, L)
    gradients = oracle.loss_and_grads(reps, dense, layer.bias, targets, "bce", 1 / B)
    score = gradients[2].abs().view(-1, 2, 32).mean(1)
    magnitude = dense.abs().view(-1, 2, 32).mean(1)
    rewire = RewireConfig(method="rigl", fraction=1 / 3, init=init)  # type: ignore[arg-type]
    assert head.rewire_(rewire, seed=0, step=1, reps=reps, labels=labels).pruned == 4 * L // 2

    now = layer.matrix.inputs().long()
    after = layer.matrix.to_dense().double()
    new_moment = head.training_state()["weight_m"]
    for row, (old, new) in enumerate(zip(index.tolist(), now.tolist(), strict=True)):
        lost = sorted(old, key=lambda column: (float(magnitude[row, column]), column))[:4]
        expected = set(old) - set(lost)
        for column in lost:
            block = range(column // 8 * 8, column // 8 * 8 + 8) if pattern else range(32)
            free = set(block) - set(old) - expected
            expected.add(max(free, key=lambda free_column: float(score[row, free_column])))
        assert set(new) == expected
        kept = sorted(set(old) & set(new))
        grown = sorted(set(new) - set(old))
        for label in (2 * row, 2 * row + 1):
            assert torch.equal(after[label, kept], dense[label, kept])
            places = [new.index(column) for column in kept]
            was = [old.index(column) for column in kept]
            assert torch.equal(new_moment[label, places], moment[label, was])
            if init == "zero":
                assert not bool(after[label, grown].any())
            else:
                largest = 12**-0.5 * (1 + 2**-4)  # rounded to the dtype
                assert bool((after[label, grown].abs() <= largest).all())
                assert bool(after[label, grown].any())
    layer.matrix.validate()


def test_progress_anneals_the_fraction() -> None:
    pruned = []
    for progress in (0.0, 0.5, 1.0):
        head = make_head()
        config = RewireConfig(method="set", fraction=0.8)
        pruned.append(head.rewire_(config, seed=0, step=1, progress=progress).pruned / L)
    assert pruned == [4, 2, 0]


def test_kept_moments_stay_in_the_layer() -> None:
    head, labels = make_head(), make_labels()
    head.loss_and_grad(torch.randn(B, D), labels)
    before = {name: value.clone() for name, value in head.training_state().items()}
    config = RewireConfig(method="set", fraction=0.6, moments="keep", init="uniform")
    head.rewire_(config, seed=0, step=1)
    assert bool((head.layer.weight != 0).all())
    for name in ("weight_m", "weight_v"):
        after = head.training_state()[name]
        assert not torch.equal(after, before[name])
        assert torch.equal(after.sort(1).values, before[name].sort(1).values)


def test_a_rewiring_needs_a_method_rows_and_a_whole_step() -> None:
    head, labels = make_head(), make_labels()
    reps = torch.randn(B, D)
    rigl = RewireConfig(method="rigl")
    with pytest.raises(ValueError, match="rigl needs the representations and labels"):
        head.rewire_(rigl, seed=0, step=1)
    with pytest.raises(ValueError, match="expected labels of 8 rows to match reps, got 9"):
        head.rewire_(rigl, seed=0, step=1, reps=reps[:8], labels=labels)
    with pytest.raises(ValueError, match='expected "set" or "rigl", got "static"'):
        head.rewire_(RewireConfig(), seed=0, step=1)
    head.loss_and_grad(reps, labels, update=False)
    with pytest.raises(ValueError, match="one half accumulated"):
        head.rewire_(RewireConfig(method="set"), seed=0, step=1)
    assert isinstance(head.layer, FixedFanInLinear)
    with pytest.raises(ValueError, match=r"expected a loss of bce, .* got 'mse'"):
        growth_scores(reps, labels, head.layer.weight, head.layer.index, None, loss="mse")
