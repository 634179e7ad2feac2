"""What the ranks of a loss have to know of each other before they exchange rows.

A rank whose arguments are wrong would leave the others waiting in the middle of an exchange. So
each checks its own first, and tells the others what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from xmc.distributed.collectives import World, gather_rows

T = TypeVar("T")

_MOST = 16  # numbers of a rank


def told(
    prepare: Callable[[], tuple[T, Mapping[str, float]]], world: World, device: torch.device
) -> tuple[T, dict[str, list[float]]]:
    """What `prepare` returns, and each of its numbers on every rank. Sends 16 numbers a rank.

    Raises what it raises; the other ranks raise RuntimeError then. They do as well where they
    called another function.
    """
    try:
        prepared, numbers = prepare()
    except Exception:  # whatever it is, the others wait to hear of it
        _gathered([0.0], world, device)
        raise
    rows = _gathered([1.0 + len(numbers), *numbers.values()], world, device)
    wrong = [rank for rank, row in enumerate(rows) if row[0] == 0]
    if wrong:
        raise RuntimeError(
            f"expected fitting arguments on every rank of a loss, rank {wrong[0]} raised an error"
        )
    if len({row[0] for row in rows}) > 1:
        raise RuntimeError("expected the same loss on every rank, got different ones")
    return prepared, {name: [row[at] for row in rows] for at, name in enumerate(numbers, 1)}


def check_same(name: str, values: list[float], *, within: float = 0.0) -> None:
    """Raise ValueError, on every rank, where a number differs over ranks."""
    if max(values) - min(values) > within * max(map(abs, values)):
        shown = [int(value) if value == int(value) else value for value in values]
        raise ValueError(f"expected the same {name} on every rank, got {shown}")


def _gathered(row: list[float], world: World, device: torch.device) -> list[list[float]]:
    if len(row) > _MOST:
        raise AssertionError(f"expected at most {_MOST} numbers, got {len(row)}")
    padded = torch.tensor([row + [0.0] * (_MOST - len(row))], dtype=torch.float64, device=device)
    return gather_rows(padded, [1] * world.size, world).tolist()
