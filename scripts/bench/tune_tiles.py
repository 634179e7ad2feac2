"""Time strategies and tile sizes of the Triton kernels on this GPU; write the best to tiles.py.

    python scripts/bench/tune_tiles.py [--shapes 262144,768,64,128 ...] [--dry-run]

For every row of the table of this GPU's architecture: sizes are varied one at a time from the
present row on, twice around; a candidate counts by the geometric mean of its times over the
shapes, and takes over where it is 2% faster. Candidates that raise or spill registers are skipped.
Then every strategy of the training step is timed at rows from 8 to 512. Only this architecture's
table changes, between the two markers; without one it starts from the default. Every timing is a
line in `scripts/bench/results/tune_tiles.jsonl`.

`--dry-run` writes no table: it prints the candidates, and the table as it would be. Without a GPU
nothing is timed, so that is the present one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tile_table
import torch
from classifier_jobs import LR, Inputs, Shape, Variant, make_layer, nearest_pattern
from provenance import RESULTS, append, provenance
from timing import BATCHES, cuda_clock, reason

from xmc_kernels._triton import classifier, fan_in, launch, similarity, tiles
from xmc_kernels.classifier import UpdateRule, make_state
from xmc_kernels.pairs import Pairs

SHAPES = (
    Shape(L=262_144, F=32, B=64),
    Shape(L=262_144, F=64, B=128),
    Shape(L=262_144, F=128, B=512),
)
ROWS = (8, 16, 32, 64, 128, 256, 512)
"""Of a batch, where strategies are compared."""
_GAIN = 0.98  # a new row takes this share of the present one's time at most: less is noise
_GROUP = 16
_REPEATS = 7
_SIMILARITIES = 16_384
"""Queries and keys of a contrastive loss, if the shape has as many labels."""

Run = Callable[[], object]
Clock = Callable[[Run], float]
Spills = Callable[[Sequence[launch.Launch]], int]


@dataclass(frozen=True)
class Row:
    """One row of a table: its field, its key, and the sizes to try."""

    field: str
    """ "tiles", "blocks" or "products"."""
    key: Any
    sizes: Mapping[str, tuple[int, ...]]


def rows(table: tiles.Table) -> list[Row]:
    """What can be varied in a table."""
    common = {"block_b": (32, 64, 128), "num_warps": (4, 8)}
    found = []
    for key in table.tiles:
        sizes = {**common, "block_f": (32, 64, 128), "walk": (8, 32, 128)}
        if key[1]:
            sizes |= {"block_g": (16, 32, 64), "walk": (2, 4, 16)}
        found.append(Row("tiles", key, sizes))
    for key in table.blocks:
        sizes = {**common, "block_l": (16, 32, 64, 128), "block_d": (32, 64, 128)}
        found.append(Row("blocks", key, {**sizes, "walk": (4, 16, 64)}))
    sizes = {"m": (64, 128), "n": (64, 128, 256), "k": (32, 64, 128)}
    sizes |= {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
    found += [Row("products", key, sizes) for key in table.products]
    return found


def cases(row: Row, shapes: Sequence[Shape], device: str) -> list[Run]:
    """What a row is timed by: the step, or forward and backward, or a loss of similarities."""
    if row.field == "products":
        sizes = {(min(shape.L, _SIMILARITIES), shape.D) for shape in shapes}
        return [similarity_case(*row.key, *size, device) for size in sorted(sizes)]
    made = []
    for shape in shapes:
        if row.field == "blocks":
            variant = Variant(_dtype(row.key), 1, nearest_pattern(shape.F, shape.D))
            made.append(layer_case(shape, variant, device, "blocks"))
            made.append(step_case(shape, variant, device, "blocks"))
            continue
        fused, shared, wide = row.key
        make = step_case if fused else layer_case
        made.append(make(shape, Variant(_dtype(wide), _GROUP if shared else 1), device, "walk"))
    return made


def _dtype(wide: bool) -> torch.dtype:
    return torch.float32 if wide else torch.bfloat16


def step_case(shape: Shape, variant: Variant, device: str, by: str) -> Run:
    """A training step by one strategy; six batches take turns."""
    inputs, layer = Inputs(shape, device), make_layer(shape, variant, device)
    rule = UpdateRule("sgd")
    state = make_state(layer.weight, layer.bias, rule)
    turn = 0

    def run() -> object:
        nonlocal turn
        turn = (turn + 1) % BATCHES
        positives = (inputs.indptr, inputs.indices[turn])
        numbers = ("bce", rule, LR, 1, 1 / shape.B, True)
        x = inputs.x(turn, variant.dtype)
        return classifier.classifier_step(
            x, layer, *positives, state, *numbers, deterministic=False, by=by
        )

    return run


def layer_case(shape: Shape, variant: Variant, device: str, by: str) -> Run:
    """Forward and backward of a layer by one strategy."""
    inputs, layer = Inputs(shape, device), make_layer(shape, variant, device)
    grad = torch.randn(shape.B, shape.L, device=device).to(variant.dtype)
    turn = 0

    def run() -> object:
        nonlocal turn
        turn = (turn + 1) % BATCHES
        x = inputs.x(turn, variant.dtype)
        out = fan_in.fan_in_linear(x, layer, by=by)
        return out, fan_in.fan_in_linear_backward(grad, x, layer, deterministic=False, by=by)

    return run


def similarity_case(kernel: str, wide: bool, num: int, dim: int, device: str) -> Run:
    """A contrastive loss of num queries and keys, as little beside this kernel as there can be."""
    q, k = torch.nn.functional.normalize(torch.randn(2, num, dim, device=device), dim=2)
    q, k = q.to(_dtype(wide)), k.to(_dtype(wide))
    numbers = torch.arange(num + 1, device=device)
    pairs = Pairs(numbers, numbers[:-1].int())
    scale, target = torch.tensor(20.0, device=device), torch.full((num,), 1 / num, device=device)
    if kernel == "sigmoid":
        options = (scale, -scale / 2, pairs, target, True, False)
        return lambda: similarity.sigmoid_loss(q, k, *options)
    gradients = kernel != "statistics"
    options = (scale, pairs, target, target, False, gradients, gradients)
    return lambda: similarity.softmax_loss(q, k, *options)


@contextmanager
def using(architecture: str, table: tiles.Table) -> Iterator[None]:
    """Let the launchers of an architecture read this table."""
    before = dict(tiles.TABLES)
    tiles.TABLES[architecture] = table
    try:
        yield
    finally:
        tiles.TABLES.clear()
        tiles.TABLES.update(before)


@contextmanager
def recorded() -> Iterator[list[launch.Launch]]:
    """The launches that happen inside."""
    launches: list[launch.Launch] = []
    run = launch.Launch.run

    def note(self: launch.Launch) -> None:
        launches.append(self)
        run(self)

    launch.Launch.run = note  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        launch.Launch.run = run  # type: ignore[method-assign]


def spilled(launches: Sequence[launch.Launch]) -> int:
    """Registers that the kernels of these launches spill; they are compiled already."""
    if launch.INTERPRETED:
        return 0
    total = 0
    for one in launches:
        values = {**one.arguments, **one.constants, **one.options}
        compiled = one.kernel.warmup(grid=(1,), **values)
        compiled._init_handles()  # Triton has no public way to the count
        total += compiled.n_spills
    return total


def with_row(table: tiles.Table, row: Row, sizes: Any) -> tiles.Table:
    """A table with one row replaced."""
    return replace(table, **{row.field: {**getattr(table, row.field), row.key: sizes}})


class Tuner:
    """Times candidates on one architecture; keeps a record of each."""

    def __init__(self, architecture: str, device: str, clock: Clock, spills: Spills) -> None:
        self.architecture = architecture
        self.device = device
        self.clock = clock
        self.spills = spills
        self.records: list[dict[str, Any]] = []

    def milliseconds(self, runs: Sequence[Run], what: dict[str, Any]) -> float:
        """Geometric mean over runs of the clock; infinite where one raises or spills."""
        record = {"architecture": self.architecture, **what}
        try:
            times = []
            for run in runs:
                with recorded() as launches:
                    run()
                if count := self.spills(launches):
                    raise RuntimeError(f"spills {count} registers")
                times.append(self.clock(run))
            value = math.exp(sum(map(math.log, times)) / len(times))
            record["median_ms"] = [round(t, 4) for t in times]
        except Exception as error:  # a candidate that does not compile or fit is no candidate
            value = math.inf
            record["not_available"] = reason(error)
        self.records.append(record)
        print(json.dumps(record), flush=True)
        return value

    def best_row(self, table: tiles.Table, row: Row, shapes: Sequence[Shape]) -> Any:
        """The fastest sizes, from the present ones on; those where nothing runs."""
        runs = cases(row, shapes, self.device)
        best = getattr(table, row.field)[row.key]
        seen: dict[Any, float] = {}

        def cost(sizes: Any) -> float:
            if sizes not in seen:
                what = {"row": row.field, "key": row.key, "sizes": asdict(sizes)}
                with using(self.architecture, with_row(table, row, sizes)):
                    seen[sizes] = self.milliseconds(runs, what)
            return seen[sizes]

        for _ in range(2):
            for name, values in row.sizes.items():
                for value in values:
                    candidate = replace(best, **{name: value})
                    if candidate != best and cost(candidate) < _GAIN * cost(best):
                        best = candidate
        return best

    def strategies(self, shape: Shape, key: tuple[bool, bool, bool]) -> dict[int, dict[str, float]]:
        """Milliseconds of each strategy of a step, per rows of a batch."""
        shared, patterned, half = key
        pattern = nearest_pattern(shape.F, shape.D) if patterned else None
        variant = Variant(_dtype(not half), _GROUP if shared else 1, pattern)
        names = ("walk", "densify", *(("blocks",) if patterned else ()))
        times: dict[int, dict[str, float]] = {}
        for num_rows in ROWS:
            here = replace(shape, B=num_rows)
            times[num_rows] = {
                by: self.milliseconds(
                    [step_case(here, variant, self.device, by)],
                    {"row": "strategies", "key": key, "by": by, "B": num_rows},
                )
                for by in names
            }
        return times


def breakpoints(
    times: Mapping[int, Mapping[str, float]], present: tuple[tuple[int, str], ...]
) -> tuple[tuple[int, str], ...]:
    """(rows, fastest strategy) where it changes, from one row on; the present ones if none ran."""
    steps: list[tuple[int, str]] = []
    for num_rows in sorted(times):
        name, value = min(times[num_rows].items(), key=lambda item: item[1])
        if value < math.inf and (not steps or steps[-1][1] != name):
            steps.append((num_rows if steps else 1, name))
    return tuple(steps) or present


def tune(tuner: Tuner, table: tiles.Table, shapes: Sequence[Shape], *, minutes: float) -> Any:
    """A table with the fastest sizes and strategies; rows not reached in time stay."""
    started = time.monotonic()

    def late() -> bool:
        return time.monotonic() - started > 60 * minutes

    for row in rows(table):
        if late():
            print(f"not reached in {minutes:g} minutes: {row.field} {row.key}")
            continue
        table = with_row(table, row, tuner.best_row(table, row, shapes))
    chosen = dict(table.strategies)
    with using(tuner.architecture, table):
        for key, present in table.strategies.items():
            if late():
                print(f"not reached in {minutes:g} minutes: strategies {key}")
                continue
            chosen[key] = breakpoints(tuner.strategies(shapes[0], key), present)
    return replace(table, strategies=chosen)


def source(about: Mapping[str, Any]) -> str:
    """Where a tuned table comes from, in a line."""
    versions = f"torch {about['torch']}, triton {about['triton']}"
    return f"{about['date']}: timed on {about['device']}, {versions}"


def median_clock() -> Clock:
    """The median of some runs on a GPU after a warm-up, each with a cold second-level cache."""
    clock = cuda_clock()

    def measure(run: Run) -> float:
        run()
        return float(np.median([clock(run) for _ in range(_REPEATS)]))

    return measure


def main() -> None:
    """Tune this GPU's table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="L,D,F,B")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, default=25, help="rows not reached stay")
    parser.add_argument("--tiles", type=Path, default=Path(tiles.__file__), help="file to rewrite")
    parser.add_argument("--output", type=Path, default=RESULTS / "tune_tiles.jsonl")
    options = parser.parse_args()
    present = torch.cuda.is_available()
    if not (present or options.dry_run):
        parser.error("expected a CUDA device, got none: --dry-run prints candidates without one")
    tables = dict(tiles.TABLES)
    if options.dry_run:
        for row in rows(tables["default"]):
            print(f"{row.field} {row.key}: {dict(row.sizes)}")
    if present:
        name = tiles.architecture(torch.device("cuda"))
        tuner = Tuner(name, "cuda", median_clock(), spilled)
        table = tables.get(name, tables["default"])
        table = tune(tuner, table, options.shapes, minutes=options.minutes)
        about = provenance("cuda")
        tables[name] = replace(table, source=source(about))
        append(options.output, [record | about for record in tuner.records])
    print(tile_table.render(tables))
    if not options.dry_run:
        tile_table.rewrite(options.tiles, tables)


def shape_of(text: str) -> Shape:
    """Shape of "L,D,F,B"."""
    numbers = text.split(",")
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"expected L,D,F,B, got {text!r}")
    return Shape(*map(int, numbers))


if __name__ == "__main__":
    main()
