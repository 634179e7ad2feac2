"""The messages of the argument checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_kernels import checks
from xmc_kernels._cpu.valid import index_is_valid
from xmc_kernels.checks import validate_index
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer
from xmc_kernels.packing import pack_index


def layer(**changes):
    """Layer of x [2, 8], weight [6, 3], index [6, 3], bias [6], with some replaced."""
    arguments = {
        "x": torch.ones(2, 8),
        "weight": torch.ones(6, 3),
        "index": torch.arange(3).repeat(6, 1).to(torch.uint16),
        "bias": torch.ones(6),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 8).int()}, TypeError, "expected x of float32, .* got torch.int32"),
        ({"bias": torch.ones(6).int()}, TypeError, "expected bias of .* got torch.int32"),
        ({"x": torch.ones(8)}, ValueError, r"expected x \[B, D\] .* got \[8\] and \[6, 3\]"),
        (
            {"weight": torch.ones(0, 3)},
            ValueError,
            r"expected at least one label and one input, got weight \[0, 3\]",
        ),
        (
            {"bias": torch.ones(5)},
            ValueError,
            r"expected bias of shape \[6\] to match weight, got \[5\]",
        ),
        (
            {"index": torch.ones(6, 3).long()},
            TypeError,
            "expected index of uint16 or int32, got torch.int64",
        ),
        (
            {"index": torch.ones(6, 2).int()},
            ValueError,
            r"expected index of shape \[6, 3\] to match weight, got \[6, 2\]",
        ),
        (
            {"index": torch.ones(4, 3).int()},
            ValueError,
            "expected a number of index rows that divides 6 labels, got 4",
        ),
        (
            {"x": torch.ones(2, 2)},
            ValueError,
            "expected fan-in of at most 2 features, got 3",
        ),
        (
            {"weight": torch.ones(6, 3, device="meta")},
            ValueError,
            "expected weight on cpu like x, got meta",
        ),
        (
            {"index": torch.ones(6, 3, device="meta", dtype=torch.int32)},
            ValueError,
            "expected index on cpu like x, got meta",
        ),
    ],
)
def test_layer_arguments(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        fan_in_linear(**layer(**changes))


def test_dense_layer_needs_as_many_features() -> None:
    with pytest.raises(ValueError, match=r"expected x with 3 features to match .* got 8"):
        checks.check_layer(torch.ones(2, 8), Layer(torch.ones(6, 3), None, None))


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
def test_features_that_are_not_finite_name_their_row(value, what) -> None:
    x = torch.zeros(5, 4)
    checks.check_finite(x)
    x[3, 2] = value
    x[4, 0] = float("nan")
    with pytest.raises(ValueError, match=f"expected finite features, row 3 has {what}"):
        checks.check_finite(x)


@pytest.mark.parametrize(
    ("indptr", "indices", "error", "message"),
    [
        ([0, 1], [0.5], TypeError, "indptr int64 and indices int32, got .* torch.float32"),
        ([0, 1, 2], [0, 1], ValueError, r"shape \[2\] and flat indices, got \[3\] and \[2\]"),
    ],
)
def test_rows_of_labels(indptr, indices, error, message) -> None:
    values = torch.tensor(indices)
    values = values.int() if values.dtype == torch.int64 else values
    with pytest.raises(error, match=message):
        checks.check_rows(torch.tensor(indptr), values, 1)


@pytest.mark.parametrize(
    ("indptr", "message"),
    [
        ([0, 2, 2], r"indptr from 0 to 3 \(the number of indices\), got 0 to 2"),
        ([1, 2, 3], r"indptr from 0 to 3 .* got 1 to 3"),
        ([0, 4, 3], "expected exclude with a non-decreasing indptr"),
    ],
)
def test_row_pointers(indptr, message) -> None:
    with pytest.raises(ValueError, match=message):
        checks.check_rows_values(torch.tensor(indptr), torch.zeros(3).int(), "exclude")


def test_label_range() -> None:
    checks.check_label_range(torch.tensor([], dtype=torch.int32), 4)
    checks.check_label_range(torch.tensor([0, 3], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 4\), got 1 to 4"):
        checks.check_label_range(torch.tensor([1, 4], dtype=torch.int32), 4)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32])
def test_index_must_be_sorted_distinct_and_in_range(dtype) -> None:
    index = torch.tensor([[0, 2, 7], [1, 2, 3]]).to(dtype)
    checks.validate_index(index, 8)
    with pytest.raises(ValueError, match=r"expected index values in \[0, 7\), got 0 to 7"):
        checks.validate_index(index, 7)
    for bad in ([1, 1, 3], [2, 1, 3]):
        rows = torch.tensor([[0, 2, 7], bad]).to(dtype)
        with pytest.raises(ValueError, match=r"expected sorted, distinct .* row 1 has not"):
            checks.validate_index(rows, 8)


def test_index_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"expected index of uint16 or int32, got torch\.int64"):
        checks.validate_index(torch.zeros(2, 2).long(), 4)
    with pytest.raises(ValueError, match=r"expected a non-empty index .* got \[0, 2\]"):
        checks.validate_index(torch.zeros(0, 2).int(), 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(9, 400), st.booleans(), st.data())
def test_the_fast_check_of_an_index_agrees_with_the_rule(fan_in, in_features, packed, data) -> None:
    values = st.lists(st.integers(0, 511), min_size=fan_in, max_size=fan_in, unique=True)
    rows = [sorted(data.draw(values)) for _ in range(3)]
    if data.draw(st.booleans()):
        rows[1] = data.draw(st.permutations(rows[1]))
    good = all(row == sorted(row) and row[-1] < in_features for row in rows)
    index = torch.tensor(rows, dtype=torch.int32)
    pattern = (fan_in, 512) if packed else None
    if packed:
        in_features = 300 + in_features % 200  # one block of 512
        good = all(row == sorted(row) and row[-1] < in_features for row in rows)
        index = pack_index(index, (fan_in, 512))
    assert index_is_valid(index, in_features, pattern, fan_in) == good
    if good:
        validate_index(index, in_features, pattern)
    else:
        with pytest.raises(ValueError, match=r"expected (sorted|index values)"):
            validate_index(index, in_features, pattern)
