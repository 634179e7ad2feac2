"""Time contrastive losses and steps on a CPU or a GPU against what is done elsewhere.

    python scripts/bench/contrastive.py [--part loss|step|all] [--plot] [--threads 2]
    python scripts/bench/contrastive.py --sizes 4096,16384 --dims 256 --dtypes float32
    python scripts/bench/contrastive.py --large       (B = 131,072 on a CPU: minutes, a bar)
    python scripts/bench/contrastive.py --table       (markdown from the lines measured before)
    python scripts/bench/contrastive.py --plot        (plots from the lines measured before)

The loss: symmetric InfoNCE of unit vectors with the gradients of both sides, in time, peak memory
beyond the inputs (gradients included) and error against float64, for our tiles, the materialised
matrix (compiled too), chunks of rows under checkpointing, two one-directional passes (the published
kernels' scheme, on our tiles) and the loss stage of sentence-transformers' cached loss. The step: a
small transformer encoder for queries and keys, forward and backward, by the gradient cache, by one
plain pass and by accumulation. All variants of a shape take turns in one run.

Appends a JSON line per variant and shape to `scripts/bench/results/contrastive.jsonl`. FLOPs count
four products of B^2 D whatever a variant really multiplies. What would take or hold too much
becomes a line that says so.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contrastive_baselines import truth
from contrastive_jobs import Inputs, Limits, Run, Shape, left_out, loss_jobs
from contrastive_report import plots, show, tables
from contrastive_step import StepShape, step_jobs
from provenance import RESULTS, append, provenance
from records import read_records
from timing import Job, time_jobs

from xmc.training.byte_meter import measured

HEADLINE = {"cpu": Shape(16_384), "cuda": Shape(65_536, 768, "bfloat16")}
SIZES = {
    "cpu": (1024, 2048, 4096, 8192, 16_384),
    "cuda": (1024, 4096, 16_384, 65_536, 262_144, 1_048_576),
}
OTHER_SIZES = {"cpu": (1024, 4096, 16_384), "cuda": (4096, 65_536)}  # in other dtypes
DIMS = {"cpu": (128, 512, 1024), "cuda": (128, 256, 512, 1024)}
DIMS_AT = {"cpu": 2048, "cuda": 16_384}
STEP_SIZES = (128, 256, 512, 1024)
LARGE = Shape(131_072)


def loss_shapes(options: argparse.Namespace) -> list[Shape]:
    """Batches at the headline's features, then features at one batch; or what was asked for."""
    base = HEADLINE[options.device]
    dtypes = sorted(options.dtypes, key=lambda dtype: dtype != base.dtype)
    if options.quick:
        return [Shape(*pair, dtype) for dtype in dtypes for pair in ((64, 16), (128, 16), (64, 32))]
    if options.sizes or options.dims:
        sizes, dims = options.sizes or [base.B], options.dims or [base.D]
        return [Shape(b, d, dtype) for dtype in dtypes for d in dims for b in sorted(sizes)]
    sizes = dict.fromkeys(dtypes, OTHER_SIZES[options.device])
    sizes[base.dtype] = SIZES[options.device]
    shapes = [Shape(b, base.D, dtype) for dtype in dtypes for b in sizes[dtype]]
    at = DIMS_AT[options.device]
    return shapes + [Shape(at, d, dtype) for d in DIMS[options.device] for dtype in dtypes]


def step_shapes(options: argparse.Namespace) -> list[StepShape]:
    """Batches of the same encoder."""
    if options.quick:
        return [StepShape(b, chunk=4, T=4, D=16, layers=1) for b in (8, 16)]
    return [StepShape(b) for b in STEP_SIZES]


class Benchmark:
    """Points measured one after the other, each appended when it is done."""

    def __init__(self, options: argparse.Namespace, about: dict[str, Any]) -> None:
        self.options, self.about = options, about
        self.failures: list[str] = []
        self._known: dict[str, dict[str, tuple[Shape, float]]] = {}  # by dtype and variant

    def loss(self, shape: Shape) -> None:
        """All ways to the loss at one shape."""
        options = self.options
        torch.manual_seed(0)
        inputs = Inputs(shape, options.device)
        exact = truth(*inputs[0]) if shape.flops <= options.limits.truth_flops else None
        compiled = options.compiled and shape.D == HEADLINE[options.device].D
        jobs, skipped = [], []
        known = self._known.setdefault(shape.dtype, {})
        made = loss_jobs(shape, options.device, inputs, truth=exact, compiled=compiled)
        for job in made:
            why = left_out(job.what, shape, options.limits, known)
            if why:
                skipped.append({"operation": "loss", "what": job.what, **job.about})
                skipped[-1]["not_available"] = why
            else:
                jobs.append(job)
        records = self._time(jobs)
        for job, record in zip(jobs, records, strict=True):
            assert isinstance(job.run, Run)
            record |= job.run.errors
            extra = record.get("peak_extra_bytes")
            if extra is not None:
                record["bytes_per_element"] = round(extra / (shape.B * shape.D), 2)
            if "median_ms" in record:
                known[job.what] = (shape, record["median_ms"])
        self._write([*records, *skipped])

    def step(self, shape: StepShape) -> None:
        """The ways through an encoder at one size, and the bytes of tensors that each holds."""
        torch.manual_seed(0)
        jobs = list(step_jobs(shape, self.options.device))
        records = self._time(jobs)
        for job, record in zip(jobs, records, strict=True):
            if "median_ms" in record:
                with measured(torch.device(self.options.device)) as peak:
                    job.run(0)
                record["activation_bytes"] = peak.bytes
        self._write(records)

    def large(self) -> None:
        """One run of our own over a batch whose matrix would hold 64 GiB."""
        from contrastive_large import measure_large  # only here: a GPU's machine may lack numba

        shape = LARGE if not self.options.quick else Shape(3000, 16)
        self._write([measure_large(shape)])

    def _time(self, jobs: list[Job]) -> list[dict[str, Any]]:
        options = self.options
        limits = {"seconds": options.seconds, "repeats": options.repeats}
        records, failures = time_jobs(jobs, options.device, **limits)
        self.failures += failures
        for record in records:
            record.pop("state_gb_per_s", None)  # the weights of a classifier, which are none here
        return records

    def _write(self, records: list[dict[str, Any]]) -> None:
        records = [record | self.about for record in records]
        append(self.options.output, records)
        show(records)


