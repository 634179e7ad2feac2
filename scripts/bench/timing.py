"""Time jobs against each other: interleaved, warmed up, with rotating inputs and peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCHES = 6
"""Inputs that take turns."""
_LEAST = 5  # runs of a job, however long it takes
_LEAST_SLOW = 3  # of one that takes more than _SLOW
_SLOW = 500  # ms
_FLUSH_BYTES = 128 * 2**20  # more than a GPU's second-level cache


@dataclass(frozen=True)
class Job:
    """One variant of one operation, ready to run."""

    operation: str
    what: str
    run: Callable[[int], object]
    """Takes the number of an input, below BATCHES."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its record: shape, dtype and so on."""
    flops: float = 0.0
    state_bytes: int = 0
    """Weights, indices, biases and moments read, plus those written, once each."""
    ours: bool = False
    """A failure is an error; another's is a line that says so."""


def copy_job(num_bytes: int, device: str) -> Job:
    """A plain copy of so many bytes, which counts as twice as many moved."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Job("copy", "memory copy", lambda _: target.copy_(source), state_bytes=2 * num_bytes)


def time_jobs(
    jobs: Sequence[Job], device: str, *, seconds: float, repeats: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A record per job, and what went wrong with our own.

    Each job runs at most `repeats` times and stops when it has used its share of `seconds`, after
    five runs (three where one takes half a second). A "memory copy" among the jobs becomes the
    measure of the others' bytes per second.
    """
    records: dict[int, dict[str, Any]] = {}
    failures = []
    memory: dict[int, int | None] = {}
    gc.collect()
    for number, job in enumerate(jobs):
        records[number] = {"operation": job.operation, "what": job.what, **job.about}
        try:
            job.run(0)
            memory[number] = peak_extra_bytes(functools.partial(job.run, 1), device)
        except Exception as error:  # whatever a library raises becomes a line, or fails the suite
            records[number]["not_available"] = reason(error)
            if job.ours:
                failures.append(f"{job.operation}, {job.what}: {reason(error)}")
    kept = {number: jobs[number] for number in memory}
    times = _interleaved(kept, device, seconds, repeats)
    copies = [n for n, job in kept.items() if job.operation == "copy"]
    rate = kept[copies[0]].state_bytes / float(np.median(times[copies[0]])) if copies else None
    for number, values in times.items():
        job = kept[number]
        low, median, high = (float(q) for q in np.quantile(values, [0.2, 0.5, 0.8]))
        records[number] |= {
            "median_ms": round(median, 4),
            "p20_ms": round(low, 4),
            "p80_ms": round(high, 4),
            "runs": len(values),
            "peak_extra_bytes": memory[number],
            "state_gb_per_s": round(job.state_bytes / median / 1e6, 3),
        }
        if job.flops:
            records[number]["gflop_per_s"] = round(job.flops / median / 1e6, 3)
        if rate is not None:
            records[number]["copy_gb_per_s"] = round(rate / 1e6, 3)
            records[number]["share_of_copy"] = round(job.state_bytes / median / rate, 4)
    return list(records.values()), failures


def _interleaved(
    jobs: Mapping[int, Job], device: str, seconds: float, repeats: int
) -> dict[int, list[float]]:
    """Milliseconds of each run, one run of every unfinished job after the other."""
    clock = cuda_clock() if device == "cuda" else cpu_clock
    times: dict[int, list[float]] = {number: [] for number in jobs}
    share = 1e3 * seconds / max(1, len(jobs))

    def unfinished(values: list[float]) -> bool:
        least = _LEAST_SLOW if values and min(values) > _SLOW else _LEAST
        return len(values) < min(least, repeats) or (len(values) < repeats and sum(values) < share)

    turn = 0
    while waiting := [number for number, values in times.items() if unfinished(values)]:
        for number in waiting:
            run = functools.partial(jobs[number].run, turn % BATCHES)
            times[number].append(clock(run))
        turn += 1
    return times


def cpu_clock(run: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def cuda_clock() -> Callable[[Callable[[], object]], float]:
    """Milliseconds between events around a run that starts with a cold second-level cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def clock(run: Callable[[], object]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    return clock


def peak_extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """What one run holds at its peak, its result included: of CUDA memory or resident set.

    The resident set grows by whole pages; Linux only.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        run()
        return None
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def give_back_memory() -> None:
    """Let the C library return freed memory, which counts as resident until then; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reason(error: Exception) -> str:
    """The first line of an error, without one machine's paths."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?<!\w)/[\w./-]+", "PATH", lines[0])
    return f"{type(error).__name__}: {text}"[:200]
