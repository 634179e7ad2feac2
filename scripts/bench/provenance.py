"""Where a measured number comes from: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def provenance(
    device: str = "cpu", packages: Sequence[str] = ("numba", "triton")
) -> dict[str, Any]:
    """The fields that every line of a results file carries; no paths outside the repository.

    `packages` are those whose versions matter, beside torch's.
    """
    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu: {cpu_name()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *map(_without_home, sys.argv)]),
    }


def _without_home(argument: str) -> str:
    """An absolute path as it reads from the repository's root, or its last part."""
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    root = Path(__file__).resolve().parents[2]
    inside = path.is_relative_to(root)
    return f"{name}{equals}{path.relative_to(root) if inside else path.name}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    return " ".join(fields.get(name, "").strip() for name in ("model name", "cpu family", "model"))


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add lines to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
