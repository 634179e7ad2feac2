"""The quick start after installation: build pydoc, train sparse and dense, compare, ask.

Run by scripts/quickstart; every step is the `xmc` command a user would type.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from xmc.training.log import read_log

QUERIES = [
    "Concatenate two tensors along a dimension.",
    "Compile a regular expression and split the string by it.",
    "Return the absolute path of a file, following symbolic links.",
]
METRICS = ["P@1", "P@3", "P@5", "nDCG@5", "PSP@5"]


def main(folder: Path) -> None:
    started = time.perf_counter()
    data, cache = folder / "pydoc", folder / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        xmc("data", "build", "pydoc", "--out", data)
    xmc("data", "info", data)
    rows: list[tuple[str, dict[str, object], str, str, str]] = []
    for name, settings in [("sparse", []), ("dense", ["--set", "head.kind=dense"])]:
        run = folder / name
        shutil.rmtree(run, ignore_errors=True)  # our own output of an earlier quick start
        xmc("train", "quickstart", "--data", data, "--out", run, "--cache", cache, *settings)
        xmc("evaluate", run, "--cache", cache, "--split", "test")
        values = scores(run / "evaluation-test.json")
        rows.append((name, values, peak_memory(run), *sizes(run)))
    xmc("evaluate", folder / "sparse", "--cache", cache, "--split", "test", "--baseline")
    baseline = scores(folder / "sparse" / "baseline-test.json")
    rows.insert(0, ("popular", baseline, "", "", ""))

    table = Table("%", *METRICS, "peak MiB", "model MiB", "head MiB", title="pydoc, test")
    for name, values, *memory in rows:
        cells = [f"{100 * float(str(values[metric])):.1f}" for metric in METRICS]
        table.add_row(name, *cells, *memory)
    console = Console()
    console.print(table)
    ratio = float(str(rows[1][1]["P@1"])) / float(str(rows[2][1]["P@1"]))
    console.print(f"sparse P@1 / dense P@1 = {ratio:.3f}")
    texts = [part for query in QUERIES for part in ("--text", query)]
    xmc("predict", folder / "sparse", *texts, "-k", "3")
    minutes = (time.perf_counter() - started) / 60
    console.print(f"\n{minutes:.1f} minutes. Everything is in {folder}")


def xmc(*arguments: object) -> None:
    """Run one `xmc` command, shown as a user would type it."""
    command = ["xmc", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def scores(path: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads(path.read_text())["values"]
    return values


def peak_memory(run: Path) -> str:
    steps = [event for event in read_log(run / "log.jsonl") if event["event"] == "step"]
    peak = max(event["peak_memory_bytes"] for event in steps)
    return f"{peak / 2**20:,.0f}"


def sizes(run: Path) -> tuple[str, str]:
    """MiB of the whole model on disk, and of its classifier's weights and indices."""
    total = sum(f.stat().st_size for f in (run / "model").rglob("*") if f.is_file())
    with safe_open(run / "model" / "weights.safetensors", framework="np") as file:
        names = [name for name in file.keys() if name.startswith("head.")]  # noqa: SIM118
        head = sum(file.get_tensor(name).nbytes for name in names)
    return f"{total / 2**20:,.1f}", f"{head / 2**20:,.1f}"


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
