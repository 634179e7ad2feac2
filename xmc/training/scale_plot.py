"""The picture of a plan for several ranks: memory of each, time of a step, logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xmc.training.memory_component import megabytes
from xmc.training.scale_plan import ScalePlan
from xmc.training.scale_report import memory_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SUFFIXES = (".png", ".pdf", ".svg")


def plot_scale(scale: ScalePlan, path: Path) -> None:
    """Left, bytes of a rank by part in a training step, and their peak; right, seconds of a step.

    Raises what `check_suffix` raises.
    """
    check_suffix(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    memory, time = figure.subplots(1, 2)
    counts = [ranks.ranks for ranks in scale.ranks]
    for axes, draw in ((memory, _draw_memory), (time, _draw_time)):
        axes.set(xscale="log", yscale="log", xlabel="ranks")
        draw(axes, scale)
        axes.set_xticks(counts)
        axes.set_xticks([], minor=True)
        axes.set_xticklabels([f"{count:,}" for count in counts])
        axes.grid(which="major", alpha=0.3)
        axes.legend()
    labels, config = scale.plan.workload.num_labels, scale.plan.config
    figure.suptitle(
        f"{labels:,} labels, {config.train.data_parallel} encoder, {scale.scaling} scaling"
    )
    figure.savefig(path, dpi=110)


def check_suffix(path: Path) -> None:
    """Raises ValueError for a file that is no PNG, PDF or SVG."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--plot: expected a file {', '.join(_SUFFIXES)}, got {path}")


def _draw_memory(axes: Axes, scale: ScalePlan) -> None:
    counts = [ranks.ranks for ranks in scale.ranks]
    parts = [memory_parts(ranks) for ranks in scale.ranks]
    for name in parts[0]:
        points = [(n, found[name]) for n, found in zip(counts, parts, strict=True) if found[name]]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.plot(counts, [ranks.peak for ranks in scale.ranks], "k-", marker="o", label="peak")
    if scale.plan.memory is not None:
        axes.axhline(scale.plan.memory, color="k", linestyle=":", label="memory")
    axes.yaxis.set_major_formatter(lambda size, _: megabytes(size))
    axes.set(title="memory of a rank")


def _draw_time(axes: Axes, scale: ScalePlan) -> None:
    counts = [ranks.ranks for ranks in scale.ranks]
    sent = [(ranks.ranks, ranks.communication) for ranks in scale.ranks if ranks.communication]
    if sent:
        axes.plot(*zip(*sent, strict=True), marker=".", label="network")
    times = [ranks.time for ranks in scale.ranks if ranks.time is not None]
    if times:
        axes.plot(counts, [time.classifier for time in times], marker=".", label="classifier")
        axes.plot(counts, [time.encoder for time in times], marker=".", label="encoder")
        axes.plot(counts, [time.step for time in times], "k-", marker="o", label="step")
        first = scale.alone.time
        if scale.scaling == "strong" and first is not None:
            axes.plot(counts, [first.step / n for n in counts], "k:", label="one rank's, divided")
    axes.set(title="seconds of a step", ylabel="seconds")