def main() -> None:
    """Measure, or report what was measured."""
    options = parse()
    if options.measure:
        torch.set_num_threads(options.threads)
        about = provenance(options.device, ("numba", "triton", "sentence-transformers"))
        benchmark = Benchmark(options, about)
        started = time.monotonic()
        points = list(_points(options, benchmark))
        for number, (run, shape) in enumerate(points):
            if time.monotonic() - started > 60 * options.minutes:
                left = "; ".join(str(shape) for _, shape in points[number:])
                print(f"stopped after {options.minutes:g} minutes, not measured: {left}")
                break
            run(shape)
            gc.collect()
        if options.large:
            benchmark.large()
        if benchmark.failures:
            sys.exit("these failed:\n" + "\n".join(benchmark.failures))
    if options.table:
        print(tables(read_records(options.output)))
    if options.plot:
        for path in plots(read_records(options.output), options.output):
            print(f"wrote {path.name}")


def _points(
    options: argparse.Namespace, benchmark: Benchmark
) -> Iterator[tuple[Callable[[Any], None], Shape | StepShape]]:
    """What is measured, the most important first: time may run out."""
    losses = loss_shapes(options) if options.part in ("loss", "all") else []
    first = [shape for shape in losses if shape.dtype == HEADLINE[options.device].dtype]
    first = [shape for shape in first if options.sizes or shape.D == HEADLINE[options.device].D]
    yield from ((benchmark.loss, shape) for shape in first)
    if options.part in ("step", "all"):
        yield from ((benchmark.step, shape) for shape in step_shapes(options))
    yield from ((benchmark.loss, shape) for shape in losses if shape not in first)


def parse() -> argparse.Namespace:
    """The command line; `measure` says whether anything is to be timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--part", choices=["loss", "step", "all"])
    parser.add_argument("--sizes", type=_numbers, help="rows of a batch, as 1024,4096")
    parser.add_argument("--dims", type=_numbers, help="features, as 128,256")
    parser.add_argument("--dtypes", type=_dtypes, default=["float32", "bfloat16"])
    parser.add_argument("--large", action="store_true", help="131,072 rows on a CPU, alone")
    parser.add_argument("--plot", action="store_true", help="PNGs beside the output")
    parser.add_argument("--table", action="store_true", help="print markdown")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5, help="per shape, for timed runs")
    parser.add_argument(
        "--max-seconds", type=float, default=15, help="no variant whose run would take more"
    )
    parser.add_argument("--minutes", type=float, default=10.5, help="no new shape after these")
    parser.add_argument("--dense-gib", type=float, help="matrices of a materialised loss")
    parser.add_argument("--output", type=Path, default=RESULTS / "contrastive.jsonl")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if not cpu and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none: --device cpu times the CPU kernels")
    if options.large and not cpu:
        parser.error("expected --device cpu with --large: on a GPU --sizes takes any batch")
    if options.dense_gib is None:
        options.dense_gib = 5 if cpu else 40
    # Truths take one product of the four, in float64: seconds at most.
    options.limits = Limits(
        options.dense_gib * 2**30, options.max_seconds, truth_flops=6e11 if cpu else 1e14
    )
    options.compiled = not options.quick
    if options.quick:
        options.repeats, options.seconds = min(3, options.repeats), 1
    asked = options.part or options.sizes or options.dims or options.large
    options.measure = bool(asked) or not (options.table or options.plot)
    if options.part is None:
        few = "loss" if options.sizes or options.dims else "all"
        options.part = "" if options.large and few == "all" else few
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text}")
    return numbers


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ("float32", "bfloat16", "float16"):
            raise argparse.ArgumentTypeError(
                f"expected float32, bfloat16 or float16 by commas, got {name}"
            )
    return names


if __name__ == "__main__":
    main()
