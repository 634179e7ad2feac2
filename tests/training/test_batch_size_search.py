"""The size of micro-batches: a line through two measurements, its confirmation, what fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from xmc.nn.encoder import BagEncoder
from xmc.training.batch_size_search import AutoSize, MemoryFit
from xmc.training.byte_meter import (
    AllocationMeter,
    MemoryLimitError,
    is_out_of_memory,
    measured,
)
from xmc.types import Bag


def search(size: AutoSize, rows: int, memory: object, *, shape: object = ()) -> list[int]:
    """Sizes proposed for a step of `rows`, where m rows take `memory(m)` bytes."""
    assert callable(memory)
    done: list[int] = []
    while sum(done) < rows:
        m = size.propose(rows - sum(done), shape)  # type: ignore[arg-type]
        if not size.settled(m, shape):  # type: ignore[arg-type]
            if memory(m) > size.limit:
                size.ran_out(m, shape)  # type: ignore[arg-type]
                continue
            size.succeeded(m, memory(m), shape)  # type: ignore[arg-type]
        done.append(m)
    return done


def test_two_points_make_the_line_and_its_size_is_confirmed() -> None:
    size = AutoSize(10_000)
    assert search(size, 200, lambda m: 1000 + 50 * m) == [8, 57, 135]  # the rest of the rows
    fit = size.fit()
    assert fit == MemoryFit(fixed=1000.0, per_row=50.0)
    assert fit.bytes(100) == 6000
    assert fit.most_rows(9000) == 160
    assert not size.settled(160)  # by the line alone
    assert search(size, 500, lambda m: 1000 + 50 * m) == [160, 160, 160, 20]
    assert size.settled(160)


@given(
    fixed=st.integers(0, 5000),
    per_row=st.integers(1, 300),
    first=st.integers(1, 50),
    limit=st.integers(6000, 100_000),
)
def test_the_second_point_is_safe_and_the_chosen_size_fills_the_limit(
    fixed: int, per_row: int, first: int, limit: int
) -> None:
    """Where memory is a line nothing fails, unless the first measurement does."""

    def memory(m: int) -> int:
        return fixed + per_row * m

    size = AutoSize(limit, first=first)
    if memory(first) > limit:
        return
    done = search(size, 5000, memory)
    assert sum(done) == 5000
    most = (int(0.9 * limit) - fixed) // per_row
    fitting = (limit - fixed) // per_row
    assert max(done) <= min(fitting, 5000)
    if len(done) > 3 and size.fit() is not None:
        assert max(done) >= min(most, 5000 - sum(done[:2])) - 1
        assert len(set(done[2:-1])) == 1  # settled after two points


def test_a_size_beyond_the_line_is_halved_and_never_tried_again() -> None:
    """Memory bends upwards: the line promises too much."""

    def memory(m: int) -> int:
        return 100 * m + m**2

    size = AutoSize(40_000)
    done = search(size, 1000, memory)
    assert done[:2] == [8, 64]
    assert set(done[2:-1]) == {106}  # of 213 rows
    assert search(size, 300, memory) == [106, 106, 88]


def test_flat_memory_takes_everything() -> None:
    assert search(AutoSize(100), 5000, lambda m: 90) == [8, 4, 4988]


def test_a_first_measurement_that_fails_is_halved() -> None:
    size = AutoSize(1000, first=64)
    assert search(size, 20, lambda m: 200 * m) == [5, 2, 5, 5, 3]  # 20 and 10 failed
    assert size.propose(3) == 3


def test_most_is_never_passed() -> None:
    assert search(AutoSize(10**6, first=8, most=20), 50, lambda m: m) == [8, 20, 20, 2]


def test_each_shape_is_probed_again() -> None:
    size = AutoSize(10_000)
    short = search(size, 400, lambda m: 10 * m, shape="short")
    assert not size.settled(8, "long")
    long = search(size, 400, lambda m: 100 * m, shape="long")
    assert long[0] == 8
    assert max(long) == 90
    assert max(short) == 400 - 72
    assert search(size, 400, lambda m: 10 * m, shape="short") == [400]


@pytest.mark.parametrize("name", ["limit", "first", "most"])
def test_numbers_below_one_are_refused(name: str) -> None:
    options = {"limit": 10, name: 0}
    with pytest.raises(ValueError, match=f"expected {name} of at least 1, got 0"):
        AutoSize(options.pop("limit"), **options)  # type: ignore[arg-type]


def test_the_meter_counts_what_exists_at_once() -> None:
    """Storages once, until they are gone; views and what was there before not at all."""
    before = torch.zeros(1000)
    with AllocationMeter() as meter:
        view = before.view(10, 100).t()[1:]
        assert meter.live == 0
        one = torch.ones(100)
        two = one.view(10, 10).clone()
        assert meter.live == 800
        del one
        assert meter.live == 400
        two.add_(view[0, 0])
        three = two + two
        assert meter.live == 800
        del three, two
    assert meter.live == 0
    assert meter.peak == 800 + 400 - 400


def test_the_meter_sees_activations_and_gradients() -> None:
    """A layer of 10 x 20: its output and the gradients, dense and sparse."""
    layer = nn.Linear(10, 20)
    x = torch.randn(50, 10)
    with AllocationMeter() as meter:
        y = torch.sigmoid(layer(x))
        assert meter.live == 50 * 20 * 4
        y.sum().backward()
        del y
    assert meter.live == (10 * 20 + 20) * 4
    bag = Bag(torch.tensor([1, 2, 1]), torch.tensor([0, 2, 3]), torch.rand(3))
    model = BagEncoder(5, 8)
    with AllocationMeter() as meter:
        model(bag).sum().backward()
    assert meter.live == 2 * 8 * 4 + 2 * 8 + 8 * 4  # two rows of the table, their ids, the bias


def test_the_limit_stops_the_work_forward_and_backward() -> None:
    layer = nn.Linear(100, 100)
    x = torch.randn(10, 100)
    message = "at most 3,000 bytes of tensors at once, got 4,000"
    with pytest.raises(MemoryLimitError, match=message), measured(torch.device("cpu"), 3000):
        layer(x)
    with measured(torch.device("cpu"), 9000) as peak:
        y = layer(x).sum()
    assert peak.bytes == 4004
    with pytest.raises(MemoryLimitError, match="at most 9,000 bytes"), AllocationMeter(9000):
        y.backward()  # 40 kB of a weight's gradient


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryLimitError("too much"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.gpu
def test_a_gpu_measures_by_its_allocator() -> None:
    device = torch.device("cuda")
    with measured(device) as peak:
        torch.zeros(1 << 20, device=device)
    assert peak.bytes >= 4 << 20
    message = "expected at most 1,000 bytes on cuda at once"
    with pytest.raises(MemoryLimitError, match=message), measured(device, 1000):
        torch.zeros(1 << 20, device=device)
    limit = AutoSize().limit_on(device)
    assert 0 < limit <= torch.cuda.get_device_properties(device).total_memory
