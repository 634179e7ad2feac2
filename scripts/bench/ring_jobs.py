"""The ranks of the benchmark of losses over ranks: variants, their time, memory and messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import peak_extra_bytes
from torch import Tensor

from xmc.distributed import collectives
from xmc.distributed.collectives import World, gather_rows, scatter_sum
from xmc.losses import info_nce

SCALE = 20.0
MATERIALISED = "materialised"
Loss = Callable[[Tensor, Tensor], Tensor]


class _Gathered(torch.autograd.Function):
    """The rows of all ranks; their gradients are summed where they belong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world, ctx.counts = world, [len(x)] * world.size
        return gather_rows(x, ctx.counts, world)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(d_x, ctx.counts, ctx.world), None


def materialised(q: Tensor, k: Tensor, world: World) -> Tensor:
    """This rank's part of the loss; the sum over ranks is the loss."""
    all_q, all_k = _Gathered.apply(q, world), _Gathered.apply(k, world)
    own = torch.arange(len(q)) + world.rank * len(q)
    rows, columns = SCALE * q @ all_k.T, SCALE * k @ all_q.T
    total = F.cross_entropy(rows, own, reduction="sum")
    total = total + F.cross_entropy(columns, own, reduction="sum")
    return total / (2 * world.size * len(q))


def variants(world: World) -> dict[str, tuple[str, Loss]]:
    """What is compared: name, dtype on the wire, loss."""
    given: dict[str, tuple[str, Loss]] = {
        MATERIALISED: ("float32", lambda q, k: materialised(q, k, world))
    }
    for exchange in ("ring", "gather"):
        for wire in (None, torch.bfloat16):

            def loss(q: Tensor, k: Tensor, exchange: str = exchange, wire: Any = wire) -> Tensor:
                return info_nce(
                    *(q, k),
                    scale=SCALE,
                    symmetric=True,
                    world=world,
                    exchange=exchange,
                    wire_dtype=wire,
                )

            name = exchange if wire is None else f"{exchange} bfloat16"
            given[name] = ("float32" if wire is None else "bfloat16", loss)
    return given


def measure(rank: int, folder: str, ranks: int, rows: int, dim: int, runs: int) -> None:
    """One rank: time every variant; rank 0 writes `lines.json`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    try:
        lines = _measure(World.current(), rows, dim, runs)
        if rank == 0:
            Path(folder, "lines.json").write_text(json.dumps(lines))
    finally:
        dist.destroy_process_group()


def _measure(world: World, rows: int, dim: int, runs: int) -> list[dict[str, Any]]:
    torch.manual_seed(world.rank)
    noise = torch.randn(2, rows, dim)
    q, k = F.normalize(noise[0], dim=1), F.normalize(noise[0] + noise[1], dim=1)
    jobs = variants(world)

    def step(loss: Loss) -> tuple[Tensor, Tensor]:
        x, y = q.detach().requires_grad_(), k.detach().requires_grad_()
        loss(x, y).backward()
        assert x.grad is not None and y.grad is not None
        return x.grad, y.grad

    truth = step(jobs[MATERIALISED][1])
    about: dict[str, dict[str, Any]] = {}
    for name, (wire, loss) in jobs.items():
        step(loss)  # compiled, and connected
        with counted(world) as sent:
            ours = step(loss)
        error = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True)
        )
        peak = peak_extra_bytes(lambda loss=loss: step(loss), "cpu")  # type: ignore[misc]
        worst = torch.tensor([-1.0 if peak is None else peak, error], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=world.group)
        about[name] = {
            "what": name,
            "wire": wire,
            "sent_bytes": sum(sent),
            "peak_extra_bytes": None if peak is None else int(worst[0]),
            "gradient_difference": float(worst[1]),
        }
    seconds: dict[str, list[Tensor]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, (_, loss) in jobs.items():  # in turn
            dist.barrier()
            started = time.perf_counter()
            step(loss)
            seconds[name].append(torch.tensor(time.perf_counter() - started))
    for name, times in seconds.items():
        slowest = torch.stack(times).double()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=world.group)
        low, median, high = 1e3 * np.quantile(slowest.numpy(), [0.2, 0.5, 0.8])
        about[name] |= {"median_ms": round(median, 3), "p20_ms": round(low, 3)}
        about[name] |= {"p80_ms": round(high, 3), "runs": runs}
    return list(about.values())


@contextmanager
def counted(world: World) -> Iterator[list[int]]:
    """Bytes that this rank sends to others: of a collective, what a ring of its ranks would."""
    sent: list[int] = []
    others = world.size - 1
    start, exchange = dist.batch_isend_irecv, dist.all_to_all_single
    gather, scatter, reduce = collectives._all_gather, collectives._reduce_scatter, dist.all_reduce

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.append(sum(o.tensor.nbytes for o in operations if o.op is dist.isend))
        return start(operations)

    def counting(function: Any, share: float, which: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            sent.append(int(share * arguments[which].nbytes))
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for module, name, function in (
            (dist, "batch_isend_irecv", batch),
            (dist, "all_to_all_single", counting(exchange, others / world.size, 1)),
            (dist, "all_reduce", counting(reduce, 2 * others / world.size, 0)),
            (collectives, "_all_gather", counting(gather, others, 1)),
            (collectives, "_reduce_scatter", counting(scatter, others / world.size, 1)),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        yield sent
