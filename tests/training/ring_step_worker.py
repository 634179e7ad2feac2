"""What each rank does in test_ring_step.py: cached steps with a loss of the rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmc.distributed import data_parallel
from xmc.distributed.collectives import World
from xmc.distributed.data_parallel import replicated
from xmc.losses import InfoNCE
from xmc.training.cached import cached
from xmc.training.grad_cache import cached_step

D = 5


def towers(tied: bool, dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(2)
    made = [nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D)) for _ in range(2)]
    return [m.to(dtype) for m in ([made[0], made[0]] if tied else made)]


def criterion(dtype: torch.dtype) -> InfoNCE:
    return InfoNCE(6.0, learnable=True, symmetric=True).to(dtype)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The sums of gradients that are started: of DDP's buckets, and FSDP's reduce-scatters."""
    calls: list[str] = []
    name = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n))
    scatter, bucket = getattr(dist, name), data_parallel._bucket_sum

    def count_scatter(*arguments: Any, **options: Any) -> Any:
        calls.append("fsdp")
        return scatter(*arguments, **options)

    def count_bucket(*arguments: Any) -> Any:
        calls.append("ddp")
        return bucket(*arguments)

    setattr(dist, name, count_scatter)
    data_parallel._bucket_sum = count_bucket
    try:
        yield calls
    finally:
        setattr(dist, name, scatter)
        data_parallel._bucket_sum = bucket


def step(
    kind: Any, tied: bool, rows: list[Tensor], keys: list[Tensor], options: dict[str, Any]
) -> Any:
    """Two steps; the loss, gradients by name, and how often gradients were summed in the second.

    Ranks have chunks of their own size where `options` say so.
    """
    world, exchange = World.current(), options.pop("exchange", "ring")
    q, k = rows[world.rank], keys[world.rank]
    made, loss = towers(tied, q.dtype), criterion(q.dtype)
    wrapped: dict[nn.Module, nn.Module] = {}
    for module in dict.fromkeys(made):
        assert isinstance(module, nn.Sequential)
        wrapped[module] = replicated(module, world, kind, blocks=[module[0], module[2]])
    encoders = [wrapped[module] for module in made]
    chunk = options.pop("chunk")
    chunk = chunk[world.rank] if isinstance(chunk, list) else chunk

    def of_all(q: Tensor, k: Tensor) -> Tensor:
        return loss(q, k, world=world, exchange=exchange)

    try:
        for _ in range(2):  # the second step of DDP has its buckets in the order of gradients
            for module in (*made, loss):
                module.zero_grad()
            with counted() as calls:
                value = _run(options, encoders, [q, k], of_all, chunk)
    except ValueError as error:
        return str(error)
    grads = {}
    for index, module in enumerate(dict.fromkeys(made)):
        for name, parameter in module.named_parameters():
            grad: Any = parameter.grad
            grads[f"{index}.{name}"] = grad.full_tensor() if kind == "fsdp" else grad
    scale = loss.log_scale.grad
    assert scale is not None
    dist.all_reduce(scale)
    return {"loss": value, "grads": grads, "scale": scale, "sums": calls}


def _run(
    options: dict[str, Any],
    encoders: list[nn.Module],
    inputs: list[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk: int,
) -> Tensor:
    if options.get("decorated"):
        encode = cached(chunk=chunk)
        value = loss(*(encode(f)(x) for f, x in zip(encoders, inputs, strict=True)))
        value.backward()
        return value.detach()
    kept = options.get("kept")
    return cached_step(encoders, inputs, loss, chunk=chunk, kept=kept)
