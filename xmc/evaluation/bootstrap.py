"""Confidence intervals of ratios of sums, by a bootstrap that reads the rows once."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_ROWS = 512  # rows weighted at a time: 4 MB of weights at 1000 replicates


class PoissonBootstrap:
    """Sums of M columns under resampling of the rows, R replicates at a time.

    Each row enters each replicate Poisson(1) times, the limit of drawing N of N rows with
    replacement; so nothing but the [R, M] sums is kept. The weights follow the order of the
    rows, not how they are cut into calls: the same seed gives the same intervals.
    """

    def __init__(self, num_replicates: int, seed: int) -> None:
        self.num_replicates = num_replicates
        self.seed = seed
        self._rng = np.random.default_rng(seed)
        self._sums: Array | None = None  # [R, M]

    def add(self, values: Array) -> None:
        """Add rows, [B, M]."""
        if self._sums is None:
            self._sums = np.zeros((self.num_replicates, values.shape[1]))
        for start in range(0, len(values), _ROWS):
            block = values[start : start + _ROWS]
            self._sums += self._weights(len(block)).T @ block

    def interval(self, numerator: int, denominator: int, level: float) -> tuple[float, float]:
        """Percentile interval of sum(column numerator) / sum(column denominator).

        Replicates that drew no denominator are left out; (nan, nan) if none is left.
        """
        if self._sums is None:
            return math.nan, math.nan
        below = self._sums[:, denominator]
        ratios = self._sums[below > 0, numerator] / below[below > 0]
        if not len(ratios):
            return math.nan, math.nan
        low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def _weights(self, num_rows: int) -> Array:
        """Poisson(1) counts, [num_rows, R], row by row from the generator's stream."""
        # Two 16-bit draws a word: each row takes whole words, wherever a call begins.
        words = self._rng.integers(
            0, 2**32, size=(num_rows, (self.num_replicates + 1) // 2), dtype=np.uint32
        )
        return _POISSON[words.view(np.uint16)[:, : self.num_replicates]]


def _poisson_table() -> Array:
    """Poisson(1) quantiles at 65,536 levels: ten times faster than a sampler.

    The error of each probability is at most 2^-17, far below the noise of 1000 replicates.
    """
    levels = (np.arange(2**16) + 0.5) / 2**16
    cumulative = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(12)])
    return np.searchsorted(cumulative, levels).astype(np.float64)


_POISSON = _poisson_table()
