"""Time the classifier's operations on a CPU or a GPU against what torch offers for the same job.

    python scripts/bench/classifier.py [--labels 131072 --features 768 --fan-in 32 --batch 64]
    python scripts/bench/classifier.py --sweep labels|fan-in|batch|all [--plot] [--threads 2]
    python scripts/bench/classifier.py --table        (markdown from the lines measured before)
    python scripts/bench/classifier.py --plot         (plots from the lines measured before)

Operations: a training step (binary cross-entropy, SGD unless named), forward, forward and
backward, the five best labels. Numbers are random and six batches take turns; variants are
interleaved, one run of each after the other, beside a memory copy (read and write counted) that
gives the rate to compare with. On a GPU every run starts with a cold second-level cache. Peak
memory is what one run adds, its result included.

Appends a JSON line per operation, variant and shape to `scripts/bench/results/classifier.jsonl`.
What runs the plain torch reference instead of a compiled kernel is left out unless `--reference`
asks for it; what torch cannot do here becomes a line that says why.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from classifier_baselines import TORCH_SPARSE, dense_fits, dense_jobs, torch_sparse_jobs
from classifier_jobs import (
    OPERATIONS,
    Inputs,
    Shape,
    Variant,
    dtype_name,
    make_layer,
    sparse_jobs,
    variants,
)
from classifier_report import plot_sweeps, show, tables
from provenance import RESULTS, append, provenance
from records import read_records
from timing import Job, copy_job, time_jobs

SWEEPS = ("labels", "fan-in", "batch")
HEADLINE = Shape()
QUICK = Shape(L=1024, D=128, F=8, B=8)
_TRAIN_AND_PREDICT = ("step", "top-k")


@dataclass(frozen=True)
class Point:
    """A shape, and what is timed there."""

    shape: Shape
    operations: tuple[str, ...] = _TRAIN_AND_PREDICT
    dense: bool = True
    """Dense variants, which do not depend on the fan-in."""
    extras: bool = False
    """Everything torch has, torch.compile, AdamW, the (2, 4) pattern."""


def merge(points: Iterable[Point]) -> list[Point]:
    """One point per shape with all that is asked for there, in order of first appearance."""
    merged: dict[Shape, Point] = {}
    for point in points:
        other = merged.get(point.shape, point)
        wanted = {*point.operations, *other.operations}
        merged[point.shape] = Point(
            point.shape,
            tuple(name for name in OPERATIONS if name in wanted),
            point.dense or other.dense,
            point.extras or other.extras,
        )
    return list(merged.values())


def sweep_points(sweep: str, *, quick: bool = False) -> list[Point]:
    """Shapes that leave the headline along one axis at a time; "all" adds a grid."""
    base = QUICK if quick else HEADLINE
    labels = (512, 1024) if quick else [2**n for n in range(14, 23)]
    fan_ins = (4, 8) if quick else (16, 32, 64, 128, 256)
    batches = (1, 8) if quick else (1, 4, 8, 16, 32, 64, 128, 256, 512)
    points = {
        "labels": [Point(replace(base, L=n)) for n in labels],
        "fan-in": [Point(replace(base, F=n), dense=n == base.F) for n in fan_ins],
        "batch": [Point(replace(base, B=n)) for n in batches],
    }
    if sweep != "all":
        return points[sweep]
    every = [Point(base, OPERATIONS, extras=True)]
    if not quick:
        every += [
            Point(replace(base, F=f, B=b), ("step",), dense=f == base.F)
            for f in (32, 64, 128)
            for b in (32, 64, 128, 256)
        ]
        million = replace(base, L=1_000_000)
        every += [Point(replace(million, B=b), ("top-k",), dense=False) for b in (1, 4, 8, 16)]
    return merge([*every, *(point for name in SWEEPS for point in points[name])])


def make_jobs(point: Point, options: argparse.Namespace) -> Iterator[Job]:
    """The jobs of a point, weights and inputs made; none of variants that `--only` leaves out."""
    shape, device = point.shape, options.device
    inputs = Inputs(shape, device)

    def wanted(name: str) -> bool:
        return any(options.only in f"{operation}, {name}" for operation in point.operations)

    yield copy_job(options.copy_bytes, device)
    for variant in variants(shape, extras=point.extras):
        if wanted(variant.name):
            yield from sparse_jobs(inputs, variant, device, point.operations)
    if point.extras and any(map(wanted, TORCH_SPARSE)):
        yield from torch_sparse_jobs(inputs, make_layer(shape, Variant(), device), device)
    for dtype in (torch.float32, torch.bfloat16):
        names = (f"dense {dtype_name(dtype)}", f"dense compiled {dtype_name(dtype)}")
        fits = dense_fits(shape, dtype, options.dense_gib)
        if point.dense and fits and any(map(wanted, names)):
            compiled = point.extras and not options.quick
            yield from dense_jobs(inputs, dtype, device, point.operations, compiled=compiled)


def measure(
    point: Point, options: argparse.Namespace, about: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time all jobs of a point; writes and returns its records, and our own failures."""
    torch.manual_seed(0)
    jobs: list[Job] = []  # the memory copy first
    left_out: dict[str, None] = {}
    for job in make_jobs(point, options):
        name = f"{job.operation}, {job.what}"
        if job.operation != "copy" and options.only not in name:
            continue
        if job.about.get("backend") == "reference" and not options.reference:
            left_out[job.what] = None
            continue
        jobs.append(job)
    if left_out:
        print("  not compiled, left out without --reference: " + ", ".join(left_out))
    if len(jobs) == 1:
        return [], []
    limits = {"seconds": options.seconds, "repeats": options.repeats}
    records, failures = time_jobs(jobs, options.device, **limits)
    records = [record | about for record in records if record["operation"] != "copy"]
    append(options.output, records)
    show(point.shape, records, about)
    return records, failures


