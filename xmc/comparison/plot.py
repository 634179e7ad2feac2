"""The picture of a comparison: scores, bytes, and what happened while it was trained."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xmc.comparison.report import Comparison, VariantResult
from xmc.comparison.runs import RunLogs
from xmc.training.memory_component import megabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[int, float]]  # (step, value)

_STYLES = ("-", "--", ":", "-.")  # by fan-in; colours are by label


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Six panels as PNG.

    Above: P@1 and P@5 of every head, the mean with the standard deviation over seeds and each seed
    as a dot; bytes of the classifier. Below, over the steps and as means over seeds: churn and
    survival of the inputs where they evolve, and the norm of the encoder's gradient.
    """
    from matplotlib.figure import Figure

    results = comparison.results
    upper, lower = 1.4 + 0.3 * len(results), 4.4
    figure = Figure(figsize=(15, upper + lower), layout="constrained")
    top, bottom = figure.subplots(2, 3, height_ratios=(upper, lower))
    split = "test" if comparison.split == "tst" else "validation"
    _draw_scores(top[0], results, "P@1", split)
    _draw_scores(top[1], results, "P@5", split)
    _draw_bytes(top[2], results)
    for axes in top:
        axes.set_ylim(len(results) - 0.5, -0.5)  # the first head on top
        axes.set_yticks(range(len(results)), [result.variant.name for result in results])
    for axes in top[1:]:
        axes.tick_params(labelleft=False)
    _draw_lines(bottom[0], results, _rewirings("churn"), "slots replaced by each rewiring (%)")
    _draw_lines(bottom[1], results, _rewirings("survival"), "slots never replaced (%)")
    _draw_lines(bottom[2], results, lambda logs: logs.gradient, "norm of the encoder gradient")
    bottom[2].set_yscale("log")
    figure.legend(*bottom[2].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) > 1 else ''}"
    figure.suptitle(f"{comparison.recipe} on {comparison.data.name}, {seeds}")
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def mean_over_runs(runs: Sequence[Points]) -> list[tuple[int, float]]:
    """Means of the values at the steps that all runs have."""
    found: dict[int, list[float]] = {}
    for points in runs:
        for step, value in points:
            found.setdefault(step, []).append(value)
    return [
        (step, statistics.fmean(values))
        for step, values in sorted(found.items())
        if len(values) == len(runs)
    ]


def _draw_scores(axes: Axes, results: Sequence[VariantResult], metric: str, split: str) -> None:
    colors = _colors(results)
    for place, result in enumerate(results):
        color = colors[result.variant.label]
        values = [100 * run.values[metric] for run in result.runs]
        spread = 100 * result.deviation(metric) if len(values) > 1 else None
        axes.errorbar(100 * result.mean(metric), place, xerr=spread, fmt="o", capsize=4, c=color)
        axes.plot(values, [place + 0.25] * len(values), "|", color=color)
    axes.set(title=f"{split} {metric} (%)")
    axes.grid(axis="x", alpha=0.3)


def _draw_bytes(axes: Axes, results: Sequence[VariantResult]) -> None:
    sizes = [result.variant.classifier_bytes for result in results]
    colors = _colors(results)
    bars = axes.barh(range(len(sizes)), sizes, color=[colors[r.variant.label] for r in results])
    axes.bar_label(bars, [megabytes(size) for size in sizes], padding=3)
    axes.set(title="classifier with optimizer state", xlim=(0, 1.25 * max(sizes)), xticks=[])


def _draw_lines(
    axes: Axes,
    results: Sequence[VariantResult],
    points_of: Callable[[RunLogs], Points],
    title: str,
) -> None:
    colors = _colors(results)
    fan_ins = sorted({result.variant.fan_in for result in results} - {0})
    for result in results:
        points = mean_over_runs([points_of(run.logs) for run in result.runs])
        if points:
            fan_in = result.variant.fan_in
            axes.plot(
                *zip(*points, strict=True),
                label=result.variant.name,
                color=colors[result.variant.label],
                linestyle=_STYLES[fan_ins.index(fan_in) % len(_STYLES)] if fan_in else "-",
                marker="." if len(points) < 30 else None,
            )
    axes.set(title=title, xlabel="optimizer step")
    axes.grid(alpha=0.3)
    if not axes.lines:
        axes.text(0.5, 0.5, "no head rewires", ha="center", transform=axes.transAxes)


def _rewirings(key: str) -> Callable[[RunLogs], Points]:
    return lambda logs: [(event["step"], 100 * event[key]) for event in logs.rewirings]


def _colors(results: Sequence[VariantResult]) -> dict[str, str]:
    labels = dict.fromkeys(result.variant.label for result in results)
    return {label: f"C{place}" for place, label in enumerate(labels)}
