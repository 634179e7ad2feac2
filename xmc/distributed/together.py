"""Work that goes well on all ranks or fails on all of them, so that none waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from xmc.distributed.collectives import World, gather_values
from xmc.distributed.launch import RankError

T = TypeVar("T")


def together(work: Callable[[], T], world: World) -> list[T]:
    """What `work` returns on every rank, plain enough for JSON, in order of rank.

    Raises its error where it failed and RankError, which names rank and reason, elsewhere.
    Sends the results.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as failure:
        error = failure
    answers = gather_values((None if error is None else f"{error}", result), world)
    if error is not None:
        raise error
    for rank, (reason, _) in enumerate(answers):
        if reason is not None:
            raise RankError(f"rank {rank}: {reason}")
    return [value for _, value in answers]


def on_rank(rank: int, work: Callable[[], T], world: World) -> T:
    """What `work` returns on one rank, to all of them. Errors as for `together`."""
    return together(lambda: work() if world.rank == rank else None, world)[rank]  # type: ignore[return-value]
