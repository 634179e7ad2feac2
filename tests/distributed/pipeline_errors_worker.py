"""What each rank does in test_pipeline_errors.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmc.distributed.collectives import World
from xmc.distributed.pipeline import Pipeline, differentiated

D = 3


class Stage(nn.Module):
    """A linear layer that may do something at its n-th forward pass."""

    def __init__(self, at: int = -1, act: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.at, self.act, self.calls = at, act, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.act is not None and self.calls == self.at:
            return self.act(self.linear(x))
        return self.linear(x)


def _wrong_features(x: Tensor) -> Tensor:
    return x[:, :2]


def _raise(_: Any) -> Any:
    raise ValueError("expected courage, got none")


def _text(_: Any) -> Any:
    return "no tensor"


def _kill(_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _late_failure(x: Tensor) -> Tensor:
    x.register_hook(_raise)
    return x


def _square(outputs: Tensor, index: int) -> Tensor:
    return (outputs**2).sum()


def _wrong_gradient(outputs: Tensor, index: int) -> tuple[Tensor, Tensor]:
    return outputs.sum(), outputs[:1]


def _two_gradients(outputs: Tensor, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return outputs.sum(), (outputs, outputs)


def _no_pair(outputs: Tensor, index: int) -> Any:
    return outputs.sum()


def _many_numbers(outputs: Tensor, index: int) -> tuple[Tensor, Tensor]:
    return outputs, outputs


# By name: stage, forward pass, what it does then.
STAGES = {
    "a stage raises": (1, 2, _raise),
    "a stage returns other features": (0, 2, _wrong_features),
    "a stage returns a text": (1, 1, _text),
    "a stage changes when it is run again": (0, 4, _wrong_features),
    "the last backward pass raises": (0, 4, _late_failure),
}
LOSSES: dict[str, Any] = {
    "the loss raises": lambda outputs, index: _raise(outputs),
    "a gradient of another shape": _wrong_gradient,
    "two gradients": _two_gradients,
    "a loss without gradient": _no_pair,
    "a loss of many numbers": _many_numbers,
    "no loss": None,
}
INPUTS: dict[str, Any] = {"no micro-batches": [], "no inputs": None}


def attempts(case: str, num_stages: int, number: int = 2) -> list[tuple[str, str]]:
    """What each of `number` steps raises: its type and its text with notes."""
    world = World.current()
    stage, at, act = STAGES.get(case, (-1, -1, None))
    is_here = world.rank == stage
    module = Stage(at if is_here else -1, act if is_here else None)
    loss = LOSSES.get(case, differentiated(_square))
    inputs = INPUTS.get(case, [torch.ones(2, D) for _ in range(4)])
    is_away = case.startswith("a rank stays away")
    timeout = 1.0 if is_away else 30.0
    again = "again" in case
    pipeline = Pipeline(module, num_stages=num_stages, checkpointing=again, timeout=timeout)
    if is_away and world.rank == 1:
        time.sleep(3)
        return []
    raised = []
    for _ in range(number):
        try:
            if case == "another call" and world.rank == 0:
                pipeline.represent(inputs)
            elif case == "a rank stays away from sums":
                pipeline.clip_gradients_(1.0)
            elif case == "a rank stays away from a long sweep":
                pipeline.represent(20 * inputs)
            else:
                pipeline.step(inputs, loss)
            raised.append(("", ""))
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", []))
            raised.append((type(error).__name__, f"{error}; {notes}" if notes else str(error)))
    return raised


def coupled(wanted: int) -> list[str]:
    """A loss of all micro-batches that returns another number of gradients."""
    pipeline = Pipeline(Stage(), num_stages=2, timeout=30)
    inputs = [torch.ones(2, D) for _ in range(3)]
    try:
        pipeline.coupled_step(inputs, lambda reps: (reps[0].sum(), reps[:wanted]))
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def settings(limits: list[int], cuts: list[int], num_stages: int) -> str:
    """What ranks that disagree raise when the pipeline is built."""
    rank = World.current().rank
    stages = [Stage() for _ in range(cuts[rank])]
    try:
        Pipeline(stages, num_stages=num_stages, pipeline_limit=limits[rank], timeout=30)
    except ValueError as error:
        return str(error)
    return ""


def main(rank: int, size: int, store: str) -> None:
    """A process of its own; the last rank is killed in its third forward pass."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    stage = Stage(3, _kill) if rank == size - 1 else Stage()
    with Pipeline(stage, num_stages=size, timeout=60) as pipeline:
        pipeline.step([torch.ones(2, D) for _ in range(6)], differentiated(_square))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
