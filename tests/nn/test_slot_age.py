"""Ages of slots against a record kept input by input."""

from __future__ import annotations

import math

import pytest

from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire import rewire_
from xmc.nn.slot_age import SlotAges


@pytest.mark.parametrize("max_rows", [4096, 7])
@pytest.mark.parametrize("group_size", [1, 2])
def test_ages_follow_each_input(max_rows: int, group_size: int) -> None:
    layer = FixedFanInLinear(20, 40 * group_size, 6, group_size=group_size)
    rows = [row * 40 // 7 for row in range(7)] if max_rows == 7 else list(range(40))
    ages = SlotAges(40, 6, max_rows=max_rows)
    truth = [dict.fromkeys(layer.index[row].tolist(), 0) for row in rows]
    original = [set(row) for row in truth]
    for step in range(1, 9):
        report = rewire_(
            layer.weight,
            layer.index,
            20,
            prune="threshold",
            amount=0.1,
            seed=3,
            step=step,
            init="uniform",  # so that there is something to prune the next time
            ages=ages,
            tile_slots=13 * 6 * group_size,
        )
        for row, known, first in zip(rows, truth, original, strict=True):
            now = layer.index[row].tolist()
            grown = {column: known.get(column, -1) + 1 for column in now}
            first.intersection_update(grown)
            known.clear()
            known.update(grown)
        values = sorted(age for known in truth for age in known.values())
        assert ages.age.flatten().sort().values.tolist() == values
        assert report.ages is not None
        assert report.ages.mean == pytest.approx(sum(values) / len(values))
        assert report.ages.survival == sum(map(len, original)) / len(values)
        for share, quantile in ((0.1, report.ages.p10), (0.5, report.ages.p50)):
            assert quantile == values[math.ceil(share * len(values) - 1e-9) - 1]
        assert report.ages.p90 == values[math.ceil(0.9 * len(values) - 1e-9) - 1]
    assert 0 < report.ages.survival < 1
    assert report.to_dict().keys() == {
        *("pruned", "churn", "dead_labels"),
        *("survival", "age_mean", "age_p10", "age_p50", "age_p90"),
    }


def test_the_sample_is_bounded_and_evenly_spaced() -> None:
    ages = SlotAges(3_000_000, 8)
    assert ages.age.shape == (4096, 8)
    gaps = {b - a for a, b in zip(ages.rows, ages.rows[1:], strict=False)}
    assert gaps <= {732, 733}
    assert ages.rows[0] == 0
    assert 3_000_000 - 733 <= ages.rows[-1] < 3_000_000


def test_before_any_rewiring_everything_is_left() -> None:
    report = SlotAges(5, 3).report()
    assert report.to_dict() == {
        **{"survival": 1.0, "age_mean": 0.0},
        **{"age_p10": 0, "age_p50": 0, "age_p90": 0},
    }
