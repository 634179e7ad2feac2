"""A step over micro-batches is the step over the batch, also where memory runs out on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xmc.nn.encoder import BagEncoder
from xmc.training.batch_size_search import AutoSize
from xmc.training.byte_meter import AllocationMeter, MemoryLimitError
from xmc.training.micro_batch import micro_batches, micro_step
from xmc.types import Bag, Batch, SparseLabels, Tokens


class Network(nn.Module):
    """Two layers with dropout between; counts the rows of each forward pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x[:, 0].detach().clone())
        return self.last(self.dropout(torch.relu(self.first(x))))


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.to_dense())
        parameter.grad = None
    return found


def assert_close(one: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(23, 6, dtype=torch.float64), torch.randint(0, 4, (23,))


@pytest.mark.parametrize("size", [1, 5, 7, 22, 23, 100, [3, 19, 1]])
def test_a_ragged_last_micro_batch_changes_nothing(
    data: tuple[Tensor, Tensor], size: int | list[int]
) -> None:
    x, y = data
    model = Network().double()
    F.cross_entropy(model(x), y).backward()
    whole = gradients(model)
    step = micro_step(model, x, F.cross_entropy, targets=y, size=size)
    assert_close(gradients(model), whole, 1e-12)
    torch.testing.assert_close(step.loss, F.cross_entropy(model(x), y).detach())
    assert not step.loss.requires_grad
    assert sum(step.sizes) == 23


def test_gradients_add_to_those_that_are_there(data: tuple[Tensor, Tensor]) -> None:
    """For fixed and for automatic sizes: a step may itself be one of several."""
    x, y = data
    model = Network().double()
    F.cross_entropy(model(x), y).backward()
    twice = [2 * grad for grad in gradients(model)]
    for size in (4, AutoSize(10**9)):
        micro_step(model, x, F.cross_entropy, targets=y, size=4)
        micro_step(model, x, F.cross_entropy, targets=y, size=size)
        assert_close(gradients(model), twice, 1e-12)


def test_tokens_count_where_the_loss_is_a_mean_over_tokens() -> None:
    """Rows of unequal length: the mean of a micro-batch's means would be another loss."""
    model = nn.Embedding(30, 5).double()
    ids = torch.randint(0, 30, (11, 8))
    lengths = torch.tensor([1, 8, 2, 2, 7, 0, 0, 0, 3, 8, 1])  # a micro-batch of three has none
    mask = (torch.arange(8) < lengths[:, None]).long()

    def mean_over_tokens(hidden: Tensor, tokens: Tokens) -> Tensor:
        return (hidden.square().mean(2) * tokens.mask).sum() / tokens.mask.sum()

    tokens = Tokens(ids, mask)

    def embed(tokens: Tokens) -> Tensor:
        return model(tokens.ids)

    mean_over_tokens(embed(tokens), tokens).backward()
    whole = gradients(model)
    step = micro_step(
        embed, tokens, mean_over_tokens, size=[2, 3, 3, 3], weights=mask.sum(1), modules=[model]
    )
    assert_close(gradients(model), whole, 1e-12)
    torch.testing.assert_close(step.loss, mean_over_tokens(embed(tokens), tokens).detach())
    micro_step(embed, tokens, mean_over_tokens, size=[2, 3, 6], modules=[model])  # by rows
    assert not torch.allclose(gradients(model)[0], whole[0], rtol=1e-3)


def test_any_structure_is_cut_like_the_batch() -> None:
    bag = Bag(torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2, 2, 5]), torch.rand(5))
    labels = SparseLabels.from_lists([[0, 2], [], [1]], 3)
    batch = Batch(bag, labels, torch.tensor([7, 8, 9]))
    model = BagEncoder(6, 4)

    def forward(batch: Batch) -> Tensor:
        return model(batch.inputs)  # type: ignore[arg-type]

    def loss(reps: Tensor, batch: Batch) -> Tensor:
        return (reps[:, :3] * batch.labels.to_dense() - reps[:, 3:]).square().sum(1).mean()

    loss(forward(batch), batch).backward()
    whole = gradients(model)
    micro_step(forward, batch, loss, size=2, modules=[model])
    assert_close(gradients(model), whole, 1e-6)
    micro_step(forward, batch, loss, size=AutoSize(10**9, first=1), modules=[model])  # sparse rows
    assert_close(gradients(model), whole, 1e-6)
    parts = list(micro_batches({"a": torch.arange(3), "b": (bag, ["x", "y", "z"])}, 2))
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2]]
    assert [part["b"][1] for part in parts] == [["x", "y"], ["z"]]
    assert parts[1]["b"][0].ids.tolist() == [4, 1, 5]


