"""Scores as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from xmc.evaluation.frequency import BINS
from xmc.evaluation.metrics import LEVEL, Scores
from xmc.files import write_json

FAMILIES = ("P", "nDCG", "R", "RP", "PSP", "PSnDCG", "PSR", "coverage", "abandonment")


def format_scores(scores: Scores, *, decimals: int = 2) -> str:
    """Plain text: one line a metric in per cent, one column a k, and how to read them."""
    return _align(_rows(scores, decimals)) + "\n" + "\n".join(notes(scores))


def render(scores: Scores, *, title: str = "", decimals: int = 2) -> RenderableType:
    """For `rich`'s `Console.print`: a table on a terminal, `format_scores` anywhere else."""
    return Grid(_rows(scores, decimals), notes(scores), title)


def render_comparison(
    systems: Mapping[str, Scores],
    metrics: Sequence[str] = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@5"),
    *,
    title: str = "",
    decimals: int = 2,
) -> RenderableType:
    """One line a system, one column a metric, in per cent; "-" where a system has no such score."""
    rows = [["%", *metrics]]
    for name, scores in systems.items():
        cells = [_percent(scores.values.get(metric, math.nan), decimals) for metric in metrics]
        rows.append([name, *cells])
    return Grid(rows, [], title)


def notes(scores: Scores) -> list[str]:
    """Sentences that a reader of the numbers needs: rows, propensities, bins, intervals."""
    counts = scores.counts
    lines = [f"rows: {counts['rows']:,}" + _empty_rows(scores)]
    lines.append(f"labels: {counts['labels']:,}, {counts['test_labels']:,} of them on these rows")
    if counts["short_rows"]:
        lines.append(
            f"short: {counts['short_rows']:,} rows have fewer than {scores.ks[-1]} predictions"
        )
    if scores.propensity is not None:
        known = scores.propensity
        lines.append(
            f"propensity: a = {known.a}, b = {known.b}, N = {known.num_rows:,} ({known.source})"
        )
    elif any(name.startswith("PS") for name in scores.values):
        lines.append("propensity: inverse propensities as given, a, b and N not known")
    if scores.bins:
        sizes = ", ".join(f"{name} {size:,}" for name, size in scores.bins.items())
        lines.append(f"bins: {sizes} labels, each about a third of the training occurrences")
    if scores.threshold is not None:
        lines.append(f"F1: labels of the top-k with a score of at least {scores.threshold:g}")
    if scores.intervals:
        lines.append(
            f"intervals: {LEVEL:.0%}, Poisson bootstrap over rows, "
            f"{scores.replicates:,} replicates, seed {scores.seed}"
        )
    return lines


def to_dict(scores: Scores) -> dict[str, Any]:
    """Plain values for JSON: fractions, null for an undefined score."""
    known = scores.propensity
    return {
        "values": {name: _number(value) for name, value in scores.values.items()},
        "intervals": {
            name: [_number(low), _number(high)] for name, (low, high) in scores.intervals.items()
        },
        "level": LEVEL,
        "replicates": scores.replicates,
        "seed": scores.seed,
        "counts": scores.counts,
        "ks": list(scores.ks),
        "empty_rows": scores.empty_rows,
        "bins": scores.bins,
        "threshold": scores.threshold,
        "propensity": None
        if known is None
        else {"a": known.a, "b": known.b, "N": known.num_rows, "source": known.source},
    }


def to_json(scores: Scores, path: str | Path) -> None:
    """Write `to_dict` to a file that is either whole or not there (or as it was before)."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected an existing folder, {path.parent} is none")
    write_json(path, to_dict(scores))


def _rows(scores: Scores, decimals: int) -> list[list[str]]:
    """Cells of the table, the header first."""
    rows = [["%", *(f"@{k}" for k in scores.ks)]]
    families = [(family, family, "") for family in FAMILIES]
    families[3:3] = [(f"R {name}", "R", f"/{name}") for name in BINS]
    for title, family, suffix in families:
        names = [f"{family}@{k}{suffix}" for k in scores.ks]
        if names[0] in scores.values:
            rows += _lines(scores, title, names, decimals)
    for name in ("micro-F1", "macro-F1"):
        if name in scores.values:
            rows += _lines(scores, name, [name], decimals)
    width = len(rows[0])
    return [row + [""] * (width - len(row)) for row in rows]


def _lines(scores: Scores, title: str, names: list[str], decimals: int) -> list[list[str]]:
    lines = [[title, *(_percent(scores.values[name], decimals) for name in names)]]
    if names[0] in scores.intervals:
        ends = [scores.intervals[name] for name in names]
        lines.append(["", *("..".join(_percent(end, decimals) for end in pair) for pair in ends)])
    return lines


@dataclass(frozen=True)
class Grid:
    """Cells as a table on a terminal, as aligned plain text anywhere else, with lines below."""

    rows: list[list[str]]  # the header first; a row without a name belongs to the one above
    footer: list[str]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Text throughout: a "[" in the name of a system is no markup.
        if console.is_terminal:
            yield self._table()
        else:
            yield Text("\n".join(filter(None, [self.title, _align(self.rows)])))
        for line in self.footer:
            yield Text(line, style="dim")

    def _table(self) -> Table:
        table = Table(title=Text(self.title) if self.title else None, title_justify="left")
        for number, name in enumerate(self.rows[0]):
            table.add_column(Text(name), justify="right" if number else "left")
        for row in self.rows[1:]:
            table.add_row(*map(Text, row), style=None if row[0] else "dim")
        return table


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _empty_rows(scores: Scores) -> str:
    empty = scores.counts["empty_rows"]
    if not empty:
        return ", all with labels"
    fate = "they count as 0" if scores.empty_rows == "kept" else "they count in no metric"
    return f", {empty:,} of them without labels: {scores.empty_rows}, {fate}"


def _percent(value: float, decimals: int) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.{decimals}f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
