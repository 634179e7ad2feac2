"""Lines of a results file, and what every report makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_VERSIONS = ("torch", "numba", "triton", "sentence-transformers")


def read_records(path: Path) -> list[Record]:
    """The lines of a results file."""
    if not path.exists():
        raise SystemExit(f"expected measured lines in {path}, got no such file: measure first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(records: Iterable[Record], names: Sequence[str]) -> list[Record]:
    """Of the device and threads measured last, the last line of each value of the fields named."""
    records = list(records)
    where = [(r["device"], r["threads"]) for r in records]
    kept = {}
    for record, place in zip(records, where, strict=True):
        if place == where[-1]:
            kept[tuple(record.get(name) for name in names)] = record
    return list(kept.values())


def where_from(records: Sequence[Record]) -> str:
    """Device, threads, versions, commits and date in a sentence."""
    if not records:
        raise SystemExit("expected measured lines, got an empty file")
    r = records[-1]
    commits = ", ".join(sorted({record["commit"] for record in records}))
    dates = sorted({record["date"] for record in records})
    versions = ", ".join(f"{n} {r[n]}" for n in _VERSIONS if r.get(n))
    return f"{r['device']}, {r['threads']} threads, {versions}, commit {commits}, {dates[-1]}."


def megabytes(record: Record) -> str:
    """What one run holds at its peak, in MB."""
    extra = record["peak_extra_bytes"]
    return "-" if extra is None else f"{extra / 1e6:.1f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
