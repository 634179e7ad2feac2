"""Our loss over a batch that nothing else here can hold, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from contrastive_baselines import SCALE, differentiated, tiled_loss
from contrastive_jobs import TILED, Inputs, Shape
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timing import cpu_clock, give_back_memory, peak_extra_bytes

from xmc.memory import resident_bytes
from xmc_kernels._cpu import similarity


def measure_large(shape: Shape) -> dict[str, Any]:
    """A record of one run on the CPU: time, and memory above what the imports hold."""
    run = differentiated(tiled_loss)
    run(*Inputs(Shape(2 * similarity.TILE, shape.D), "cpu")[0])  # compiles
    give_back_memory()
    before = resident_bytes()
    torch.manual_seed(0)
    q, k = Inputs(shape, "cpu", batches=1)[0]
    give_back_memory()
    with_inputs = resident_bytes()
    times: list[float] = []

    def timed() -> None:
        with tiles_shown(shape):
            times.append(cpu_clock(lambda: run(q, k)))

    extra = peak_extra_bytes(timed, "cpu")
    above = None if extra is None else with_inputs - before + extra
    (milliseconds,) = times
    return {
        "operation": "loss",
        "what": TILED,
        **asdict(shape),
        "scale": SCALE,
        "input_batches": 1,
        **dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), round(milliseconds, 4)),
        "runs": 1,
        "peak_extra_bytes": extra,
        "peak_above_import_bytes": above,
        "bytes_per_element": None if extra is None else round(extra / (shape.B * shape.D), 2),
        "gflop_per_s": round(shape.flops / milliseconds / 1e6, 3),
    }


@contextmanager
def tiles_shown(shape: Shape) -> Iterator[Progress]:
    """A bar of the sweeps over tiles inside: two a tile, one for each pass."""
    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    total = 2 * (-(-shape.B // similarity.TILE)) ** 2
    sweep = similarity.Engine.sweep

    def counted(engine: similarity.Engine, *args: Any, **kwargs: Any) -> None:
        sweep(engine, *args, **kwargs)
        bar.advance(task)

    # The operation has no hook for progress: a training step has its own bar.
    with (
        Progress(TextColumn(f"B={shape.B:,}"), *columns, console=console) as bar,
        mock.patch.object(similarity.Engine, "sweep", counted),
    ):
        task = bar.add_task("tiles", total=total)
        yield bar
