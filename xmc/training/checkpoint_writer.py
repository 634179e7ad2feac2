"""Checkpoints of a run, one at a time, written while training goes on where that is wanted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.training.checkpoint import save_checkpoint


class CheckpointWriter:
    """`save_checkpoint` into one folder; with `background`, by a thread.

    In the background `save` returns when this rank's tensors are copied to host memory, which holds
    them until they are written, and the next `save` waits for that. A process that is killed
    meanwhile leaves the checkpoint before. What went wrong is raised by the next `save` or `wait`,
    and by the end of a `with` block. With several ranks all of torch's default group make a writer
    together: its thread has a group of its own, so that it never meets the messages of training.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        world: World = World.alone(),
        background: bool = False,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._world = world
        self._pending: Future[Path] | None = None
        self._thread: ThreadPoolExecutor | None = None
        if background:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            if world.size > 1:
                members = dist.get_process_group_ranks(world.group)
                group = dist.new_group(members, backend="gloo")
                self._world = World(world.rank, world.size, group)

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        row_shards: Mapping[str, RowShard] | None = None,
    ) -> None:
        """Write a checkpoint, or begin to; arguments as of `save_checkpoint`."""
        self.wait()
        if self._thread is not None:
            written = set(row_shards or {}) if self._world.rank else set(tensors)
            # A copy on the host also where the tensor lies there: training goes on changing it.
            tensors = {name: tensors[name].detach().to("cpu", copy=True) for name in written}
            state = copy.deepcopy(state)

        def work() -> Path:
            return save_checkpoint(
                self._folder,
                step=step,
                tensors=tensors,
                state=state,
                keep=self._keep,
                world=self._world,
                row_shards=row_shards,
            )

        if self._thread is None:
            work()
        else:
            self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Return when the last checkpoint is complete; raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()  # completes what has begun
            if self._thread is not None and self._world.size > 1 and error is None:
                dist.destroy_process_group(self._world.group)
