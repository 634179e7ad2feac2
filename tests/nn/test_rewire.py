"""One rewiring: invariants and the truth slot by slot, for any shape and option."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.rewire import RewireReport, rewire_
from xmc_kernels.checks import validate_index
from xmc_kernels.packing import pack_index, unpack_index

Pattern = tuple[int, int] | None


@dataclass(frozen=True)
class Case:
    in_features: int
    fan_in: int
    group_size: int
    rows: int
    pattern: Pattern
    rigl: bool
    seed: int
    draw: int
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Weights with ties, a pattern as it is stored, two moments, growth scores with ties."""
        torch.manual_seed(self.draw)
        labels = self.rows * self.group_size
        weight = torch.randint(-4, 5, (labels, self.fan_in)) / 4
        if self.pattern is None:
            layer = FixedFanInLinear(
                self.in_features, labels, self.fan_in, group_size=self.group_size
            )
            index = layer.index
        else:
            n, m = self.pattern
            local = torch.rand(self.rows, self.in_features // m, m).argsort(2)[:, :, :n]
            base = torch.arange(self.in_features // m).unsqueeze(1) * m
            inputs = (local.sort(2).values + base).flatten(1)
            index = pack_index(inputs, self.pattern)
        moments = [torch.randn(labels, self.fan_in), torch.rand(labels, self.fan_in)]
        return weight, index, moments, torch.randint(0, 4, (self.rows, self.in_features)) / 2

    def inputs(self, index: Tensor) -> list[list[int]]:
        """The inputs of each row, whatever they are stored as."""
        if self.pattern is not None:
            index = unpack_index(index, self.pattern, self.fan_in)
        return index.tolist()

    def block(self, column: int) -> int:
        return 0 if self.pattern is None else column // self.pattern[1]

    def spare(self) -> int:
        """Inputs that a block does not read."""
        if self.pattern is None:
            return self.in_features - self.fan_in
        return self.pattern[1] - self.pattern[0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    if draw(st.booleans()):
        pattern: Pattern = None
        in_features = draw(st.integers(1, 40))
        fan_in = draw(st.integers(1, in_features))
    else:
        m = draw(st.sampled_from([4, 8]))
        pattern = draw(st.integers(1, m)), m
        in_features = m * draw(st.integers(1, 4))
        fan_in = in_features // m * pattern[0]
    prune = draw(st.sampled_from(["fraction", "threshold"]))
    amount = draw(st.floats(0, 1)) if prune == "fraction" else draw(st.integers(0, 9)) / 8
    return Case(
        in_features=in_features,
        fan_in=fan_in,
        group_size=draw(st.integers(1, 4)),
        rows=draw(st.integers(1, 12)),
        pattern=pattern,
        rigl=draw(st.booleans()),
        seed=draw(st.integers(0, 2**64)),
        draw=draw(st.integers(0, 1000)),
        options={
            "prune": prune,
            "amount": amount,
            "init": draw(st.sampled_from(["zero", "uniform"])),
            "keep_moments": draw(st.booleans()),
            "step": draw(st.integers(0, 10**9)),
        },
    )


def rewired(case: Case, **more: Any) -> tuple[Tensor, Tensor, list[Tensor], RewireReport]:
    weight, index, moments, score = case.make()
    report = rewire_(
        weight,
        index,
        case.in_features,
        seed=case.seed,
        growth=(lambda start, stop: score[start:stop]) if case.rigl else None,
        moments=moments,
        pattern=case.pattern,
        **(case.options | more),
    )
    return weight, index, moments, report


def lost_slots(case: Case, weight: Tensor, inputs: list[int], row: int) -> list[int]:
    """Slots of a row that go, one by one in Python: lowest sum of |w| first, then lowest slot."""
    group_size, spare = case.group_size, case.spare()
    score = weight[row * group_size : (row + 1) * group_size].double().abs().sum(0).tolist()
    lost: list[int] = []
    for slot in sorted(range(case.fan_in), key=lambda slot: (score[slot], slot)):
        if case.options["prune"] == "fraction":
            wanted = len(lost) < round(case.options["amount"] * case.fan_in)
        else:
            wanted = score[slot] < case.options["amount"] * group_size
        block = case.block(inputs[slot])
        room = sum(case.block(inputs[other]) == block for other in lost) < spare
        if wanted and room and len(lost) < case.fan_in - 1:
            lost.append(slot)
    return lost


def best_inputs(case: Case, score: Tensor, inputs: list[int], lost: list[int]) -> set[int]:
    """For each lost slot an unread input of its block, highest score first, then lowest input."""
    new: set[int] = set()
    for slot in lost:
        block = case.block(inputs[slot])
        free = [
            column
            for column in range(case.in_features)
            if case.block(column) == block and column not in inputs and column not in new
        ]
        new.add(min(free, key=lambda column: (-float(score[column]), column)))
    return new


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_survivors_keep_everything_and_the_rest_is_new(case: Case) -> None:
    old_weight, old_index, old_moments, score = case.make()
    weight, index, moments, report = rewired(case)

    validate_index(index, case.in_features, *([case.pattern] if case.pattern else []))
    pruned, dead = 0, []
    old_rows, new_rows = case.inputs(old_index), case.inputs(index)
    for row, (before, after) in enumerate(zip(old_rows, new_rows, strict=True)):
        lost = lost_slots(case, old_weight, before, row)
        pruned += len(lost)
        kept = [slot for slot in range(case.fan_in) if slot not in lost]
        assert set(after) & set(before) == {before[slot] for slot in kept}
        blocks = [case.block(column) for column in before]
        assert [case.block(column) for column in after] == blocks
        new = set(after) - set(before)
        if case.rigl:
            assert new == best_inputs(case, score[row], before, lost)
        for member in range(case.group_size):
            label = row * case.group_size + member
            for old, now in zip((old_weight, *old_moments), (weight, *moments), strict=True):
                for slot in kept:
                    place = after.index(before[slot])
                    assert float(now[label, place]) == float(old[label, slot])
            fresh = [after.index(column) for column in new]
            for value in weight[label, fresh].tolist():
                if case.options["init"] == "zero":
                    assert value == 0
                else:
                    assert 0 < abs(value) < case.fan_in**-0.5
            for old, now in zip(old_moments, moments, strict=True):
                left = old[label, lost] if case.options["keep_moments"] else torch.zeros(len(lost))
                assert sorted(now[label, fresh].tolist()) == sorted(left.tolist())
            if not any(float(old_weight[label, slot]) for slot in kept):
                dead.append(label)
    assert report.pruned == pruned
    assert report.churn == pruned / (case.rows * case.fan_in)
    assert report.dead_labels.tolist() == dead


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 100))
def test_the_tile_size_changes_nothing(case: Case, tile_slots: int) -> None:
    weight, index, moments, report = rewired(case)
    others = rewired(case, tile_slots=tile_slots)
    assert torch.equal(weight, others[0])
    assert torch.equal(index, others[1])
    assert all(torch.equal(a, b) for a, b in zip(moments, others[2], strict=True))
    assert report.to_dict() == others[3].to_dict()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_shards_of_labels_rewire_as_the_whole_does(case: Case, data: st.DataObject) -> None:
    weight, index, moments, report = rewired(case)
    old_weight, old_index, old_moments, score = case.make()
    cut = data.draw(st.integers(0, case.rows))
    pruned = 0
    for first, last in ((0, cut), (cut, case.rows)):
        if first == last:
            continue
        labels = slice(first * case.group_size, last * case.group_size)
        shard_score = score[first:last]
        growth = (lambda a, b, s=shard_score: s[a:b]) if case.rigl else None
        pruned += rewire_(
            old_weight[labels],
            old_index[first:last],
            case.in_features,
            seed=case.seed,
            growth=growth,
            moments=[moment[labels] for moment in old_moments],
            pattern=case.pattern,
            row_offset=first,
            **case.options,
        ).pruned
    assert torch.equal(weight, old_weight)
    assert torch.equal(index, old_index)
    assert all(torch.equal(a, b) for a, b in zip(moments, old_moments, strict=True))
    assert pruned == report.pruned


@pytest.mark.gpu
@pytest.mark.parametrize("rigl", [False, True])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_gpu_rewires_as_the_cpu_does(rigl: bool, pattern: Pattern) -> None:
    case = Case(32, 16, 2, 50, pattern, rigl, seed=3, draw=4)
    weight, index, moments, score = case.make()
    places = []
    for device in ("cpu", "cuda"):
        here = [tensor.clone().to(device) for tensor in (weight, index, *moments)]
        scores = score.to(device)
        rewire_(
            *(here[0], here[1], 32),
            **{"amount": 0.4, "seed": 3, "step": 7, "init": "uniform", "pattern": pattern},
            growth=(lambda start, stop, s=scores: s[start:stop]) if rigl else None,
            moments=here[2:],
            tile_slots=400,
        )
        places.append([tensor.cpu() for tensor in here])
    assert all(torch.equal(one, other) for one, other in zip(*places, strict=True))


def pattern_after(seed: int, step: int) -> Tensor:
    torch.manual_seed(0)
    layer = FixedFanInLinear(64, 200, 8)
    rewire_(layer.weight, layer.index, 64, amount=0.5, seed=seed, step=step)
    return layer.index


def test_seed_and_step_decide_what_regrows() -> None:
    torch.manual_seed(123)  # the global generator has no part in it
    assert torch.equal(pattern_after(7, 100), pattern_after(7, 100))
    for other in (pattern_after(8, 100), pattern_after(7, 101), pattern_after(100, 7)):
        differing = (pattern_after(7, 100).int() != other.int()).any(1).double().mean()
        assert float(differing) > 0.95


def test_labels_regrow_independently() -> None:
    """Labels with the same weights and inputs do not move together, nor start alike."""
    index = torch.arange(8, dtype=torch.int32).repeat(500, 1).to(torch.uint16)
    weight = torch.ones(1000, 8)  # two labels to a row
    rewire_(weight, index, 64, amount=0.5, seed=1, step=1, init="uniform")
    assert len({tuple(row) for row in index.tolist()}) > 490
    new = weight[weight != 1]
    assert len(new) == 4000
    assert len(new.unique()) > 3990
    deviations = 5 / 4000**0.5
    assert abs(float(new.mean())) < deviations * (1 / 24) ** 0.5
    assert abs(float(new.square().mean()) - 1 / 24) < deviations * (1 / 5 - 1 / 9) ** 0.5 / 8


@pytest.mark.parametrize("fan_in", [3, 6])  # 3 of 7 free inputs, then all 4
def test_regrown_inputs_are_uniform_among_those_not_read_before(fan_in: int) -> None:
    rows, in_features, pruned = 60_000, 10, {3: 2, 6: 3}[fan_in]
    fixed = torch.tensor([0, 2, 3, 5, 8, 9][:fan_in], dtype=torch.int32)
    index = fixed.repeat(rows, 1).to(torch.uint16)
    weight = torch.zeros(rows, fan_in)
    weight[:, pruned:] = 1.0
    rewire_(weight, index, in_features, amount=pruned / fan_in, seed=3, step=5)
    new = members(index, in_features)
    new[:, fixed[pruned:].long()] = False
    assert not bool(new[:, fixed.long()].any())
    assert bool((new.sum(1) == pruned).all())
    assert_subsets_uniform(new, {3: 21, 6: 4}[fan_in], {3: 54.0, 6: 21.1}[fan_in])


def test_regrown_inputs_of_a_block_are_uniform() -> None:
    """4 of 8: the first block loses two inputs, the second one, each to any of its four others."""
    rows, pattern = 40_000, (4, 8)
    index = pack_index(torch.tensor([[0, 2, 3, 5, 9, 10, 14, 15]]).repeat(rows, 1), pattern)
    weight = torch.tensor([[0.0, 1, 0, 1, 1, 0, 1, 1]]).repeat(rows, 1)
    rewire_(weight, index, 16, prune="threshold", amount=0.5, seed=9, step=2, pattern=pattern)
    new = members(unpack_index(index, pattern, 8), 16)
    new[:, [2, 5, 9, 14, 15]] = False
    assert bool((new[:, :8].sum(1) == 2).all())
    assert bool((new[:, 8:].sum(1) == 1).all())
    assert_subsets_uniform(new, 6 * 4, 57.0)


def members(index: Tensor, in_features: int) -> Tensor:
    """[R, D], whether a row reads an input."""
    return torch.stack([(index.int() == column).any(1) for column in range(in_features)], 1)


def assert_subsets_uniform(chosen: Tensor, subsets: int, limit: float) -> None:
    """Chi-square of the sets [R, D] at p = 1e-4."""
    counts = torch.bincount((chosen * 2 ** torch.arange(chosen.shape[1])).sum(1)).double()
    counts = counts[counts > 0]
    assert len(counts) == subsets
    expected = len(chosen) / subsets
    assert float(((counts - expected) ** 2 / expected).sum()) < limit


def test_rows_lose_what_lies_below_the_threshold() -> None:
    weight = torch.tensor(
        [
            [0.5, 0.01, -0.02, 0.5],  # two below
            [0.01, 0.01, 0.02, 0.03],  # all below: the largest stays
            [0.1, 0.1, -0.1, 0.1],  # none: the threshold itself is not below
        ]
    )
    index = torch.arange(4, dtype=torch.int32).repeat(3, 1)
    report = rewire_(weight, index, 9, prune="threshold", amount=0.1, seed=0, step=0)
    assert report.pruned == 5
    assert [sorted(row) for row in weight.tolist()] == [
        [0, 0, 0.5, 0.5],
        pytest.approx([0, 0, 0, 0.03]),
        pytest.approx([-0.1, 0.1, 0.1, 0.1]),
    ]


def test_a_row_that_reads_everything_stays() -> None:
    layer = FixedFanInLinear(5, 4, 5)
    before = layer.weight.clone()
    report = rewire_(layer.weight, layer.index, 5, amount=0.4, seed=0, step=0)
    assert report.to_dict() == {"pruned": 0, "churn": 0.0, "dead_labels": 0}
    assert torch.equal(layer.weight, before)


def test_growth_is_asked_for_bounded_tiles_only() -> None:
    """Never [L, D]: 3,000 rows of 4,096 scores come in tiles of at most 2^20 numbers."""
    layer = FixedFanInLinear(4096, 3000, 4)
    asked = []

    def growth(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.zeros(stop - start, 4096)

    rewire_(layer.weight, layer.index, 4096, amount=0.5, seed=0, step=0, growth=growth)
    assert max(stop - start for start, stop in asked) * 4096 <= 2**20
    assert [start for start, _ in asked[1:]] == [stop for _, stop in asked[:-1]]
    assert (asked[0][0], asked[-1][1]) == (0, 3000)


def test_new_float8_weights_fit_the_scale_of_their_label() -> None:
    """A label of tiny weights: a new one is cut, not turned into NaN, and keeps its sign."""
    weight = torch.tensor([[1.0, 448.0, 2.0, 448.0]]).repeat(50, 1).to(torch.float8_e4m3fn)
    scale = torch.full((50,), 2.0**-14)  # 448 of it are 0.027; new ones go up to 0.5
    index = torch.tensor([[1, 4, 5, 9]], dtype=torch.int32).repeat(50, 1)
    rewire_(weight, index, 20, amount=0.5, seed=0, step=0, init="uniform", scale=scale)
    values = weight.float().sort(1).values
    assert bool(values.isfinite().all())
    assert bool((values[:, 3] == 448).all())
    assert int((values == -448).sum()) > 25


def test_a_scale_belongs_to_float8_weights() -> None:
    index = torch.tensor([[0, 1]], dtype=torch.int32)
    weight = torch.zeros(1, 2)
    with pytest.raises(TypeError, match=r"float8 weights only, got torch\.float32"):
        rewire_(weight, index, 5, amount=0.5, seed=0, step=0, scale=torch.ones(1))
    small = weight.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"got torch\.float8_e4m3fn and None"):
        rewire_(small, index, 5, amount=0.5, seed=0, step=0)
    with pytest.raises(ValueError, match=r"scale of shape \[1\] to match weight, got \[2\]"):
        rewire_(small, index, 5, amount=0.5, seed=0, step=0, scale=torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amount": 1.5}, r"expected a fraction in \[0, 1\], got 1.5"),
        ({"amount": -0.1, "prune": "threshold"}, "threshold of at least 0, got -0.1"),
        ({"prune": "half"}, "expected prune of .* got 'half'"),
        ({"init": "one"}, "expected init of .* got 'one'"),
        ({"row_offset": -1}, "expected row_offset of at least 0, got -1"),
        ({"in_features": 2**27}, r"expected in_features in \[1, 2\^27\), got 134217728"),
        ({"in_features": 3}, r"expected index values in \[0, 3\)"),
        ({"weight": torch.zeros(4, 3)}, r"got \[4, 3\] and \[2, 2\]"),
        ({"weight": torch.zeros(5, 2)}, "divides 5 labels, got 2"),
        ({"moments": [torch.zeros(4, 1)]}, r"shape \[4, 2\].* got \[4, 1\] at position 0"),
        ({"index": torch.tensor([[0, 0], [1, 2]]).int()}, "row 0 has not"),
        ({"pattern": (1, 4)}, r"expected pattern \(1, 4\) to divide 6 features"),
        (
            {"growth": lambda start, stop: torch.zeros(2, 5)},
            r"expected growth scores of shape \[2, 6\] for index rows 0 to 2, got \[2, 5\]",
        ),
        (
            {"growth": lambda start, stop: torch.tensor([[0.0] * 6, [0.0] * 5 + [torch.nan]])},
            "expected finite growth scores, got nan in row 1",
        ),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "weight": torch.zeros(4, 2),
        "index": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32).to(torch.uint16),
        "in_features": 6,
        "amount": 0.5,
        "seed": 0,
        "step": 0,
    }
    rewire_(**good)
    with pytest.raises(ValueError, match=message):
        rewire_(**(good | change))
