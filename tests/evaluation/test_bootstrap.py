import math

import numpy as np
import pytest

from xmc.evaluation.bootstrap import _POISSON, PoissonBootstrap


def bootstrap_of(values, replicates=1000, seed=0):
    bootstrap = PoissonBootstrap(replicates, seed)
    bootstrap.add(values)
    return bootstrap


def test_weights_are_poisson_of_mean_one():
    assert _POISSON.mean() == pytest.approx(1, abs=1e-3)
    assert _POISSON.var() == pytest.approx(1, abs=1e-3)
    for count in range(5):
        share = (count == _POISSON).mean()
        assert share == pytest.approx(math.exp(-1) / math.factorial(count), abs=2**-16)


def test_weights_of_rows_and_replicates_are_independent():
    weights = PoissonBootstrap(200, 1)._weights(2000) - 1.0
    between_rows = (weights[1:] * weights[:-1]).mean()
    between_replicates = (weights[:, 1:] * weights[:, :-1]).mean()
    # The standard error of a mean of 400,000 products of variance 1 is 0.0016.
    assert abs(between_rows) < 0.007
    assert abs(between_replicates) < 0.007


def test_interval_of_a_mean_is_that_of_the_normal_limit():
    rng = np.random.default_rng(0)
    values = np.stack([rng.random(4000) < 0.3, np.ones(4000)], axis=1).astype(float)
    mean = values[:, 0].mean()
    half = 1.96 * math.sqrt(mean * (1 - mean) / 4000)
    low, high = bootstrap_of(values, 4000).interval(0, 1, 0.95)
    # A 2.5% quantile of 4000 replicates is known to about 4% of the half width.
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    # A ratio of dependent sums, E[xy]/E[y] = 0.5 * 0.4 / 0.5, as in the propensity metrics.
    rng = np.random.default_rng(1)
    covered, trials = 0, 400
    for trial in range(trials):
        below = rng.integers(0, 2, 300) * rng.random(300) * 2
        values = np.stack([below * (rng.random(300) < 0.4), below], axis=1)
        low, high = bootstrap_of(values, 300, seed=trial).interval(0, 1, 0.95)
        covered += low <= 0.4 <= high
    # 0.95 * 400 = 380, standard deviation 4.4; percentile intervals run slightly short.
    assert 363 <= covered <= 394


def test_the_seed_decides():
    values = np.random.default_rng(2).random((50, 2))
    first = bootstrap_of(values, seed=3).interval(0, 1, 0.95)
    assert bootstrap_of(values, seed=3).interval(0, 1, 0.95) == first
    assert bootstrap_of(values, seed=4).interval(0, 1, 0.95) != first


def test_a_constant_ratio_has_no_width_and_an_empty_one_no_interval():
    values = np.stack([np.full(10, 0.5), np.ones(10), np.zeros(10)], axis=1)
    bootstrap = bootstrap_of(values)
    assert bootstrap.interval(0, 1, 0.95) == (0.5, 0.5)
    assert all(math.isnan(end) for end in bootstrap.interval(0, 2, 0.95))
    assert all(math.isnan(end) for end in PoissonBootstrap(10, 0).interval(0, 1, 0.95))
