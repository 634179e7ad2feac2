"""Tables and plots from the lines that `classifier.py` wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from classifier_jobs import OPERATIONS, Shape
from records import Record, markdown, megabytes, where_from
from records import latest as last_of

_BATCHES = (32, 64, 128, 256)
_SMALL_BATCHES = (1, 4, 8, 16)
_STYLES = {"float32": "-", "bfloat16": "--", "float8": ":"}
_AXES = {
    "labels": ("L", "labels L"),
    "fan-in": ("F", "fan-in F"),
    "batch": ("B", "rows of a batch B"),
}


def latest(records: Iterable[Record]) -> list[Record]:
    """Of the device and threads measured last, the last line of each operation and shape."""
    return last_of(records, ("operation", "what", "L", "D", "F", "fan_in_wanted", "B"))


def at(record: Record, shape: Shape, free: str = "") -> bool:
    """Whether a line belongs to a shape, whatever its `free` dimension.

    A pattern counts for the fan-in it stands in for, a dense matrix for every fan-in.
    """
    wanted = record.get("fan_in_wanted", record["F"])
    fits = {"L": record["L"] == shape.L, "D": record["D"] == shape.D, "B": record["B"] == shape.B}
    fits["F"] = wanted in (None, shape.F)
    return all(value for name, value in fits.items() if name != free)


def show(shape: Shape, records: Sequence[Record], about: Record) -> None:
    """Print one shape's lines."""
    place = f"{about['device']}, {about['threads']} threads"
    print(f"L={shape.L:,} D={shape.D} F={shape.F} B={shape.B}, {place}")
    columns = ("median", "p20", "p80", "GFLOP/s", "% copy", "extra MB")
    print(f"  {'':44s}" + "".join(f"{name:>10s}" for name in columns))
    for r in records:
        name = f"{r['operation']:17s} {r['what']}"
        if "not_available" in r:
            print(f"  {name:44s} not available: {r['not_available']}")
            continue
        numbers = [r["median_ms"], r["p20_ms"], r["p80_ms"], r["gflop_per_s"]]
        numbers.append(100 * r["share_of_copy"])
        text = "".join(f"{number:10.2f}" for number in numbers)
        print(f"  {name:44s}{text}{megabytes(r):>10s}", flush=True)


def tables(records: Iterable[Record], headline: Shape) -> str:
    """Markdown: the headline shape, the step over fan-in and rows, top-k of a few rows."""
    records = latest(records)
    parts = [where_from(records), _headline_table(records, headline)]
    steps = [record for record in records if record["operation"] == "step"]
    topk = [record for record in records if record["operation"] == "top-k"]
    parts += [_grid(steps, headline), _few_rows(topk, headline)]
    return "\n\n".join(part for part in parts if part)


def _headline_table(records: Sequence[Record], shape: Shape) -> str:
    rows = []
    here = [record for record in records if at(record, shape)]
    here.sort(key=lambda r: OPERATIONS.index(r["operation"]))
    dense = {r["operation"]: r.get("median_ms") for r in here if r["what"] == "dense float32"}
    for r in here:
        by = " (plain torch reference)" if r["backend"] == "reference" else ""
        name = [r["operation"], r["what"] + by, str(r["F"])]
        if "not_available" in r:
            rows.append([*name, "not available", "", "", "", ""])
            continue
        base = dense.get(r["operation"])
        ratio = "" if base is None else f"{base / r['median_ms']:.2g}x"
        rows.append(
            [
                *name,
                f"{r['median_ms']:.2f} ({r['p20_ms']:.2f} - {r['p80_ms']:.2f})",
                ratio,
                f"{r['gflop_per_s']:.0f}",
                f"{r['state_gb_per_s']:.1f} ({100 * r['share_of_copy']:.0f}%)",
                megabytes(r),
            ]
        )
    title = f"L={shape.L:,}, D={shape.D}, F={shape.F}, B={shape.B}:"
    names = "operation|variant|F|ms, median (p20 - p80)|against dense float32|GFLOP/s"
    header = [*names.split("|"), "GB/s of state (of a copy's)", "extra MB"]
    return f"{title}\n\n{markdown(header, rows)}" if rows else ""


def _grid(records: Sequence[Record], shape: Shape) -> str:
    """The training step: a line per fan-in and variant, a column per number of rows."""
    here = [
        r
        for r in records
        if r["L"] == shape.L and r["D"] == shape.D and r["B"] in _BATCHES and "median_ms" in r
    ]
    text = _by_batch(
        here, _BATCHES, lambda r: f"{r['median_ms']:.1f} ({r['gflop_per_s']:.0f})", ("F", "what")
    )
    title = f"Training step at L={shape.L:,}, D={shape.D}: ms (GFLOP/s)."
    return f"{title}\n\n{text}" if text else ""


