"""The driver for a bare layer: any optimizer, exact resume, RigL by hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmc.config import RewireConfig
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewirer import Rewirer

D, L, F = 20, 24, 6

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, centered=True, momentum=0.5),
}


class Run:
    """A small training, restartable at any step; batch t is always the same."""

    def __init__(
        self,
        config: RewireConfig,
        optimizer: str = "adamw",
        *,
        group_size: int = 1,
        passes: int = 1,
        total_steps: int = 20,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(2)
        self.first = nn.Linear(7, D, dtype=dtype)
        self.layer = FixedFanInLinear(D, L, F, group_size=group_size, dtype=dtype)
        self.parameters = [*self.first.parameters(), *self.layer.parameters()]
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.rewirer = Rewirer(
            self.layer, self.optimizer, config, total_steps=total_steps, seed=5, **options
        )
        self.passes = passes

    def backward(self, step: int, rows: slice = slice(None)) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 7, generator=generator)[rows].to(self.layer.weight.dtype)
        y = (torch.rand(12, L, generator=generator)[rows] < 0.2).to(x.dtype)
        loss = nn.functional.binary_cross_entropy_with_logits
        total = torch.zeros((), dtype=x.dtype)
        for part, target in zip(x.chunk(self.passes), y.chunk(self.passes), strict=True):
            value = loss(self.layer(self.first(part).relu()), target, reduction="sum") / 12
            value.backward()
            total += value.detach()
        return total

    def step(self, step: int) -> Any:
        self.optimizer.zero_grad()
        self.backward(step)
        self.optimizer.step()
        return self.rewirer.step()

    def state(self) -> dict[str, Any]:
        parts = (self.first, self.layer, self.optimizer, self.rewirer)
        return {str(i): copy.deepcopy(part.state_dict()) for i, part in enumerate(parts)}

    def load(self, state: dict[str, Any]) -> None:
        for i, part in enumerate((self.first, self.layer, self.optimizer, self.rewirer)):
            part.load_state_dict(state[str(i)])

    def moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.layer.weight]
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == (L, F)}


def by_input(layer: FixedFanInLinear, values: Tensor) -> Tensor:
    """[L, D], NaN where a label reads nothing."""
    index = layer.index.long().repeat_interleave(layer.group_size, 0)
    return torch.full((L, D), torch.nan, dtype=values.dtype).scatter(1, index, values.detach())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_state_of_any_optimizer_moves_with_its_weight(optimizer: str, moments: str) -> None:
    config = RewireConfig(method="set", interval=3, fraction=0.34, end=1.0, moments=moments)  # type: ignore[arg-type]
    run = Run(config, optimizer)
    for step in (1, 2):
        assert run.step(step) is None
    run.optimizer.zero_grad()
    run.backward(3)
    run.optimizer.step()
    tensors = {"weight": run.layer.weight, **run.moments()}
    before = {name: by_input(run.layer, value) for name, value in tensors.items()}
    left = {name: value.detach().clone() for name, value in tensors.items()}
    scalars = {
        name: copy.deepcopy(value)
        for name, value in run.optimizer.state[run.layer.weight].items()
        if name not in tensors
    }
    report = run.rewirer.step()
    assert report is not None
    assert report.pruned == 2 * L
    for name, value in {"weight": run.layer.weight, **run.moments()}.items():
        after = by_input(run.layer, value)
        survived = ~after.isnan() & ~before[name].isnan()
        assert survived.sum(1).eq(F - 2).all()
        assert torch.equal(after[survived], before[name][survived])
        fresh = after[~after.isnan() & ~survived]
        if name == "weight" or moments == "reset":
            assert not bool(fresh.any())
        else:
            assert torch.equal(value.sort(1).values, left[name].sort(1).values)
    for name, value in scalars.items():
        assert run.optimizer.state[run.layer.weight][name] == value
    assert run.layer.weight.requires_grad
    silent = run.layer.weight == 0
    run.step(4)
    gradient = run.layer.weight.grad
    assert gradient is not None
    learnt = run.layer.weight[silent & (gradient != 0)]  # the others are ReLUs that stay at 0
    assert len(learnt) > L
    assert bool((learnt != 0).all())


def expected_moments() -> dict[str, set[str]]:
    return {
        **{"adamw": {"exp_avg", "exp_avg_sq"}, "adagrad": {"sum"}, "sgd": set()},
        **{"amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}},
        **{"momentum": {"momentum_buffer"}},
        **{"rmsprop": {"square_avg", "grad_avg", "momentum_buffer"}},
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_test_above_sees_every_moment(optimizer: str) -> None:
    run = Run(RewireConfig(), optimizer)
    run.step(1)
    assert run.moments().keys() == expected_moments()[optimizer.split(" ")[0]]


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("stop", [3, 4, 5, 11])
def test_a_resumed_training_equals_an_uninterrupted_one(method: str, stop: int) -> None:
    config = RewireConfig(
        method=method,  # type: ignore[arg-type]
        interval=4,
        fraction=0.5,
        end=0.9,
        init="uniform",
    )
    whole, parts = Run(config, passes=2), Run(config, passes=2)
    reports = [whole.step(step) for step in range(1, 21)]
    again = [parts.step(step) for step in range(1, stop + 1)]
    state = parts.state()
    resumed = Run(config, passes=2)
    resumed.layer.reset_parameters()  # another pattern than the one it started from
    resumed.load(state)
    again += [resumed.step(step) for step in range(stop + 1, 21)]
    for one, other in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.layer.index, resumed.layer.index)
    done = [step for step, report in enumerate(reports, 1) if report is not None]
    assert done == [4, 8, 12, 16]
    for one, other in zip(reports, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.to_dict() == other.to_dict()


def dense_gradient(oracle: ModuleType, run: Run, step: int) -> Tensor:
    """|dL/dW| [L, D] in float64 at the weights of now, by autograd through a dense layer."""
    dense = oracle.dense_weight(run.layer.weight, run.layer.index, D).requires_grad_()
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 7, generator=generator).double()
    y = (torch.rand(12, L, generator=generator) < 0.2).double()
    reps = x @ run.first.weight.double().T + run.first.bias.double()
    bias = run.layer.bias
    assert bias is not None
    scores = reps.relu() @ dense.T + bias.double()
    loss = nn.functional.binary_cross_entropy_with_logits(scores, y, reduction="sum") / 12
    (gradient,) = torch.autograd.grad(loss, dense)
    return gradient.abs().detach()


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("passes", [1, 3])
def test_rigl_grows_exactly_the_oracles_inputs(
    oracle: ModuleType, group_size: int, passes: int
) -> None:
    """Also when the step's gradient comes from several passes."""
    config = RewireConfig(method="rigl", interval=2, fraction=0.34, anneal="constant")
    run = Run(config, "sgd", group_size=group_size, passes=passes, dtype=torch.float64)
    run.step(1)
    run.optimizer.zero_grad()
    score = dense_gradient(oracle, run, 2).view(-1, group_size, D).mean(1)
    run.backward(2)
    run.optimizer.step()
    magnitude = run.layer.weight.detach().abs().view(-1, group_size, F).mean(1)
    expected = []
    for row, inputs in enumerate(run.layer.index.tolist()):
        order = sorted(range(F), key=lambda slot: float(magnitude[row, slot]))
        free = sorted(set(range(D)) - set(inputs), key=lambda column: -float(score[row, column]))
        expected.append({inputs[slot] for slot in order[2:]} | set(free[:2]))
    assert run.rewirer.step() is not None
    assert [set(row) for row in run.layer.index.tolist()] == expected