def main() -> None:
    """Measure, or report what was measured."""
    options = parse()
    base = QUICK if options.quick else HEADLINE
    if not options.measure:
        records = read_records(options.output)
        if options.table:
            print(tables(records, base))
        if options.plot:
            plot_sweeps(records, base, options.output)
        return
    torch.set_num_threads(options.threads)
    about = provenance(options.device)
    one = Shape(options.labels, options.features, options.fan_in, options.batch)
    points = [Point(QUICK if options.quick else one, OPERATIONS, extras=True)]
    if options.sweep:
        points = sweep_points(options.sweep, quick=options.quick)
    started = time.monotonic()
    records, failures = [], []
    for number, point in enumerate(points):
        if time.monotonic() - started > 60 * options.minutes:
            left = ", ".join(str(point.shape) for point in points[number:])
            print(f"stopped after {options.minutes:g} minutes, not measured: {left}")
            break
        more, failed = measure(point, options, about)
        records += more
        failures += failed
        gc.collect()
    if not records:
        sys.exit(f"expected --only to name a job that is compiled here, got {options.only!r}")
    if options.plot:
        plot_sweeps(records, base, options.output)
    if failures:
        sys.exit("these failed:\n" + "\n".join(failures))


def parse() -> argparse.Namespace:
    """The command line; `measure` says whether anything is to be timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--labels", type=int, default=HEADLINE.L)
    parser.add_argument("--features", type=int, default=HEADLINE.D)
    parser.add_argument("--fan-in", type=int, default=HEADLINE.F)
    parser.add_argument("--batch", type=int, default=HEADLINE.B)
    parser.add_argument("--sweep", choices=[*SWEEPS, "all"], help="many shapes instead of one")
    parser.add_argument("--plot", action="store_true", help="a PNG per sweep beside the output")
    parser.add_argument("--table", action="store_true", help="print markdown, measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--only", default="", help="jobs whose 'operation, variant' has this")
    parser.add_argument("--reference", action="store_true", help="time the plain torch definition")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10, help="per shape, for timed runs")
    parser.add_argument("--minutes", type=float, default=14, help="no new shape after these")
    parser.add_argument("--dense-gib", type=float, help="largest dense matrix to time")
    parser.add_argument("--output", type=Path, default=RESULTS / "classifier.jsonl")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none: --device cpu times the CPU kernels")
    options.copy_bytes = 2**28 if options.device == "cpu" else 2**30
    if options.dense_gib is None:
        options.dense_gib = 1 if options.device == "cpu" else 8
    if options.quick:
        options.repeats, options.seconds = min(3, options.repeats), 1
        options.copy_bytes = 2**22
    options.measure = bool(options.sweep) or not (options.table or options.plot)
    return options


if __name__ == "__main__":
    main()
