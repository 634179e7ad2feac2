"""Measure the contrastive loss of several ranks: keys round a ring, gathered, and materialised.

    python scripts/bench/ring.py [--ranks 2,4] [--rows 1024,4096 --dim 256 --runs 10]
    python scripts/bench/ring.py --table               (from the lines measured before)

Each rank is a process on the CPU (gloo) with one thread and so many rows of queries and keys; a
step is the symmetric InfoNCE of all rows, forward and backward, float32. Variants take turns:
"ring" and "gather" of `xmc.losses`, both also with keys as bfloat16 on the wire, and the usual
way, "materialised": keys and queries are gathered, and a rank has its rows and its columns of the
similarities as matrices that autograd differentiates.

Reported: the time of a step until the last rank is done; what the rank that holds most holds at
its peak beside q and k; bytes that a rank hands over to others (of collectives, what the usual
algorithms send); the largest difference of a gradient from the materialised one's, over its
largest number. Ranks that share cores wait for each other: compare variants, not numbers of ranks.
Appends a JSON line per variant to `scripts/bench/results/ring.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.multiprocessing as mp
from provenance import RESULTS, append, provenance
from records import Record, latest, markdown, megabytes, read_records, where_from

_FIELDS = ("what", "ranks", "B", "D")
_LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}


def main() -> None:
    """Measure, or report what was measured."""
    options = parse()
    if options.measure:
        for ranks in options.ranks:
            for rows in options.rows:
                records = measured(ranks, rows, options.dim, options.runs)
                append(options.output, records)
                show(records)
                for record in records:
                    if record["gradient_difference"] > _LARGEST_ERROR[record["wire"]]:
                        sys.exit(f"expected the materialised loss's gradients from {record}")
    if options.table:
        print(table(read_records(options.output)))


def measured(ranks: int, rows: int, dim: int, runs: int) -> list[Record]:
    """Lines of all variants on so many ranks."""
    from ring_jobs import measure  # only here: it takes seconds to load

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, ranks, rows, dim, runs), nprocs=ranks)
        lines = json.loads(Path(folder, "lines.json").read_text())
    about = provenance(packages=["numba"]) | {"threads": 1}
    shape = {"ranks": ranks, "B": ranks * rows, "D": dim, "dtype": "float32"}
    return [{"operation": "loss of ranks", **line, **shape, **about} for line in lines]


def show(records: Sequence[Record]) -> None:
    """Print lines."""
    r = records[0]
    print(f"{r['ranks']} ranks, {r['B']} rows of all, {r['D']} features")
    for r in records:
        print(
            f"  {r['what']:18s}{r['median_ms']:9.1f} ms ({r['p20_ms']:.1f} - {r['p80_ms']:.1f})"
            f"{megabytes(r):>9s} MB at the peak {r['sent_bytes'] / 1e6:9.2f} MB sent",
            flush=True,
        )


def table(records: Sequence[Record]) -> str:
    """Markdown of the lines measured last."""
    header = ["ranks", "rows of all", "variant", "ms a step (p20 - p80)", "MB at the peak"]
    header += ["MB sent by a rank"]
    rows = [
        [
            *(str(r["ranks"]), str(r["B"]), r["what"]),
            f"{r['median_ms']:.1f} ({r['p20_ms']:.1f} - {r['p80_ms']:.1f})",
            *(megabytes(r), f"{r['sent_bytes'] / 1e6:.2f}"),
        ]
        for r in latest(records, _FIELDS)
    ]
    return f"{where_from(records)}\n\n{markdown(header, rows)}"


def parse() -> argparse.Namespace:
    """The command line; `measure` says whether anything is to be timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=_numbers, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--rows", type=_numbers, default=[1024, 4096], help="of each rank")
    parser.add_argument("--dim", type=int, default=256, help="features of a row")
    parser.add_argument("--runs", type=int, help="of each variant; default: 10")
    parser.add_argument("--table", action="store_true", help="print markdown")
    parser.add_argument("--output", type=Path, default=RESULTS / "ring.jsonl")
    options = parser.parse_args()
    if min(options.ranks) < 2:
        parser.error(f"expected at least 2 ranks, got {min(options.ranks)}")
    options.measure = bool(options.runs) or not options.table
    options.runs = options.runs or 10
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text}")
    return numbers


if __name__ == "__main__":
    main()
