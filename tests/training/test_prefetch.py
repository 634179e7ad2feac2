"""Copies ahead of their use: in order, never over a buffer that is still read, nothing lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.training import prefetch
from xmc.training.batch_size_search import AutoSize
from xmc.training.micro_batch import micro_step
from xmc.training.prefetch import AheadCopies, Copies, make_copies, stream
from xmc.types import Bag


@dataclass
class FakeEvent:
    engine: FakeDevice
    position: int  # copies begun before it

    def synchronize(self) -> None:
        self.engine.run(self.position)


class FakeDevice:
    """A device whose copies happen as late as they may: when somebody waits for them.

    What is read before its copy is done is NaN; a buffer written too early gives wrong numbers.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.buffers = 0
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._done = 0

    def pinned(self, num_bytes: int) -> Tensor:
        self.buffers += 1
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def copy(self, host: Tensor) -> Tensor:
        target = torch.full_like(host, -1 if not host.is_floating_point() else torch.nan)
        self._queue.append((target, host))
        self.log.append("copy")
        return target

    def record(self) -> FakeEvent:
        return FakeEvent(self, len(self._queue))

    def wait(self, event: Any) -> None:
        self.log.append("wait")
        self.run(event.position)

    def hand_over(self, tensor: Tensor) -> None:
        assert self._done
        self.log.append("hand over")

    def run(self, position: int) -> None:
        for target, host in self._queue[self._done : position]:
            target.copy_(host)
        self._done = max(self._done, position)


def parts() -> list[dict[str, Any]]:
    """Growing and shrinking, with another dtype and something that is no tensor."""
    found = []
    for number, rows in enumerate([3, 5, 5, 2, 7, 1]):
        bag = Bag(torch.arange(rows), torch.arange(rows + 1), torch.rand(rows))
        x = torch.full((rows, 3), float(number))
        found.append({"x": x, "bag": bag, "mask": torch.rand(rows) > 0.5, "name": str(number)})
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found["x"], expected["x"])
    assert torch.equal(found["mask"], expected["mask"])
    for name in ("ids", "offsets", "weights"):
        assert torch.equal(getattr(found["bag"], name), getattr(expected["bag"], name))
    assert found["name"] == expected["name"]


def test_every_part_arrives_whole_and_in_order() -> None:
    engine = FakeDevice()
    given = parts()
    for found, expected in zip(stream(given, Copies("cpu", engine)), given, strict=True):
        assert_same(found, expected)
        assert found["x"].data_ptr() != expected["x"].data_ptr()
    assert engine.buffers == 3  # two, one of which grew once


def test_the_next_copy_begins_before_the_present_part_is_computed() -> None:
    engine = FakeDevice()
    for found in stream([torch.ones(2), torch.ones(2), torch.ones(2)], Copies("cpu", engine)):
        engine.log.append(f"compute {int(found.sum())}")
    turn = ["copy", "wait", "hand over", "compute 2"]
    assert engine.log == ["copy", *turn, *turn, *turn[1:]]


def test_without_an_engine_nothing_is_copied_nor_read_ahead() -> None:
    read = []

    def source() -> Any:
        for number in range(3):
            read.append(number)
            yield torch.full((2,), float(number))

    given = []
    for found in stream(source(), make_copies("cpu")):
        assert read[-1] == int(found[0])
        given.append(found)
    assert read == [0, 1, 2]
    x = torch.rand(4, 2)
    assert AheadCopies(lambda a, b: x[a:b], 4, make_copies("cpu")).take(1, 3).data_ptr() == (
        x[1:].data_ptr()
    )


def test_a_guess_that_was_wrong_is_dropped() -> None:
    """After rows 0 to 4, 4 to 8 are on their way; 4 to 6 are wanted."""
    engine = FakeDevice()
    x = torch.arange(11.0)
    ahead = AheadCopies(lambda start, stop: x[start:stop], 11, Copies("cpu", engine))
    for start, stop in [(0, 4), (4, 6), (6, 8), (8, 10), (10, 11)]:
        assert torch.equal(ahead.take(start, stop), x[start:stop])
    assert engine.log.count("copy") == 6  # one of them for nothing
    ahead.drop()
    assert torch.equal(ahead.take(0, 2), x[:2])


@pytest.mark.parametrize("size", [4, AutoSize(10**9, first=3)])
def test_a_streamed_step_equals_one_without(
    monkeypatch: pytest.MonkeyPatch, size: int | AutoSize
) -> None:
    """An input that wants its gradient gets it, past the pinned buffers."""
    engine = FakeDevice()
    monkeypatch.setattr(prefetch, "CudaEngine", lambda device: engine)
    monkeypatch.setattr(
        "xmc.training.micro_batch.make_copies", lambda device: Copies(device, engine)
    )
    model = nn.Linear(3, 2).double()
    x = torch.randn(10, 3).double().requires_grad_()
    y = torch.randint(0, 2, (10,))
    F.cross_entropy(model(x), y).backward()
    truth = [model.weight.grad, x.grad]
    model.zero_grad(set_to_none=True)
    x.grad = None
    micro_step(model, x, F.cross_entropy, targets=y, size=size, device="cpu")
    assert engine.log.count("copy") >= 3  # the targets'
    for found, expected in zip([model.weight.grad, x.grad], truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1000, AutoSize(1 << 30)])
def test_a_gpu_streams_from_pageable_memory(size: int | AutoSize) -> None:
    """Long kernels between copies of pageable memory, whose buffers take turns."""
    model = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 1)).cuda().double()
    x, y = torch.randn(9500, 256).double(), torch.randn(9500, 1).double()
    F.mse_loss(model(x.cuda()), y.cuda()).backward()
    truth = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    step = micro_step(model, x, F.mse_loss, targets=y, size=size, device="cuda")
    assert len(step.sizes) > 1
    for parameter, expected in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_a_gpu_out_of_memory_is_recovered_from() -> None:
    """Rows of 4 MiB of output each, under a limit that the first size passes."""
    model = nn.Linear(8, 1 << 20).cuda()
    x = torch.randn(40, 8)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return output.square().mean()

    loss(model(x.cuda()), x).backward()
    truth = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    size = AutoSize(400 << 20, first=40)
    step = micro_step(model, x, loss, size=size, device="cuda")
    assert len(step.sizes) > 1
    for parameter, expected in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
