"""Layers and batches for the tests of the operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from xmc_kernels.layer import Layer
from xmc_kernels.packing import pack_index


@dataclass(frozen=True)
class Problem:
    """A layer and a batch; row 0 has every label as positive, the last row has none."""

    x: Tensor  # [B, D]
    weight: Tensor  # [L, F]
    index: Tensor  # [L/G, F]
    bias: Tensor  # [L]
    indptr: Tensor  # [B+1]
    indices: Tensor  # [nnz]

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.index, self.bias

    @property
    def as_layer(self) -> Layer:
        return Layer(self.weight, self.index, self.bias)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.layer, self.indptr, self.indices

    def to(self, dtype: torch.dtype) -> Problem:
        """With activations and layer in another dtype."""
        return replace(
            self, x=self.x.to(dtype), weight=self.weight.to(dtype), bias=self.bias.to(dtype)
        )

    def rows(self, start: int, stop: int) -> Problem:
        """A part of the batch."""
        indptr = self.indptr[start : stop + 1]
        indices = self.indices[int(indptr[0]) : int(indptr[-1])]
        return replace(self, x=self.x[start:stop], indptr=indptr - indptr[0], indices=indices)

    def exact(self) -> Problem:
        """In small whole numbers: scores are exact in any precision and tie often."""
        x, weight, bias = self.x.round(), (2 * self.weight).round(), self.bias.round()
        return replace(self, x=x, weight=weight, bias=bias)

    def positives(self) -> list[list[int]]:
        """The labels of each row."""
        return [self.indices[a:b].tolist() for a, b in pairwise(self.indptr.tolist())]

    def copy(self) -> Problem:
        """With a layer of its own, to be trained."""
        return replace(self, weight=self.weight.clone(), bias=self.bias.clone())


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """`problem(B, D, L, F, group=1)`: random, with float32 numbers."""

    def make(B: int, D: int, L: int, F: int, group: int = 1, density: float = 0.1) -> Problem:
        g = torch.Generator().manual_seed(1000 * B + L)
        order = torch.rand(L // group, D, generator=g).argsort(1)[:, :F]
        index = order.sort(1).values.to(torch.uint16 if D <= 65536 else torch.int32)
        positive = torch.rand(B, L, generator=g) < density
        positive[0] = True
        if B > 1:
            positive[-1] = False
        indptr = torch.zeros(B + 1, dtype=torch.int64)
        indptr[1:] = positive.sum(1).cumsum(0)
        return Problem(
            x=torch.randn(B, D, generator=g),
            weight=torch.randn(L, F, generator=g) / F**0.5,
            index=index.contiguous(),
            bias=torch.randn(L, generator=g),
            indptr=indptr,
            indices=positive.nonzero()[:, 1].int(),
        )

    return make


@pytest.fixture
def patterned(problem) -> Callable[..., tuple[Problem, Tensor]]:
    """`patterned(B, D, L, (n, m), group=1)`: a problem with a packed index, and the plain index."""

    def make(
        B: int, D: int, L: int, pattern: tuple[int, int], group: int = 1
    ) -> tuple[Problem, Tensor]:
        n, m = pattern
        g = torch.Generator().manual_seed(D + L + n)
        local = torch.rand(L // group, D // m, m, generator=g).argsort(2)[:, :, :n].sort(2).values
        index = (local + torch.arange(0, D, m)[:, None]).flatten(1).int()
        plain = problem(B, D, L, n * D // m, group)
        return replace(plain, index=pack_index(index, pattern)), index

    return make


@pytest.fixture
def as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """`as_accurate(ours, naive, truth)`: our error is like that of the naive code.

    Root mean square: at most 1.5 times; largest: at most 4 times (the largest of many rounding
    errors is a matter of luck). The margin is four float32 roundings of the largest number.
    """

    def check(ours: Tensor, naive: Tensor, truth: Tensor) -> None:
        assert ours.shape == truth.shape
        margin = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        errors = [t.detach().double() - truth for t in (ours, naive)]
        for limit, size in (
            (1.5, lambda e: e.square().mean().sqrt()),
            (4, lambda e: e.abs().max()),
        ):
            of_ours, of_naive = (size(error).item() for error in errors)
            assert of_ours <= limit * of_naive + margin, (of_ours, of_naive, margin)

    return check


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch, and so the kernels, on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
