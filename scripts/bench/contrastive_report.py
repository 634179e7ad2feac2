"""Tables and plots from the lines that `contrastive.py` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from contrastive_jobs import MATERIALISED, TILED
from contrastive_step import PLAIN
from records import Record, markdown, megabytes, where_from
from records import latest as last_of

_FIELDS = ("operation", "what", "B", "D", "dtype", "chunk", "T", "layers")
_STYLES = {"float32": "-", "bfloat16": "--", "float16": ":"}


def latest(records: Iterable[Record]) -> list[Record]:
    """Of the device and threads measured last, the last line of each variant and shape."""
    return last_of(records, _FIELDS)


def show(records: Sequence[Record]) -> None:
    """Print one shape's lines."""
    for r in records[:1]:
        place = f"{r['device']}, {r['threads']} threads"
        print(f"{r['operation']} B={r['B']:,} D={r['D']} {r['dtype']}, {place}")
        columns = ("median ms", "p20", "p80", "GFLOP/s", "extra MB", "error")
        print(f"  {'':44s}" + "".join(f"{name:>11s}" for name in columns))
    for r in records:
        if "median_ms" not in r:
            print(f"  {r['what']:44s} not available: {r['not_available']}")
            continue
        text = "".join(f"{r[name]:11.2f}" for name in ("median_ms", "p20_ms", "p80_ms"))
        rate = f"{r['gflop_per_s']:11.1f}" if "gflop_per_s" in r else f"{'':11s}"
        error = f"{r['gradient_error']:11.1e}" if "gradient_error" in r else ""
        print(f"  {r['what']:44s}{text}{rate}{megabytes(r):>11s}{error}", flush=True)


def tables(records: Iterable[Record]) -> str:
    """Markdown: the largest materialised loss, the loss over B and over D, the step."""
    records = latest(records)
    about = where_from(records)
    losses = [r for r in records if r["operation"] == "loss"]
    steps = [r for r in records if r["operation"] == "step" and "median_ms" in r]
    parts = [_headline(losses)]
    parts += [_grid(losses, "B", "D"), _grid(losses, "D", "B"), _errors(losses), _steps(steps)]
    return "\n\n".join([about, *(part for part in parts if part)])


def _headline(losses: Sequence[Record]) -> str:
    """Everything about the largest shape at which the whole matrix was measured."""
    dense = [r for r in losses if r["what"] == MATERIALISED and "median_ms" in r]
    if not dense:
        return ""
    base = max(dense, key=lambda r: (r["B"], r["D"], r["dtype"] == "float32"))
    here = [r for r in losses if all(r[name] == base[name] for name in ("B", "D", "dtype"))]
    rows = []
    for r in here:
        if "median_ms" not in r:
            rows.append([r["what"], f"not available: {r['not_available']}", *[""] * 6])
            continue
        held = ""
        if r["peak_extra_bytes"] and base["peak_extra_bytes"]:
            held = f"1/{base['peak_extra_bytes'] / r['peak_extra_bytes']:.3g}"
        errors = [f"{r[name]:.1e}" if name in r else "" for name in _ERRORS]
        rows.append(
            [
                r["what"],
                f"{r['median_ms']:,.1f} ({r['p20_ms']:,.1f} - {r['p80_ms']:,.1f})",
                f"{base['median_ms'] / r['median_ms']:.2f}x",
                f"{r['gflop_per_s']:.0f}",
                megabytes(r),
                held,
                *errors,
            ]
        )
    title = (
        f"Symmetric loss with gradients, B={base['B']:,}, D={base['D']}, {base['dtype']} "
        "(GFLOP/s of four products; errors against float64):"
    )
    names = "variant|ms, median (p20 - p80)|speed|GFLOP/s|extra MB|of materialised"
    return f"{title}\n\n{markdown([*names.split('|'), 'error', 'of gradients'], rows)}"


_ERRORS = ("loss_error", "gradient_error")


def _grid(losses: Sequence[Record], free: str, fixed: str) -> str:
    """A line per dtype and variant, a column per value of `free`, where it takes most values."""
    where = _most_values(losses, free, fixed)
    here = [r for r in losses if r[fixed] == where and "median_ms" in r]
    values = sorted({r[free] for r in here})
    if len(values) < 2:
        return ""
    title = f"Loss with gradients at {fixed}={where:,}: ms (extra MB)."
    text = _by(here, free, lambda r: f"{r['median_ms']:,.1f} ({megabytes(r)})")
    return f"{title}\n\n{text}"