def test_a_mapping_is_given_as_keywords(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Network().double()
    F.cross_entropy(model(x), y).backward()
    whole = gradients(model)
    micro_step(model, {"x": x}, F.cross_entropy, targets=y, size=6)
    assert_close(gradients(model), whole, 1e-12)


def test_the_scaler_scales_once(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Network().double()
    F.cross_entropy(model(x), y).backward()
    whole = gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    step = micro_step(model, x, F.cross_entropy, targets=y, size=6, scaler=scaler)
    assert_close(gradients(model), [128 * grad for grad in whole], 1e-12)
    torch.testing.assert_close(step.loss, F.cross_entropy(model(x), y).detach())


def test_a_loss_may_have_parameters(data: tuple[Tensor, Tensor]) -> None:
    x, y = data

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * output, y)

    model, loss = Network().double(), Scaled()
    loss(model(x), y).backward()
    whole = [*gradients(model), *gradients(loss)]
    micro_step(model, x, loss, targets=y, size=AutoSize(10**9))
    assert_close([*gradients(model), *gradients(loss)], whole, 1e-12)


class TooLarge:
    """Runs out of memory for chosen rows: forward, or in the middle of the backward pass."""

    def __init__(self, model: Network, *, largest: int, backward: bool) -> None:
        self.model = model
        self.largest = largest
        self.backward = backward
        self.failed: list[int] = []  # rows
        if backward:  # after the last layer's gradient, before the first's
            model.dropout.register_full_backward_hook(self._hook)
        else:
            model.last.register_forward_hook(self._forward_hook)

    def _fail(self, rows: int) -> None:
        if rows > self.largest:
            self.failed.append(rows)
            raise torch.OutOfMemoryError(f"fake: {rows} rows")

    def _hook(self, module: nn.Module, d_in: Any, d_out: tuple[Tensor, ...]) -> None:
        self._fail(len(d_out[0]))

    def _forward_hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._fail(len(output))


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_ran_out_of_memory_is_that_of_the_sizes_that_fitted(backward: bool) -> None:
    """Bit for bit, with dropout: gradients, random numbers after it, the loss."""
    x, y = torch.randn(64, 6), torch.randint(0, 4, (64,))
    model = Network(dropout=0.5)
    fake = TooLarge(model, largest=10, backward=backward)
    torch.manual_seed(3)
    step = micro_step(model, x, F.cross_entropy, targets=y, size=AutoSize(10**9))
    after, found = torch.rand(3), gradients(model)
    assert fake.failed == [56, 28, 14]
    assert step.sizes == (8, *[7] * 8)
    fake.largest = 64
    torch.manual_seed(3)
    again = micro_step(model, x, F.cross_entropy, targets=y, size=step.sizes)
    assert torch.equal(again.loss, step.loss)
    assert torch.equal(torch.rand(3), after)
    for a, b in zip(gradients(model), found, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    largest=st.integers(1, 45),
    first=st.integers(1, 12),
    per_row=st.integers(1, 30),
    backward=st.booleans(),
)
def test_no_row_is_lost_or_repeated(
    rows: int, largest: int, first: int, per_row: int, backward: bool
) -> None:
    """Whatever fits: the gradient is that of the batch, the finished passes saw each row once."""
    torch.manual_seed(0)
    model = Network().double()
    fake = TooLarge(model, largest=rows, backward=backward)
    x = torch.arange(rows * 6, dtype=torch.float64).view(rows, 6) / 100
    y = torch.arange(rows) % 4
    F.cross_entropy(model(x), y).backward()
    whole = gradients(model)
    fake.largest, model.seen = largest, []
    size = AutoSize(per_row * 10_000, first=first)
    step = micro_step(model, x, F.cross_entropy, targets=y, size=size)
    assert_close(gradients(model), whole, 1e-12)
    assert max(step.sizes) <= largest
    # Failed passes saw rows that smaller ones saw again, from the same first row on.
    starts = torch.tensor([0, *step.sizes]).cumsum(0)[:-1].tolist()
    last = {float(seen[0]): len(seen) for seen in model.seen}
    assert last == {float(x[start, 0]): n for start, n in zip(starts, step.sizes, strict=True)}
    micro_step(model, x, F.cross_entropy, targets=y, size=size)
    assert_close(gradients(model), whole, 1e-12)
    assert fake.failed == sorted(set(fake.failed), reverse=True)  # none twice, none larger


def test_a_byte_limit_chooses_the_size_and_is_kept() -> None:
    """On a CPU the peak of counted tensors, in all steps, is below the limit but near it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 10))
    x, y = torch.randn(512, 20), torch.randint(0, 10, (512,))
    F.cross_entropy(model(x), y).backward()
    whole = gradients(model)
    limit = 300_000
    size = AutoSize(limit)
    peaks, steps = [], []
    for _ in range(2):
        with AllocationMeter() as meter:
            steps.append(micro_step(model, x, F.cross_entropy, targets=y, size=size))
        assert_close(gradients(model), whole, 1e-5)
        peaks.append(meter.peak)
    assert steps[0].sizes[0] == 8
    assert 64 < max(steps[0].sizes) < 512
    assert steps[1].sizes[0] == max(steps[0].sizes)  # settled: no more measuring
    assert 0.8 * limit < max(peaks) <= limit
    again = micro_step(model, x, F.cross_entropy, targets=y, size=AutoSize(limit))
    assert again.sizes == steps[0].sizes  # the same in every run


def test_rows_of_another_shape_are_measured_for_themselves() -> None:
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU())

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return output.square().mean()

    size = AutoSize(400_000)
    short = micro_step(model, torch.randn(400, 2, 20), loss, size=size)
    long = micro_step(model, torch.randn(400, 20, 20), loss, size=size)
    assert short.sizes[:2] == (8, 64)
    assert long.sizes[0] == 8
    assert max(long.sizes) < max(short.sizes) / 5
    assert micro_step(model, torch.randn(400, 2, 20), loss, size=size).sizes[0] == max(short.sizes)


def test_one_row_too_many_says_so(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Network().double()
    micro_step(model, x, F.cross_entropy, targets=y, size=9)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    with pytest.raises(MemoryLimitError, match="bytes of tensors at once, got") as e:
        micro_step(model, x, F.cross_entropy, targets=y, size=AutoSize(100))
    assert e.value.__notes__ == ["a micro-batch of one row does not fit into 100 bytes"]
    # Nothing is left of the attempt.
    assert torch.equal(torch.get_rng_state(), random)
    assert_close(gradients(model), before, 0.0)


def test_another_error_leaves_the_gradient_alone(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Network().double()

    def broken(output: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("not about memory")

    with pytest.raises(RuntimeError, match="not about memory"):
        micro_step(model, x, broken, targets=y, size=AutoSize(10**9))
    assert all(p.grad is None for p in model.parameters())


class Wrapped(nn.Module):
    """Stands for DistributedDataParallel: notes what is held back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.events: list[str] = []

    def no_sync(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def silent() -> Any:
            self.events.append("silent")
            yield

        return silent()

    def forward(self, x: Tensor) -> Tensor:
        self.events.append("forward")
        return self.module(x)


def test_gradients_are_synchronised_once(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Wrapped(Network().double())
    micro_step(model, x, F.cross_entropy, targets=y, size=8)
    assert model.events == ["silent", "forward", "silent", "forward", "forward"]
    with pytest.raises(ValueError, match="for a model that synchronises gradients, got an AutoS"):
        micro_step(model, x, F.cross_entropy, targets=y, size=AutoSize(10**6))
    with pytest.raises(ValueError, match="of one process with exact_batch_norm, got Wrapped"):
        micro_step(model, x, F.cross_entropy, targets=y, size=8, exact_batch_norm=True)


def mean(output: Tensor, y: Tensor) -> Tensor:
    return output.mean()


def rows(output: Tensor, y: Tensor) -> Tensor:
    return output.sum(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "expected micro-batches of at least 1 row, got 0"),
        ({"size": [20, 2]}, r"that add up to 23 rows, got \[20, 2\]"),
        ({"size": [24, -1]}, r"at least 1 that add up to 23 rows, got \[24, -1\]"),
        ({"targets": torch.zeros(22)}, "the same number of rows, got 23 in 0 and 22 in 1"),
        ({"batch": torch.zeros(0, 6)}, "at least one row, got none"),
        ({"loss": rows}, r"expected the loss to be one number, .* got shape \[5\]"),
        ({"weights": torch.ones(22)}, r"expected weights of shape \[23\], got \[22\]"),
        ({"weights": -torch.ones(23)}, "expected finite weights of at least 0, .* got -1.0 to"),
        ({"weights": torch.zeros(23)}, "one of them above, got 0.0 to 0.0"),
        (
            {"size": AutoSize(10**6), "exact_batch_norm": True},
            "expected sizes in numbers with exact_batch_norm, got an AutoSize",
        ),
        ({"size": AutoSize()}, "expected a limit in bytes for micro-batches on cpu, got None"),
        (
            {"size": AutoSize(10**6), "model": lambda x: x},
            "expected modules to say what an AutoSize is to undo, got a function",
        ),
    ],
)
def test_mistakes_are_named(
    data: tuple[Tensor, Tensor], change: dict[str, Any], message: str
) -> None:
    x, y = data
    options: dict[str, Any] = {"batch": x, "loss": mean, "targets": y, "size": 5}
    options |= {"model": Network().double(), **change}
    model: Callable[..., Any] = options.pop("model")
    with pytest.raises(ValueError, match=message):
        micro_step(model, options.pop("batch"), options.pop("loss"), **options)
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        micro_batches(x, 0)
