"""Buckets cover all, copies wait for what they must, pages are pinned and given back."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xmc.distributed import host_memory, offload_stage
from xmc.distributed.host_memory import host_zeros
from xmc.distributed.offload import OffloadedAdamW
from xmc.distributed.offload_buckets import ALIGNMENT, Layout, lay_out
from xmc.distributed.offload_stage import walk

sizes = st.lists(st.integers(0, 300), max_size=8)
bucket_sizes = st.integers(1, 12).map(lambda n: n * ALIGNMENT)


@given(sizes=sizes, bucket_size=bucket_sizes)
@settings(deadline=None)
def test_buckets_hold_every_number_once_and_parameters_whole(
    sizes: list[int], bucket_size: int
) -> None:
    layout = lay_out(sizes, bucket_size)
    owner = torch.full((layout.length,), -1)
    position = torch.full((layout.length,), -1)
    end = 0
    for bucket in layout.buckets:
        assert bucket.start == end
        assert 0 < bucket.length <= bucket_size
        assert bucket.pieces
        end += bucket.length
        for piece in bucket.pieces:
            assert piece.offset % ALIGNMENT == piece.start % ALIGNMENT == 0
            assert 0 < piece.length <= bucket.length - piece.offset
            span = slice(bucket.start + piece.offset, bucket.start + piece.offset + piece.length)
            assert bool((owner[span] == -1).all())
            owner[span] = piece.slot
            position[span] = torch.arange(piece.start, piece.start + piece.length)
    assert end == layout.length
    assert layout.length - sum(sizes) < ALIGNMENT * max(len(sizes), 1)  # padding
    for slot, (start, size) in enumerate(zip(layout.starts, sizes, strict=True)):
        assert owner[start : start + size].tolist() == [slot] * size
        assert position[start : start + size].tolist() == list(range(size))


@given(sizes=sizes, other=sizes, bucket_size=bucket_sizes)
@settings(deadline=None)
def test_a_parameter_is_cut_alike_whatever_lies_beside_it(
    sizes: list[int], other: list[int], bucket_size: int
) -> None:
    def cuts(layout: Layout, slot: int) -> list[tuple[int, int]]:
        pieces = itertools.chain.from_iterable(bucket.pieces for bucket in layout.buckets)
        return [(piece.start, piece.length) for piece in pieces if piece.slot == slot]

    alone, together = lay_out([200], bucket_size), lay_out([*sizes, 200, *other], bucket_size)
    assert cuts(alone, 0) == cuts(together, len(sizes))


@pytest.mark.parametrize("bucket_size", [0, -16, 24])
def test_bucket_sizes_keep_pieces_aligned(bucket_size: int) -> None:
    with pytest.raises(ValueError, match=f"in multiples of 16, got {bucket_size}"):
        lay_out([3], bucket_size)


class Streams:
    """In the place of torch.cuda: runs all at once, in order, and notes what was sure to wait.

    Each stream has a vector clock; an operation happened before another if the other's clock has
    seen it. `hazards` are pairs of operations on the same memory, one of them writing, that could
    have run in any order or together.
    """

    def __init__(self) -> None:
        self.compute = self.Stream()
        self.running = self.compute
        self.done: list[tuple[Any, dict[Any, int], dict[int, bool]]] = []
        self.hazards: list[tuple[int, int]] = []
        parent = self

        class Event:
            clock: dict[Any, int] = {}  # noqa: RUF012 - replaced, never changed

            def record(self, stream: Streams.Stream) -> None:
                self.clock = dict(stream.clock)

        class Noting(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
            ) -> Any:
                parent.note(func, args)
                return func(*args, **(kwargs or {}))

        self.Event, self.noting = Event, Noting()

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.clock: dict[Any, int] = {}

        def wait_event(self, event: Any) -> None:
            for stream, count in event.clock.items():
                self.clock[stream] = max(count, self.clock.get(stream, 0))

        def wait_stream(self, other: Streams.Stream) -> None:
            self.wait_event(other)

    def current_stream(self, device: Any) -> Streams.Stream:
        return self.running

    @contextmanager
    def stream(self, stream: Streams.Stream) -> Iterator[None]:
        before, self.running = self.running, stream
        yield
        self.running = before

    def note(self, func: Any, args: tuple[Any, ...]) -> None:
        touched: dict[int, bool] = {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    for address in range(
                        tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor.itemsize
                    ):
                        touched[address] = touched.get(address, False) or writes
        if func.is_view or not touched:
            return
        stream = self.running
        stream.clock[stream] = stream.clock.get(stream, 0) + 1
        for number, (other, clock, addresses) in enumerate(self.done):
            if stream.clock.get(other, 0) >= clock[other]:
                continue
            shared = touched.keys() & addresses.keys()
            if any(touched[address] or addresses[address] for address in shared):
                self.hazards.append((number, len(self.done)))
        self.done.append((stream, dict(stream.clock), touched))


def hazards_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[Streams, list[Tensor]]:
    """Twice over seven buckets of two rows, then the memory of the buffers used again."""
    streams = Streams()
    monkeypatch.setattr(offload_stage, "cuda", streams)
    monkeypatch.setattr(offload_stage, "_has_streams", lambda device: True)
    layout = lay_out([100, 7, 31], 16)
    assert len(layout.buckets) == 10
    rows = [torch.zeros(layout.length), torch.ones(layout.length)]
    buffers: list[Tensor] = []
    empty = torch.empty

    def kept(*args: Any, **kwargs: Any) -> Tensor:
        buffers.append(empty(*args, **kwargs))
        return buffers[-1]

    monkeypatch.setattr(torch, "empty", kept)
    with streams.noting:
        for _ in range(2):
            for _, (first, second) in walk(layout.buckets, rows, torch.device("cpu"), staged=True):
                first.add_(second)
        for buffer in buffers:
            buffer.fill_(0)
    assert len(buffers) == 2 * 2 * 2
    return streams, rows


def test_copies_wait_for_what_they_need_and_run_beside_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams, rows = hazards_of_two_steps(monkeypatch)
    assert streams.hazards == []
    assert bool((rows[0] == 2).all())
    # Of one step: copies in (two rows each), sums, copies out. What is unordered may overlap.
    kinds = {
        stream: number for number, stream in enumerate(dict.fromkeys(d[0] for d in streams.done))
    }
    assert len(kinds) == 1 + 2 * 2  # the streams of compute, and in and out of each step
    step = streams.done[:50]

    def overlapping(first: int, second: int) -> bool:
        """Whether neither of two operations waits for the other."""
        (one, its, _), (other, others, _) = step[first], step[second]
        return its.get(other, 0) < others[other] and others.get(one, 0) < its[one]

    by_stream = {
        number: [i for i, d in enumerate(step) if kinds[d[0]] == number] for number in range(3)
    }
    inward, compute, outward = by_stream[0], by_stream[1], by_stream[2]
    assert (len(inward), len(compute), len(outward)) == (20, 10, 20)
    for bucket in range(1, 9):
        # The next comes in, and the one before goes home, while this one is computed on.
        assert overlapping(compute[bucket], inward[2 * bucket + 2])
        assert overlapping(compute[bucket], outward[2 * bucket - 2])
        assert overlapping(inward[2 * bucket + 2], outward[2 * bucket])


@pytest.mark.parametrize("left_out", ["wait_event", "wait_stream", "join", "await_fetched"])
def test_a_missing_wait_would_be_seen(monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    owner = Streams.Stream if left_out.startswith("wait") else offload_stage._Lanes
    monkeypatch.setattr(owner, left_out, lambda *_: None)
    streams, _ = hazards_of_two_steps(monkeypatch)
    assert streams.hazards


def test_a_step_that_stops_half_way_leaves_no_copy_unawaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams()
    monkeypatch.setattr(offload_stage, "cuda", streams)
    monkeypatch.setattr(offload_stage, "_has_streams", lambda device: True)
    layout, rows = lay_out([100], 16), [torch.zeros(112)]
    walking = walk(layout.buckets, rows, torch.device("cpu"), staged=True)
    with streams.noting:
        next(walking)
        next(walking)
        walking.close()
        rows[0].fill_(1)
    assert streams.hazards == []


def test_pages_are_pinned_and_given_back_with_the_last_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []

    def noted(name: str) -> Callable[..., int]:
        def call(address: int, *rest: int) -> int:
            calls.append((name, address))
            assert rest in {(400, 0), ()}
            return 0

        return call

    runtime = SimpleNamespace(
        cudaHostRegister=noted("register"), cudaHostUnregister=noted("unregister")
    )
    monkeypatch.setattr(host_memory, "cuda", fake_cuda(runtime, calls))
    memory = host_zeros(100, torch.float32, torch.device("cuda", 0))
    address = memory.data_ptr()
    assert calls == [("register", address)]
    assert memory.tolist() == [0] * 100
    view = memory[90:].view(2, 5)
    del memory
    gc.collect()
    view += 3
    assert view.tolist() == [[3] * 5] * 2
    assert len(calls) == 1
    del view
    gc.collect()
    assert calls[1:] == [("synchronize", 0), ("unregister", address)]


def test_a_system_that_pins_no_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(host_memory, "cuda", fake_cuda(runtime, []))
    message = "expected to pin 4,000 bytes of host memory for cuda:0, got CUDA error 2"
    with pytest.raises(RuntimeError, match=message):
        host_zeros(1000, torch.float32, torch.device("cuda", 0))


def fake_cuda(runtime: SimpleNamespace, calls: list[tuple[str, int]]) -> SimpleNamespace:
    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        assert device.type == "cuda"
        yield

    def synchronize(device: torch.device) -> None:
        calls.append(("synchronize", device.index))

    return SimpleNamespace(device=device, cudart=lambda: runtime, synchronize=synchronize)


def parameters_on(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(1000, 77), (5000,), (33, 3), ()]
    return [nn.Parameter(torch.randn(s, generator=draw).to(device, dtype)) for s in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bucket_size", [4096, 2**22])
def test_a_gpu_takes_the_steps_of_a_cpu(dtype: torch.dtype, bucket_size: int) -> None:
    here, there = parameters_on("cpu", dtype), parameters_on("cuda", dtype)
    optimizers = [
        OffloadedAdamW(p, lr=0.01, max_norm=1.0, bucket_size=bucket_size) for p in (here, there)
    ]
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        for one, other in zip(here, there, strict=True):
            one.grad = torch.randn(one.shape, generator=draw).to(dtype)
            other.grad = one.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[1].overflows == 0
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for slot, state in states[0].items():
        for name, value in state.items():
            found = states[1][slot][name]
            assert found.device.type == "cpu"
            assert name == "step" or found.is_pinned()
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    for one, other in zip(here, there, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-6)
        else:
            master = optimizers[1].state[other]["master"]
            assert torch.equal(other.detach().cpu(), master.to(dtype))


@pytest.mark.gpu
def test_a_gpu_repeats_its_bits_and_skips_overflows_whole() -> None:
    results = []
    for disturbed in (False, True):
        parameters = parameters_on("cuda", torch.bfloat16)
        optimizer = OffloadedAdamW(parameters, lr=0.01, bucket_size=4096)
        draw = torch.Generator().manual_seed(1)
        for step in range(10):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter)
            if disturbed and step == 4:
                last = parameters[-1].grad
                assert last is not None
                kept = last.clone()
                last.fill_(torch.inf)
                with pytest.warns(UserWarning, match="not finite"):
                    optimizer.step()
                last.copy_(kept)
            optimizer.step()
        results.append([p.detach().cpu() for p in parameters])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_holds_no_more_than_was_said() -> None:
    parameters = [nn.Parameter(torch.zeros(3_000_000, dtype=torch.bfloat16, device="cuda"))]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - parameters[0].nbytes
    optimizer = OffloadedAdamW(parameters, bucket_size=2**18)
    parameters[0].grad = torch.ones_like(parameters[0])
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= optimizer.device_bytes() + 2**20
    assert torch.cuda.memory_allocated() - before <= 4 * 3_000_000 + 2**20