def _most_values(records: Sequence[Record], free: str, fixed: str) -> int:
    """The value of a field at which another takes most values; 0 where there are no records."""
    found = {r[fixed] for r in records if "median_ms" in r}
    return max(found, key=lambda value: _spread(records, free, fixed, value), default=0)


def _spread(records: Sequence[Record], free: str, fixed: str, value: int) -> int:
    return len({r[free] for r in records if r[fixed] == value and "median_ms" in r})


def _errors(losses: Sequence[Record]) -> str:
    where = _most_values(losses, "B", "D")
    here = [r for r in losses if r["D"] == where and "gradient_error" in r]
    if len({r["B"] for r in here}) < 2:
        return ""
    text = _by(here, "B", lambda r: f"{r['gradient_error']:.1e}")
    return f"Relative error of the gradients against float64 at D={where}.\n\n{text}"


def _steps(steps: Sequence[Record]) -> str:
    if not steps:
        return ""
    r = steps[-1]
    plain = {r["B"]: r["median_ms"] for r in steps if r["what"] == PLAIN}

    def cell(r: Record) -> str:
        ratio = f", {r['median_ms'] / plain[r['B']]:.2f}x" if r["B"] in plain else ""
        held = f"{r['activation_bytes'] / 1e6:,.0f} MB" if "activation_bytes" in r else "-"
        return f"{r['median_ms']:,.0f}{ratio} ({held})"

    title = (
        f"Step of a transformer of {r['layers']} layers, width {r['D']}, {r['T']} tokens a row, "
        f"chunks of {r['chunk']}: ms, against plain (tensors held at most)."
    )
    return f"{title}\n\n{_by(steps, 'B', cell)}"


def _by(records: Sequence[Record], free: str, cell: Callable[[Record], str]) -> str:
    """A line per dtype and variant, a column per value of a field."""
    cells = {(r["dtype"], r["what"], r[free]): cell(r) for r in records}
    names = list(dict.fromkeys((r["dtype"], r["what"]) for r in records))
    names.sort(key=lambda name: name[0] != "float32")
    values = sorted({r[free] for r in records})
    rows = [[*name, *(cells.get((*name, value), "") for value in values)] for name in names]
    return markdown(["dtype", "variant", *(f"{free}={value:,}" for value in values)], rows)


def plots(records: Iterable[Record], output: Path) -> list[Path]:
    """PNGs of loss and step over B, of what has at least two batch sizes."""
    records = [r for r in latest(records) if "median_ms" in r]
    losses = [r for r in records if r["operation"] == "loss"]
    where = _most_values(losses, "B", "D")
    losses = [r for r in losses if r["D"] == where]
    steps = [r for r in records if r["operation"] == "step"]
    written = []
    for name, here, memory in (
        ("loss", losses, ("peak_extra_bytes", "extra memory, MB")),
        ("step", steps, ("activation_bytes", "tensors held at most, MB")),
    ):
        if len({r["B"] for r in here}) < 2:
            continue
        path = output.with_name(f"{output.stem}_{name}.png")
        r = here[-1]
        fixed = f"D={r['D']:,}" if name == "loss" else f"D={r['D']}, chunks of {r['chunk']}"
        title = f"{name}, {fixed}; {r['device']}, {r['threads']} threads"
        _plot(here, memory, title, path)
        written.append(path)
    return written


def _plot(records: Sequence[Record], memory: tuple[str, str], title: str, path: Path) -> None:
    """Time and memory over B: a color per variant, a line style per dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    names = list(dict.fromkeys(r["what"] for r in records))
    names.sort(key=lambda name: name != TILED)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    handles = {}
    panels = (("median_ms", 1.0, "ms, median"), (memory[0], 1e6, memory[1]))
    for axis, (field, unit, label) in zip(axes, panels, strict=True):
        for dtype in sorted({r["dtype"] for r in records}, reverse=True):
            for number, what in enumerate(names):
                own = (r for r in records if (r["what"], r["dtype"]) == (what, dtype))
                points = sorted((r["B"], r[field] / unit) for r in own if r.get(field))
                if not points:
                    continue
                line = axis.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    linestyle=_STYLES[dtype],
                    marker="o",
                    markersize=3.5,
                    linewidth=1.4,
                )
                handles[f"{what}, {dtype}"] = line[0]
        axis.set(xscale="log", yscale="log", xlabel="rows of a batch B", ylabel=label)
        axis.set_xticks(sorted({r["B"] for r in records}))
        short = FuncFormatter(lambda v, _: f"{v / 1024:g}k" if v >= 1024 else f"{v:g}")
        axis.xaxis.set_major_formatter(short)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, which="major", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