def _few_rows(records: Sequence[Record], shape: Shape) -> str:
    """Prediction: a line per number of labels and variant, a column per number of rows."""
    here = [
        r
        for r in records
        if r["L"] in (shape.L, 1_000_000) and r.get("fan_in_wanted") in (None, shape.F)
        if r["D"] == shape.D and r["B"] in _SMALL_BATCHES and "median_ms" in r
    ]
    text = _by_batch(
        here,
        _SMALL_BATCHES,
        lambda r: f"{r['median_ms']:.2f} ({100 * r['share_of_copy']:.0f}%)",
        ("L", "what"),
    )
    title = "Top-k of a few rows: ms (state bytes per second, of a memory copy's rate)."
    return f"{title}\n\n{text}" if text else ""


def _by_batch(
    records: Sequence[Record],
    batches: Sequence[int],
    cell: Callable[[Record], str],
    line: tuple[str, str],
) -> str:
    cells = {(r[line[0]], r[line[1]], r["B"]): cell(r) for r in records}
    lines = sorted({key[:2] for key in cells})
    if not lines:
        return ""
    rows = [
        [f"{first:,}", what, *(cells.get((first, what, b), "") for b in batches)]
        for first, what in lines
    ]
    return markdown([line[0], "variant", *(f"B={b}" for b in batches)], rows)


def plot_sweeps(records: Iterable[Record], shape: Shape, output: Path) -> list[Path]:
    """A PNG for every sweep that has at least two points, beside the results."""
    records = [r for r in latest(records) if "median_ms" in r]
    written = []
    for sweep, (letter, title) in _AXES.items():
        here = [r for r in records if at(r, shape, free=letter)]
        if len({r[letter] for r in here if r.get("fan_in_wanted") is not None}) < 2:
            continue
        path = output.with_name(f"{output.stem}_{sweep.replace('-', '_')}.png")
        _plot(here, shape, letter, title, path)
        print(f"wrote {path.name}")
        written.append(path)
    return written


def _plot(records: Sequence[Record], shape: Shape, letter: str, title: str, path: Path) -> None:
    """Time and memory of training step and top-k: a color per layout, a line style per dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    lines = _lines(records, letter)
    operations = [name for name in ("step", "top-k") if any(key[0] == name for key in lines)]
    layouts = sorted({_layout(what) for _, what in lines})
    size = (4.8 * len(operations) + 2.4, 7)
    grid = {"figsize": size, "squeeze": False, "sharex": True, "layout": "constrained"}
    figure, axes = plt.subplots(2, len(operations), **grid)
    handles = {}
    for (operation, what), points in lines.items():
        color = "black" if what.startswith("dense") else f"C{layouts.index(_layout(what))}"
        style = {"color": color, "linewidth": 1.4, "label": what}
        style["linestyle"] = next(v for name, v in _STYLES.items() if name in what)
        for row, value in enumerate((_milliseconds, _megabytes_drawn)):
            axis = axes[row][operations.index(operation)]
            if points[0].get("fan_in_wanted") is None and letter == "F":
                handles[what] = axis.axhline(value(points[0])[1], **style)
                continue
            x = [r[letter] for r in points]
            low, middle, high = zip(*map(value, points), strict=True)
            (handles[what],) = axis.plot(x, middle, marker="o", markersize=3.5, **style)
            axis.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
    ticks = sorted({r[letter] for r in records if r.get("fan_in_wanted") == r["F"]})
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    short = FuncFormatter(
        lambda v, _: f"{v / 1024:g}k" if v >= 1024 and v % 1024 == 0 else f"{v:g}"
    )
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(short)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="major", alpha=0.3)
    for column, operation in enumerate(operations):
        axes[0][column].set_title(operation)
        axes[1][column].set_xlabel(title)
    axes[0][0].set_ylabel("ms, median (p20 to p80 shaded)")
    axes[1][0].set_ylabel("extra memory, MB (drawn from 0.01 on)")
    rest = ", ".join(f"{n}={getattr(shape, n):,}" for n in "LDFB" if n != letter)
    figure.suptitle(f"{rest}; {records[0]['device']}, {records[0]['threads']} threads", fontsize=10)
    names = sorted(handles)
    figure.legend([handles[n] for n in names], names, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(records: Sequence[Record], letter: str) -> dict[tuple[str, str], list[Record]]:
    """Points along the axis per (operation, variant), patterns under one name; at least two."""
    lines: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda r: r[letter]):
        what = re.sub(r"\d+:\d+", "N:M", record["what"])
        if record["operation"] in ("step", "top-k") and record.get("pattern") != [2, 4]:
            lines.setdefault((record["operation"], what), []).append(record)

    def drawn(points: list[Record]) -> bool:
        return len(points) > 1 or (letter == "F" and points[0].get("fan_in_wanted") is None)

    return {key: points for key, points in sorted(lines.items()) if drawn(points)}


def _layout(what: str) -> str:
    return what.rpartition(" ")[0]


def _milliseconds(record: Record) -> tuple[float, float, float]:
    return record["p20_ms"], record["median_ms"], record["p80_ms"]


def _megabytes_drawn(record: Record) -> tuple[float, float, float]:
    megabytes = max(0.01, (record["peak_extra_bytes"] or 0) / 1e6)
    return megabytes, megabytes, megabytes
