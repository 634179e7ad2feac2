"""LazyAdamW against torch.optim.AdamW, and its laziness row by row in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from xmc.nn.lazy import LazyAdamW, coalesced

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}


def sparse(rows: list[int], num_rows: int, dim: int) -> Tensor:
    """A gradient with random values in the given rows, which may repeat."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64),
        torch.randn(len(rows), dim),
        (num_rows, dim),
        check_invariants=True,
    )


def test_equals_adamw_on_dense_gradients() -> None:
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (3,), (2, 3, 4))]
    theirs = copy.deepcopy(ours)
    groups = [[{"params": p[:1]}, {"params": p[1:], "weight_decay": 0.0}] for p in (ours, theirs)]
    lazy, adamw = LazyAdamW(groups[0], **OPTIONS), torch.optim.AdamW(groups[1], **OPTIONS)
    for step in range(20):
        for optimizer in (lazy, adamw):
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        lazy.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equals_adamw_on_a_sparse_gradient_of_every_row() -> None:
    ours, theirs = (nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    lazy, adamw = LazyAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for _ in range(20):
        ours.grad = sparse([3, 0, 1, 5, 2, 4, 3], 6, 5)
        theirs.grad = ours.grad.to_dense()
        lazy.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_without_a_gradient_stand_still() -> None:
    """Moments and decay of a row advance with its gradients, bias correction with the steps."""
    parameter = nn.Parameter(torch.randn(4, 3))
    truth = parameter.detach().double().clone()
    first, second = torch.zeros_like(truth), torch.zeros_like(truth)
    optimizer = LazyAdamW([parameter], **OPTIONS)
    lr, (beta1, beta2), decay = OPTIONS["lr"], OPTIONS["betas"], OPTIONS["weight_decay"]
    for step, rows in enumerate(([0, 2], [2], [1, 2, 0], [], [1]), start=1):
        parameter.grad = sparse(rows, 4, 3)
        for row in rows:
            grad = parameter.grad.to_dense()[row].double()
            first[row] = beta1 * first[row] + (1 - beta1) * grad
            second[row] = beta2 * second[row] + (1 - beta2) * grad**2
            mean, scale = first[row] / (1 - beta1**step), second[row] / (1 - beta2**step)
            truth[row] -= lr * decay * truth[row]
            truth[row] -= lr * mean / (scale.sqrt() + OPTIONS["eps"])
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = (nn.Parameter(torch.ones(6, 5, dtype=dtype)) for _ in range(2))
    lazy, adamw = LazyAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for _ in range(3):
        ours.grad = sparse(list(range(6)), 6, 5).to(dtype)
        theirs.grad = ours.grad.to_dense()
        lazy.step()
        adamw.step()
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_state_round_trips_exactly() -> None:
    """A saved and loaded optimizer goes on with the same bits."""

    def advance(parameters: list[nn.Parameter], optimizer: LazyAdamW, seed: int) -> None:
        torch.manual_seed(seed)
        parameters[0].grad = sparse(torch.randperm(30)[:8].tolist(), 30, 6)
        parameters[1].grad = torch.randn(6)
        optimizer.step()

    ours = [nn.Parameter(torch.randn(30, 6)), nn.Parameter(torch.randn(6))]
    optimizer = LazyAdamW(ours, **OPTIONS)
    for seed in range(3):
        advance(ours, optimizer, seed)
    other = copy.deepcopy(ours)
    resumed = LazyAdamW(other, lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert str(resumed.state_dict()) == str(optimizer.state_dict())
    for seed in range(3, 6):
        advance(ours, optimizer, seed)
        advance(other, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_state_has_the_names_of_adamw() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(3, 2)
    optimizers = LazyAdamW(parameters[:1]), torch.optim.AdamW(parameters[1:])
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict()["state"][0] for optimizer in optimizers]
    assert set(states[0]) == set(states[1])
    assert float(states[0]["step"]) == float(states[1]["step"]) == 1


def test_sparse_and_dense_gradients_may_alternate() -> None:
    ours, theirs = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    lazy, adamw = LazyAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for step in range(6):
        gradient = sparse([0, 1, 2, 3], 4, 2)
        ours.grad = gradient if step % 2 else gradient.to_dense()
        theirs.grad = gradient.to_dense()
        lazy.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_converges_on_a_quadratic() -> None:
    """Each step sees half of the rows; all reach the minimum."""
    target = torch.randn(10, 3)
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = LazyAdamW(table.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 600))
        rows = torch.randperm(10)[:5]
        optimizer.zero_grad()
        (table(rows) - target[rows]).square().sum().backward()
        optimizer.step()
    assert float((table.weight - target).detach().abs().max()) < 1e-2


def test_closure_and_missing_gradients() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LazyAdamW([used, unused], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2.0
    assert bool((used < 1).all())
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state


def test_coalesced_sorts_only_where_it_must() -> None:
    in_order = sparse([1, 4, 7], 9, 2)
    assert coalesced(in_order).values().data_ptr() == in_order._values().data_ptr()
    repeated = sparse([4, 1, 4], 9, 2)
    dense = repeated.to_dense()
    result = coalesced(repeated)
    assert result.indices()[0].tolist() == [1, 4]
    torch.testing.assert_close(result.to_dense(), dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "expected lr of at least 0, got -1.0"),
        ({"eps": float("nan")}, "expected eps of at least 0, got nan"),
        ({"weight_decay": -0.1}, "expected weight_decay of at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"expected betas in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_refuses_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LazyAdamW([nn.Parameter(torch.ones(2))], **options)


def test_refuses_gradients_that_are_sparse_in_columns() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.eye(2, 3).to_sparse()
    with pytest.raises(ValueError, match="one sparse dimension, the rows, got 2 of 2"):
        LazyAdamW([parameter]).step()
