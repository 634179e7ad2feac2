"""The random start of a sparse pattern."""

from __future__ import annotations

import math

import pytest
import torch

from xmc.nn import pattern
from xmc_kernels.checks import validate_index


def drawn(num_rows: int, in_features: int, fan_in: int) -> torch.Tensor:
    index = torch.zeros(num_rows, fan_in, dtype=pattern.index_dtype(in_features))
    return pattern.draw_index_(index, in_features).to(torch.int64)


@pytest.mark.parametrize(
    ("in_features", "fan_in"),
    [(1, 1), (2, 1), (7, 7), (7, 6), (768, 32), (64, 40), (65_536, 3), (100_000, 5)],
)
def test_rows_are_sorted_distinct_and_in_range(in_features: int, fan_in: int) -> None:
    index = drawn(101, in_features, fan_in)
    validate_index(index.to(pattern.index_dtype(in_features)), in_features)


@pytest.mark.parametrize("tile", [1, 7, 100, 1 << 22])
def test_tiles_cover_every_row(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "_TILE", tile)
    validate_index(drawn(53, 9, 3).int(), 9)
    validate_index(drawn(53, 9, 8).int(), 9)


@pytest.mark.parametrize("fan_in", [2, 3])  # below and above half of the inputs
def test_every_subset_is_equally_likely(fan_in: int) -> None:
    rows, in_features = 60_000, 5
    index = drawn(rows, in_features, fan_in)
    code = (1 << index).sum(1)
    counts = torch.bincount(code, minlength=1 << in_features)
    counts = counts[counts > 0].double()
    subsets = math.comb(in_features, fan_in)
    assert len(counts) == subsets
    expected = rows / subsets
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 33.7  # 9 degrees of freedom, p = 1e-4
