"""Every Triton kernel compiled ahead of time, without a GPU: `python -m xmc_kernels.aot`.

Prints a table of registers, spilled bytes, shared memory and matrix instructions for the kernels
in their real configurations, and writes it as JSON lines where a file is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

ARCHITECTURES = (80, 90, 100)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of one program (CUDA C++ Programming Guide, table of compute capabilities)."""

COLUMNS = (
    "kernel",
    "config",
    "architecture",
    "num_warps",
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "tensor_cores",
)


def resource_table(
    architectures: Iterable[int] = ARCHITECTURES,
    *,
    jobs: int = 1,
    only: str = "",
    sample: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row of `COLUMNS` per kernel, configuration and architecture.

    `only` keeps the configurations whose name contains it; `sample` compiles each of them for one
    architecture, chosen by its name. Needs a process without
    TRITON_INTERPRET=1 (RuntimeError otherwise).
    """
    from xmc_kernels._triton.configurations import configurations

    names = [name for name, _ in configurations() if only in name]
    known = list(architectures)
    tasks = [
        (name, architecture)
        for name in names
        for architecture in ([known[crc32(name.encode()) % len(known)]] if sample else known)
    ]
    if jobs == 1:
        yield from map(_row, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_row, tasks)


def _row(task: tuple[str, int]) -> dict[str, Any]:
    from xmc_kernels._triton.configurations import configurations
    from xmc_kernels._triton.resources import resources

    name, architecture = task
    row = resources(dict(configurations())[name], architecture)
    return {column: {"config": name, **row}[column] for column in COLUMNS}


def main() -> None:
    """Print the table; exit with an error where a kernel spills or wants too much memory."""
    parser = argparse.ArgumentParser(prog="python -m xmc_kernels.aot", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument(
        "--sample", action="store_true", help="each configuration for one architecture only"
    )
    options = parser.parse_args()
    rows, bad = [], []
    for row in resource_table(
        options.arch, jobs=options.jobs, only=options.only, sample=options.sample
    ):
        rows.append(row)
        print("  ".join(f"{row[column]!s:{width}}" for column, width in _WIDTHS.items()))
        if row["spilled_bytes"] or row["shared_bytes"] > SHARED_LIMIT[row["architecture"]]:
            bad.append(row)
    if options.out is not None:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if bad:
        raise SystemExit(f"{len(bad)} of {len(rows)} kernels spill or exceed shared memory")


_WIDTHS = dict(zip(COLUMNS, (26, 44, 4, 3, 4, 5, 7, 8), strict=True))

if __name__ == "__main__":
    main()
