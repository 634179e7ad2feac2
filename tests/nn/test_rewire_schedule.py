from __future__ import annotations

import math

import pytest

from xmc.config import ConfigError, RewireConfig, from_dict
from xmc.nn.rewire_schedule import is_due, prune_amount, rewire_progress


def test_due_every_interval_until_the_end() -> None:
    config = RewireConfig(method="set", interval=30, end=0.5)
    due = [step for step in range(301) if is_due(config, step, 300)]
    assert due == [30, 60, 90, 120]  # 150 is the end itself
    static = RewireConfig(method="static", interval=30, end=0.5)
    assert not any(is_due(static, step, 300) for step in range(301))


def test_an_end_of_zero_never_rewires() -> None:
    config = RewireConfig(method="rigl", interval=1, end=0.0)
    assert not any(is_due(config, step, 10) for step in range(11))
    assert rewire_progress(config, 5, 10) == 1.0


def test_progress_is_the_share_of_the_rewiring_period() -> None:
    config = RewireConfig(method="set", end=0.5)
    assert [rewire_progress(config, step, 200) for step in (0, 25, 50, 100, 150)] == [
        *(0.0, 0.25, 0.5, 1.0, 1.0)
    ]


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_fraction_follows_the_published_formula(progress: float) -> None:
    config = RewireConfig(method="set", fraction=0.3)
    expected = 0.3 / 2 * (1 + math.cos(math.pi * progress))
    assert prune_amount(config, progress) == pytest.approx(expected, abs=1e-15)


def test_the_threshold_falls_to_its_last_value_and_never_rises() -> None:
    config = RewireConfig(method="set", prune="threshold", threshold=0.05)
    amounts = [prune_amount(config, step / 100) for step in range(101)]
    assert amounts[0] == pytest.approx(0.05)
    assert amounts[50] == pytest.approx((0.05 + 1e-4) / 2)
    assert amounts[-1] == pytest.approx(1e-4)
    assert amounts == sorted(amounts, reverse=True)
    small = RewireConfig(method="set", prune="threshold", threshold=1e-5)
    assert [prune_amount(small, progress) for progress in (0.0, 0.5, 1.0)] == [1e-5] * 3


@pytest.mark.parametrize(("prune", "amount"), [("fraction", 0.2), ("threshold", 0.03)])
def test_constant_amounts_stay(prune: str, amount: float) -> None:
    config = RewireConfig(
        method="set",
        prune=prune,  # type: ignore[arg-type]
        fraction=0.2,
        threshold=0.03,
        anneal="constant",
    )
    assert [prune_amount(config, progress) for progress in (0.0, 0.7, 1.0)] == [amount] * 3


def test_recipes_of_before_still_read() -> None:
    old = {"method": "set", "fraction": 0.3, "interval": 100, "end": 0.66}
    read = from_dict({"rewire": old}, source="old").rewire
    assert {name: getattr(read, name) for name in old} == old


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "riggl"}, "rewire.method: input should be 'static', 'set' or 'rigl'"),
        ({"prune": "all"}, "rewire.prune: input should be 'fraction' or 'threshold', got 'all'"),
        ({"fraction": 1.0}, "rewire.fraction: input should be less than 1, got 1.0"),
        ({"threshold": -0.1}, "rewire.threshold: input should be greater than or equal to 0"),
        ({"anneal": "linear"}, "rewire.anneal: input should be 'cosine' or 'constant'"),
        ({"interval": 0}, "rewire.interval: input should be greater than 0, got 0"),
        ({"init": 0}, "rewire.init: input should be 'zero' or 'uniform', got 0"),
        ({"moments": "drop"}, "rewire.moments: input should be 'reset' or 'keep', got 'drop'"),
    ],
)
def test_options_are_read_strictly(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict({"rewire": options}, source="recipe")
    assert str(caught.value).startswith(f"recipe: {message}")
