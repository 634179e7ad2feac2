"""SET: invariants for any shape, the truth slot by slot, and the distribution of what regrows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xmc.nn import rewire
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire import RewireReport, set_rewire_
from xmc_kernels.checks import validate_index


@st.composite
def cases(draw: st.DrawFn) -> dict[str, int | float]:
    in_features = draw(st.integers(1, 40))
    return {
        "in_features": in_features,
        "fan_in": draw(st.integers(1, in_features)),
        "group_size": draw(st.integers(1, 4)),
        "rows": draw(st.integers(1, 12)),
        "fraction": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**64)),
        "step": draw(st.integers(0, 10**9)),
        "init": draw(st.integers(0, 1000)),
    }


def make(case: dict[str, int | float]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weights with ties, a pattern, and two moments."""
    torch.manual_seed(int(case["init"]))
    labels, fan_in = int(case["rows"] * case["group_size"]), int(case["fan_in"])
    layer = FixedFanInLinear(
        int(case["in_features"]), labels, fan_in, group_size=int(case["group_size"])
    )
    weight = torch.randint(-4, 5, (labels, fan_in)) / 4
    return weight, layer.index, [torch.randn(labels, fan_in), torch.rand(labels, fan_in)]


def rewired(
    case: dict[str, int | float], **options: int
) -> tuple[Tensor, Tensor, list[Tensor], RewireReport]:
    weight, index, moments = make(case)
    report = set_rewire_(
        weight,
        index,
        int(case["in_features"]),
        fraction=float(case["fraction"]),
        seed=int(case["seed"]),
        step=int(case["step"]),
        moments=moments,
        **options,
    )
    return weight, index, moments, report


def survivors(weight: Tensor, row: int, group_size: int, pruned: int) -> list[int]:
    """Slots of a row that stay, one by one in Python: lowest mean |w| first, then lowest slot."""
    group = weight[row * group_size : (row + 1) * group_size].double().abs().mean(0).tolist()
    by_score = sorted(range(len(group)), key=lambda slot: (group[slot], slot))
    return sorted(by_score[pruned:])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_survivors_keep_everything_and_the_rest_is_new_and_zero(
    case: dict[str, int | float],
) -> None:
    in_features, fan_in = int(case["in_features"]), int(case["fan_in"])
    group_size = int(case["group_size"])
    old_weight, old_index, old_moments = make(case)
    weight, index, moments, report = rewired(case)

    validate_index(index, in_features)
    pruned = min(round(case["fraction"] * fan_in), in_features - fan_in)
    dead = []
    for row in range(int(case["rows"])):
        before, after = old_index[row].tolist(), index[row].tolist()
        kept = survivors(old_weight, row, group_size, pruned)
        assert set(after) & set(before) == {before[slot] for slot in kept}
        for member in range(group_size):
            label = row * group_size + member
            for old, new in zip((old_weight, *old_moments), (weight, *moments), strict=True):
                expected = {before[slot]: float(old[label, slot]) for slot in kept}
                assert new[label].tolist() == [expected.get(column, 0.0) for column in after]
            if not any(float(old_weight[label, slot]) for slot in kept):
                dead.append(label)
    assert report.pruned == pruned * int(case["rows"])
    assert report.churn == pruned / fan_in
    assert report.dead_labels.tolist() == dead


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 100))
def test_the_tile_size_changes_nothing(case: dict[str, int | float], tile_slots: int) -> None:
    weight, index, moments, report = rewired(case)
    others = rewired(case, tile_slots=tile_slots)
    assert torch.equal(weight, others[0])
    assert torch.equal(index, others[1])
    assert all(torch.equal(a, b) for a, b in zip(moments, others[2], strict=True))
    assert report.to_dict() == others[3].to_dict()


def pattern_after(seed: int, step: int, labels: int = 200) -> Tensor:
    torch.manual_seed(0)
    layer = FixedFanInLinear(64, labels, 8)
    set_rewire_(layer.weight, layer.index, 64, fraction=0.5, seed=seed, step=step)
    return layer.index


def test_seed_and_step_decide_what_regrows() -> None:
    torch.manual_seed(123)  # the global generator has no part in it
    assert torch.equal(pattern_after(7, 100), pattern_after(7, 100))
    for other in (pattern_after(8, 100), pattern_after(7, 101), pattern_after(100, 7)):
        differing = (pattern_after(7, 100).int() != other.int()).any(1).double().mean()
        assert float(differing) > 0.95


def test_labels_regrow_independently() -> None:
    """Labels with the same weights and inputs do not move together."""
    index = torch.arange(8, dtype=torch.int32).repeat(500, 1).to(torch.uint16)
    set_rewire_(torch.ones(500, 8), index, 64, fraction=0.5, seed=1, step=1)
    distinct = {tuple(row) for row in index.tolist()}
    assert len(distinct) > 490


