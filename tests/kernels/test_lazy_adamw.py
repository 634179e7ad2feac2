"""lazy_adamw_ against torch.optim.AdamW on the rows, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xmc_kernels._reference import lazy_adamw as reference
from xmc_kernels.lazy_adamw import lazy_adamw_

OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def tables(num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights and moments, the second moment positive."""
    shape = (num_rows, dim)
    return [
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        torch.rand(shape, dtype=dtype),
    ]


def truth(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, grad: Tensor, step: int
) -> list[Tensor]:
    """torch.optim.AdamW in float64 on the picked rows, put back."""
    wide = [t.double().clone() for t in (param, exp_avg, exp_avg_sq)]
    picked = [t[rows] for t in wide]
    parameter = torch.nn.Parameter(picked[0].clone())
    parameter.grad = grad.double()
    optimizer = torch.optim.AdamW([parameter], **OPTIONS, foreach=False, fused=False)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": picked[1],
        "exp_avg_sq": picked[2],
    }
    optimizer.step()
    for table, value in zip(wide, (parameter.detach(), picked[1], picked[2]), strict=True):
        table[rows] = value
    return wide


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize(
    ("num_rows", "dim", "count"),
    [(64, 32, 32), (65, 33, 7), (3, 1, 3), (4000, 16, 1500), (5, 8, 0)],
)
def test_steps_the_given_rows_and_no_other(num_rows: int, dim: int, count: int, step: int) -> None:
    state = tables(num_rows, dim)
    rows = torch.randperm(num_rows)[:count].sort().values
    grad = torch.randn(count, dim)
    before = [t.clone() for t in state]
    expected = truth(*state, rows, grad, step)
    lazy_adamw_(*state, rows, grad, **OPTIONS, step=step)
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[rows] = False
    for got, old, value in zip(state, before, expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=2e-6, atol=1e-6)
        assert torch.equal(got[untouched], old[untouched])


@pytest.mark.parametrize("step", [1, 7])
def test_reference_is_the_definition(step: int) -> None:
    state = tables(12, 5, torch.float64)
    rows, grad = torch.tensor([1, 4, 11]), torch.randn(3, 5, dtype=torch.float64)
    expected = truth(*state, rows, grad, step)
    by_op = [t.clone() for t in state]
    reference.lazy_adamw_(*state, rows, grad, 0.03, 0.8, 0.95, 1e-6, 0.1, step)
    lazy_adamw_(*by_op, rows, grad, **OPTIONS, step=step)
    for got, op, value in zip(state, by_op, expected, strict=True):
        torch.testing.assert_close(got, value)
        assert torch.equal(op, got)


def test_is_the_same_for_any_number_of_threads() -> None:
    state = tables(3000, 9)
    rows, grad = torch.arange(0, 3000, 2), torch.randn(1500, 9)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            copies = [t.clone() for t in state]
            lazy_adamw_(*copies, rows, grad, **OPTIONS, step=3)
            results.append(copies)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_steps_a_strided_table() -> None:
    state = tables(10, 6)
    strided = [t.t().contiguous().t() for t in state]
    rows, grad = torch.tensor([2, 3]), torch.randn(2, 6)
    lazy_adamw_(*state, rows, grad, **OPTIONS, step=1)
    lazy_adamw_(*strided, rows, grad, **OPTIONS, step=1)
    for a, b in zip(state, strided, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    rows, grad = torch.tensor([2, 3]), torch.randn(2, 6)
    arguments = (*tables(10, 6), rows, grad, 0.03, 0.8, 0.95, 1e-6, 0.1, 2)
    torch.library.opcheck(torch.ops.xmc.lazy_adamw_.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"param": torch.zeros(4)}, ValueError, r"expected param \[N, D\], got \[4\]"),
        ({"exp_avg": torch.zeros(4, 3)}, ValueError, r"exp_avg torch.float32 \[4, 2\].*\[4, 3\]"),
        ({"exp_avg_sq": torch.zeros(4, 2).double()}, ValueError, "exp_avg_sq.*got torch.float64"),
        ({"rows": torch.tensor([0, 1]).int()}, TypeError, r"rows \[R\] int64, got torch.int32"),
        ({"rows": torch.tensor([1, 1])}, ValueError, "expected sorted, distinct rows"),
        ({"rows": torch.tensor([2, 1])}, ValueError, "expected sorted, distinct rows"),
        ({"rows": torch.tensor([1, 4])}, ValueError, r"expected rows in \[0, 4\), got 1 to 4"),
        ({"rows": torch.tensor([-1, 3])}, ValueError, r"expected rows in \[0, 4\), got -1 to 3"),
        ({"grad": torch.zeros(2, 3)}, ValueError, r"grad torch.float32 \[2, 2\].*\[2, 3\]"),
        ({"step": 0}, ValueError, "expected step of at least 1, got 0"),
    ],
)
def test_refuses_what_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {
        "param": torch.zeros(4, 2),
        "exp_avg": torch.zeros(4, 2),
        "exp_avg_sq": torch.zeros(4, 2),
        "rows": torch.tensor([0, 3]),
        "grad": torch.zeros(2, 2),
        "step": 1,
    }
    lazy_adamw_(**good, **OPTIONS)
    with pytest.raises(error, match=message):
        lazy_adamw_(**(good | change), **OPTIONS)
