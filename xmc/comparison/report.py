"""A comparison as a table for people and as JSON for programs."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from xmc.comparison.documents import METRICS, Difference
from xmc.comparison.heads import Variant
from xmc.comparison.runs import RunLogs
from xmc.evaluation.metrics import LEVEL
from xmc.evaluation.propensity import Propensity
from xmc.evaluation.report import Grid
from xmc.training.memory_component import megabytes


@dataclass(frozen=True)
class RunResult:
    """One training."""

    seed: int
    folder: Path
    values: dict[str, float]
    """`METRICS` as fractions."""
    logs: RunLogs


@dataclass(frozen=True)
class VariantResult:
    """One head over its seeds."""

    variant: Variant
    runs: list[RunResult]
    differences: dict[str, Difference] | None
    """To the baseline; None for the baseline itself."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(run.values[metric] for run in self.runs)

    def deviation(self, metric: str) -> float:
        """Standard deviation over the seeds (of a sample); nan for a single one."""
        values = [run.values[metric] for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def epoch_seconds(self) -> float:
        return statistics.fmean(run.logs.epoch_seconds for run in self.runs)

    @property
    def peak_bytes(self) -> int:
        return max(run.logs.peak_bytes for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    recipe: str
    data: Path
    split: str
    """val or tst"""
    held_out: bool
    """Whether each seed held out its own rows of the training split."""
    num_documents: int
    """Scored for each seed."""
    baseline: str
    """Name of the variant that the others are compared with."""
    propensity: Propensity
    replicates: int
    results: list[VariantResult]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.results[0].runs]


def render(comparison: Comparison) -> RenderableType:
    """For `rich`'s `Console.print`: two lines a head, scores and what they differ by."""
    rows = [["%", *METRICS, "classifier", "process", "epoch"]]
    for result in comparison.results:
        scores = [_score(result.mean(name), result.deviation(name)) for name in METRICS]
        sizes = [megabytes(result.variant.classifier_bytes), megabytes(result.peak_bytes)]
        rows.append([result.variant.name, *scores, *sizes, f"{result.epoch_seconds:.3g} s"])
        if result.differences is not None:
            cells = [_difference(result.differences[name]) for name in METRICS]
            rows.append(["", *cells, "", "", ""])
    title = f"{comparison.recipe} on {comparison.data.name}"
    return Grid(rows, notes(comparison), title)


def notes(comparison: Comparison) -> list[str]:
    """Sentences that a reader of the numbers needs."""
    seeds, split = comparison.seeds, "validation"
    if comparison.split == "tst":
        split = "TEST"
    elif comparison.held_out:
        split = "validation (rows that each seed held out of the training split)"
    lines = [
        f"split: {split}, {comparison.num_documents:,} documents; "
        f"seeds {', '.join(map(str, seeds))}"
    ]
    if comparison.split == "tst":
        lines.append("the test split was used: choose nothing by these numbers")
    else:
        lines.append("the best epoch of each run was chosen on the same split: a little flattering")
    if len(seeds) > 1:
        lines.append("+-: standard deviation over seeds")
    if len(comparison.results) > 1:
        lines.append(
            f"below: difference to {comparison.baseline} with its {LEVEL:.0%} interval, paired "
            f"bootstrap over documents, {comparison.replicates:,} replicates"
        )
    known = comparison.propensity
    lines.append(f"propensity: a = {known.a}, b = {known.b}, N = {known.num_rows:,}")
    lines.append(
        "classifier: weights, indices, biases and optimizer state of all above the encoder; "
        "process: peak of a training; epoch: training steps only"
    )
    for result in comparison.results:
        if result.variant.head == "bottleneck":
            width = result.variant.config.encoder.intermediate
            lines.append(f"{result.variant.name}: {width} outputs, the most that fit in its bytes")
    return lines


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values for JSON: fractions, seconds and bytes; null for what is not defined."""
    known = comparison.propensity
    return {
        "version": 1,
        "recipe": comparison.recipe,
        "data": str(comparison.data),
        "split": comparison.split,
        "documents": comparison.num_documents,
        "held_out": comparison.held_out,
        "seeds": comparison.seeds,
        "baseline": comparison.baseline,
        "propensity": {"a": known.a, "b": known.b, "N": known.num_rows},
        "level": LEVEL,
        "replicates": comparison.replicates,
        "heads": [_variant(result) for result in comparison.results],
    }


def _variant(result: VariantResult) -> dict[str, Any]:
    variant = result.variant
    return {
        "name": variant.name,
        "label": variant.label,
        "head": variant.head,
        "fan_in": variant.fan_in or None,
        "settings": list(variant.overrides),
        "classifier_bytes": variant.classifier_bytes,
        "peak_bytes": result.peak_bytes,
        "epoch_seconds": result.epoch_seconds,
        "mean": {name: result.mean(name) for name in METRICS},
        "deviation": {name: _number(result.deviation(name)) for name in METRICS},
        "difference": None
        if result.differences is None
        else {name: asdict(value) for name, value in result.differences.items()},
        "runs": [_run(run) for run in result.runs],
    }


def _run(run: RunResult) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "folder": str(run.folder),
        "values": run.values,
        "best_epoch": run.logs.best_epoch,
        "epoch_seconds": run.logs.epoch_seconds,
        "peak_bytes": run.logs.peak_bytes,
    }


def _score(mean: float, deviation: float) -> str:
    text = f"{100 * mean:.2f}"
    return text if math.isnan(deviation) else f"{text} +-{100 * deviation:.2f}"


def _difference(value: Difference) -> str:
    mean, low, high = (100 * number for number in (value.mean, value.low, value.high))
    return f"{mean:+.2f} ({low:+.2f}..{high:+.2f})"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