@pytest.mark.parametrize("fan_in", [3, 6])  # 3 of 7 free inputs, then all 4
def test_regrown_inputs_are_uniform_among_those_not_read_before(fan_in: int) -> None:
    rows, in_features, pruned = 60_000, 10, 3
    fixed = torch.tensor([0, 2, 3, 5, 8, 9][:fan_in], dtype=torch.int32)
    index = fixed.repeat(rows, 1).to(torch.uint16)
    weight = torch.zeros(rows, fan_in)
    weight[:, pruned:] = 1.0
    set_rewire_(weight, index, in_features, fraction=pruned / fan_in, seed=3, step=5)
    new = torch.stack([row_is_new(index, column) for column in range(in_features)], 1)
    new[:, fixed[pruned:].long()] = False
    assert not bool(new[:, fixed.long()].any())
    assert bool((new.sum(1) == pruned).all())
    counts = torch.bincount((new * 2 ** torch.arange(in_features)).sum(1)).double()
    counts = counts[counts > 0]
    subsets = {3: 35, 6: 4}[fan_in]
    assert len(counts) == subsets
    expected = rows / subsets
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < {3: 75.0, 6: 21.1}[fan_in]  # 34 and 3 degrees of freedom, p = 1e-4


def row_is_new(index: Tensor, column: int) -> Tensor:
    """[R], whether the row reads that input."""
    return (index.int() == column).any(1)


def test_hash_bits_are_balanced_and_uncorrelated() -> None:
    """Each bit of the draws is set half of the time, also between neighbouring rows and steps."""
    keys = rewire._mix(rewire._stream(1, 2, torch.device("cpu")) + torch.arange(20_000))
    draws = torch.stack([rewire._below(2**20, keys, counter) for counter in range(3)])
    bits = (draws.unsqueeze(-1) >> torch.arange(20)) & 1
    tolerance = 5 * 0.5 / 20_000**0.5
    assert float((bits.double().mean(1) - 0.5).abs().max()) < tolerance
    assert float(((bits[0] ^ bits[1]).double().mean(0) - 0.5).abs().max()) < tolerance
    assert float(((bits[:, 1:] ^ bits[:, :-1]).double().mean(1) - 0.5).abs().max()) < tolerance


def test_mix_is_splitmix64() -> None:
    """The published generator's first outputs for seed 1234567."""
    state = torch.tensor(1234567)
    outputs = [int(rewire._mix(state + (i + 1) * torch.tensor(rewire._GOLDEN))) for i in range(3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [value % 2**64 for value in outputs] == expected


def test_a_row_that_reads_everything_stays() -> None:
    layer = FixedFanInLinear(5, 4, 5)
    before = layer.weight.clone()
    report = set_rewire_(layer.weight, layer.index, 5, fraction=0.4, seed=0, step=0)
    assert report.to_dict() == {"pruned": 0, "churn": 0.0, "dead_labels": 0}
    assert torch.equal(layer.weight, before)


def test_rewires_a_parameter_in_training() -> None:
    layer = FixedFanInLinear(30, 12, 6)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 30)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    set_rewire_(layer.weight, layer.index, 30, fraction=0.5, seed=0, step=1, moments=moments)
    assert layer.weight.requires_grad
    new = layer.weight == 0
    assert new.sum(1).tolist() == [3] * 12
    assert not bool(moments[0][new].any())
    assert bool((moments[1][~new] > 0).any())
    x = torch.randn(2, 30)
    dense = layer.to_dense()
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 1.5}, r"expected fraction in \[0, 1\], got 1.5"),
        ({"in_features": 2**27}, r"expected in_features in \[1, 2\^27\), got 134217728"),
        ({"in_features": 3}, r"expected index values in \[0, 3\)"),
        ({"weight": torch.zeros(4, 3)}, r"got \[4, 3\] and \[2, 2\]"),
        ({"weight": torch.zeros(5, 2)}, "divides 5 labels, got 2"),
        ({"moments": [torch.zeros(4, 1)]}, r"shape \[4, 2\].* got \[4, 1\] at position 0"),
        ({"index": torch.tensor([[0, 0], [1, 2]]).int()}, "row 0 has not"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    good = {
        "weight": torch.zeros(4, 2),
        "index": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32).to(torch.uint16),
        "in_features": 6,
        "fraction": 0.5,
        "seed": 0,
        "step": 0,
    }
    set_rewire_(**good)
    with pytest.raises(ValueError, match=message):
        set_rewire_(**(good | change))