def test_only_due_steps_keep_anything() -> None:
    run = Run(RewireConfig(method="rigl", interval=3, end=0.5), total_steps=10)
    kept = []
    for step in range(1, 11):
        run.optimizer.zero_grad()
        run.backward(step)
        kept.append(len(run.rewirer._passes))
        run.optimizer.step()
        run.rewirer.step()
        assert not run.rewirer._passes
    assert kept == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert not run.layer._forward_hooks


def test_passes_without_gradient_are_not_counted(oracle: ModuleType) -> None:
    """Neither an evaluation between two steps nor a call by keyword changes the pattern."""
    config = RewireConfig(method="rigl", interval=1, fraction=0.5)
    one, other = Run(config), Run(config)
    with torch.no_grad():
        other.layer(torch.randn(5, D))
    other.layer(torch.randn(5, D))  # never goes backward
    plain = other.layer.forward
    other.layer.forward = lambda x: plain(x=x)  # type: ignore[method-assign]
    one.step(1)
    other.step(1)
    assert torch.equal(one.layer.index, other.layer.index)
    x = torch.randn(3, 2, D)
    other.layer(x=x).sum().backward()
    kept, gradient = other.rewirer._passes[0]
    assert torch.equal(kept, x.view(6, D))
    assert torch.equal(gradient, torch.ones(6, L))


def test_reduced_gradients_are_those_of_all_processes() -> None:
    """Two processes with half of the rows each, played one after the other."""
    config = RewireConfig(method="rigl", interval=1, fraction=0.34, anneal="constant")
    together = Run(config, "sgd", dtype=torch.float64)
    together.backward(1)
    halves = [slice(0, 6), slice(6, 12)]
    alone = [Run(config, "sgd", dtype=torch.float64) for _ in halves]
    for run, rows in zip(alone, halves, strict=True):
        run.backward(1, rows)
    other_gradient = sum(g.T @ x for x, g in alone[1].rewirer._passes)
    alone[0].rewirer._reduce = lambda tile: tile.add_(other_gradient)  # all L fit in a tile
    together.rewirer.step()
    alone[0].rewirer.step()
    assert torch.equal(alone[0].layer.index, together.layer.index)


def test_close_stops_watching() -> None:
    run = Run(RewireConfig(method="rigl", interval=1))
    assert run.layer._forward_hooks
    run.rewirer.close()
    assert not run.layer._forward_hooks


def test_errors_name_the_rule() -> None:
    layer = FixedFanInLinear(D, L, F)
    other = torch.optim.SGD([layer.bias], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer that holds layer\.weight"):
        Rewirer(layer, other, RewireConfig(method="set"), total_steps=5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="total_steps of at least 1, got 0"):
        Rewirer(layer, optimizer, RewireConfig(method="set"), total_steps=0)
    rewirer = Rewirer(layer, optimizer, RewireConfig(method="rigl", interval=1), total_steps=5)
    with pytest.raises(RuntimeError, match=r"expected a backward pass .* before step 1"):
        rewirer.step()
    assert rewirer.steps == 0
    state = rewirer.state_dict()
    with pytest.raises(ValueError, match="expected a state with seed = 0, got 3"):
        rewirer.load_state_dict(state | {"seed": 3})
    with pytest.raises(ValueError, match=r"slot_age of shape \[24, 6\] .* got \[2, 6\]"):
        rewirer.load_state_dict(state | {"slot_age": torch.zeros(2, 6)})
