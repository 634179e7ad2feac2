"""Where the processes that torchrun starts become ranks, and how they end together.

A process that torchrun did not start is alone, and nothing here does anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from xmc.distributed.collectives import World, agreed
from xmc.distributed.torchrun import launched_local_rank, launched_ranks

T = TypeVar("T")

# A rank that has ended is noticed at once. This is for one that hangs.
_TIMEOUT = timedelta(minutes=30)
_PATIENCE = timedelta(days=1)  # of ranks that wait for rank 0 to read a large data set


class RankError(RuntimeError):
    """This rank cannot go on because of another."""


class OtherRankError(RankError):
    """Rank 0 failed in what it did for all, and says why itself."""


def join_ranks(timeout: timedelta = _TIMEOUT) -> World:
    """The ranks that torchrun started, in a group made at the first call; else this process alone.

    gloo carries tensors of the CPU, NCCL those of GPUs. `timeout` is how long a rank waits for
    another that lives and does not answer.
    """
    if not dist.is_available() or dist.is_initialized() or launched_ranks() == 1:
        return World.current()
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timeout)
    except RuntimeError as error:
        if "connect" not in str(error):
            raise
        raise RankError(
            f"cannot reach the other ranks: {_reason(error)} (between machines, GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME name the network interface, such as eth0)"
        ) from error
    return World.current()


@contextmanager
def ranks(timeout: timedelta = _TIMEOUT) -> Iterator[World]:
    """`join_ranks` for a block, after which the group is gone; `lost_ranks` holds inside."""
    world = join_ranks(timeout)
    with lost_ranks():
        yield world
    # Not after an error: that this process ends is what tells the others.
    if world.size > 1:
        dist.destroy_process_group()


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turns what torch.distributed says of a rank that is gone into a RankError of one line.

    For a block or, as a decorator, a function.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise RankError(f"another rank has ended or does not answer: {_reason(error)}") from error


def local_device(kind: str) -> torch.device:
    """This process's own device of a kind, "cpu" or "cuda": the LOCAL_RANK-th GPU, made current.

    Raises ValueError where this machine has fewer GPUs than ranks.
    """
    if kind != "cuda" or launched_ranks() == 1:
        return torch.device(kind)
    local, count = launched_local_rank(), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"expected at most {count} ranks on this machine, one a GPU, got rank {local} "
            "(torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def on_rank0(work: Callable[[], T], world: World) -> T | None:
    """What `work` returns on rank 0, None on the others, which wait for it.

    Raises its error on rank 0 and OtherRankError on the others. Sends one flag.
    """
    if world.size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    patient = World(world.rank, world.size, group)
    result, done = None, False
    try:
        if world.rank == 0:
            result = work()
            done = True
    finally:
        # On rank 0 whatever happens, so that the others do not wait for what never comes.
        done = agreed(done, patient)
        dist.destroy_process_group(group)
    if not done:
        raise OtherRankError("rank 0 has failed")
    return result


def rank0_first(work: Callable[[], T], world: World) -> T:
    """What `work` returns on each rank, called by rank 0 before the others.

    For work that fills a cache on disk which the others then read. Errors as for `on_rank0`.
    """
    result = on_rank0(work, world)
    return result if world.rank == 0 else work()  # type: ignore[return-value]


def from_rank0(items: Iterable[T], world: World, size: int = 256) -> Iterator[T]:
    """The items of rank 0, plain enough for JSON, on all ranks; the others' are not read.

    Sends them `size` at a time. Where reading them fails, rank 0 raises the error and the others
    OtherRankError.
    """
    if world.size == 1:
        yield from items
        return
    iterator = iter(items if world.rank == 0 else ())
    while True:
        chunk, done = None, False
        try:
            chunk = list(islice(iterator, size))
            done = True
        finally:
            chunk = agreed(chunk if done else None, world)
        if chunk is None:
            raise OtherRankError("rank 0 has failed")
        if not chunk:
            return
        yield from chunk


def _reason(error: RuntimeError) -> str:
    """Without the file of the library that noticed, and its advice."""
    return re.sub(r"^\[\S*\] ", "", str(error)).split("\n", 1)[0].split(". ", 1)[0]


def _is_lost(error: RuntimeError) -> bool:
    if not dist.is_initialized() or isinstance(error, RankError):
        return False
    text = str(error)
    known = type(error) is RuntimeError and ("gloo" in text or "NCCL" in text)
    return known or isinstance(error, dist.DistError)
