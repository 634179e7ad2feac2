"""Triton kernels in the interpreter, or compiled where there is a GPU.

The interpreter takes some milliseconds per program: shapes here stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def naive_and_truth(oracle: ModuleType) -> Callable[..., list[tuple[Tensor, Tensor, Tensor]]]:
    """`naive_and_truth(x, dense, bias, grad, index)`: (out, d_x, d_weight) of the dense layer.

    In float32 and in float64, on the CPU; d_weight [L, F] at the index.
    """

    def compute(
        x: Tensor, dense: Tensor, bias: Tensor, grad: Tensor, index: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        results = []
        for dtype in (torch.float32, torch.float64):
            a, w, b = (t.detach().cpu().to(dtype).requires_grad_() for t in (x, dense, bias))
            out = a @ w.T + b
            d_x, d_dense = torch.autograd.grad(out, (a, w), grad.cpu().to(dtype))
            results.append((out.detach(), d_x, oracle.at_index(d_dense, index.cpu())))
        return results

    return compute


@pytest.fixture
def close() -> Callable[[Tensor, Tensor, Tensor, torch.dtype], None]:
    """`close(ours, naive, truth, dtype)`: our error is like that of naive float32 code.

    As for the CPU kernels, and twice the rounding of what is stored in `dtype` on top (the
    interpreter truncates to bfloat16, where a GPU rounds).
    """

    def check(ours: Tensor, naive: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
        assert ours.shape == truth.shape
        ours = ours.detach().double().cpu()
        margin = 8 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        rounding = unit * truth.abs().max().item()
        error = (ours - truth).abs().max().item()
        limit = 4 * (naive.double() - truth).abs().max().item() + margin + rounding
        assert error <= limit, (error, limit)

    return check
