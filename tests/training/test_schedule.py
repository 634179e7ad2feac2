from __future__ import annotations

import math

import pytest

from xmc.training.schedule import lr_factor


def test_warmup_rises_linearly_to_the_peak() -> None:
    factors = [lr_factor(s, total=1000, warmup=4, kind="cosine") for s in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_follows_its_formula_and_ends_near_zero() -> None:
    assert lr_factor(550, total=1000, warmup=100, kind="cosine") == pytest.approx(0.5)
    expected = 0.5 * (1 + math.cos(math.pi * 899 / 900))
    assert lr_factor(999, total=1000, warmup=100, kind="cosine") == pytest.approx(expected)


def test_linear_and_constant() -> None:
    assert lr_factor(325, total=1000, warmup=100, kind="linear") == pytest.approx(0.75)
    assert lr_factor(999, total=1000, warmup=100, kind="constant") == 1.0


def test_a_long_warmup_is_cut_in_a_short_training() -> None:
    """A recipe's warm-up of thousands of steps must leave a small data set time to train."""
    assert lr_factor(10, total=100, warmup=5000, kind="constant") == 1.0
