"""The runs of a comparison: each a process of its own, skipped where it is done."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from xmc.comparison.heads import Variant
from xmc.config import Config, from_dict, to_dict
from xmc.runs import RunError, read_run
from xmc.training.log import read_log
from xmc.training.loop import Interrupted

_TRAIN = "from xmc.cli import main; main()"


class ComparisonError(RuntimeError):
    """A run of a comparison failed."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed, in a run folder of its own."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def config(self) -> Config:
        return self.variant.with_seed(self.seed)

    @property
    def settings(self) -> list[str]:
        return [*self.variant.overrides, f"train.seed={self.seed}"]


@dataclass(frozen=True)
class RunLogs:
    """What the log of a finished run tells."""

    epoch_seconds: float
    """Of training steps, without validation."""
    best_epoch: int
    peak_bytes: int
    """Of the process, or of its GPU."""
    gradient: list[tuple[int, float]]
    """(step, norm of the encoder's gradient)"""
    rewirings: list[dict[str, Any]]
    """step, churn, survival and more of each rewiring"""


def is_finished(run: Run, data_key: str) -> bool:
    """Whether the run's training came to its end.

    Raises RunError where the folder holds something else: another recipe, other data, no run.
    """
    if not run.folder.exists() or not any(run.folder.iterdir()):
        return False
    if not (run.folder / "run.json").exists():
        raise RunError(
            f"{run.folder}: expected a run or nothing, got a folder without run.json: stopped "
            "before its first step? then remove it"
        )
    record = read_run(run.folder)
    # Through `Config`: an option that is newer than the run had its default then.
    saved = to_dict(from_dict(record["config"], source=str(run.folder / "run.json")))
    for section, options in to_dict(run.config).items():
        for key, value in options.items():
            if saved[section][key] != value:
                raise RunError(
                    f"{run.folder}: {section}.{key} was {saved[section][key]!r} there and is "
                    f"{value!r} now; give another --out"
                )
    if record["data_key"] != data_key:
        raise RunError(f"{run.folder}: trained on other data; give another --out")
    log = run.folder / "log.jsonl"
    return log.exists() and any(event["event"] == "end" for event in read_log(log)[-1:])


def train_apart(run: Run, recipe: str | Path, *, data: Path, cache: Path | None) -> None:
    """`xmc train` in a process of its own, so that its peak of memory is its own; or its --resume.

    SIGINT and SIGTERM are passed on; the run then writes a checkpoint. Raises Interrupted after
    that, ComparisonError with the last words of a run that failed.
    """
    command = [sys.executable, "-P", "-c", _TRAIN, *train_arguments(run, recipe, data, cache)]
    # On a terminal the run shows its own progress; elsewhere only its error is of interest.
    quiet = None if sys.stderr.isatty() else subprocess.PIPE
    started: list[subprocess.Popen[bytes]] = []
    with _passed_on(started) as came:
        # In a process group of its own, so that Ctrl-C reaches it once, by way of this process.
        process = subprocess.Popen(command, stderr=quiet, process_group=0)
        started.append(process)
        _, errors = process.communicate()
    if came:
        raise Interrupted(f"stopped in {run.folder}")
    if process.returncode:
        lines = (errors or b"").decode(errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("xmc: ") if lines else f"exit code {process.returncode}"
        raise ComparisonError(f"{run.folder}: training failed: {reason}")


def train_arguments(run: Run, recipe: str | Path, data: Path, cache: Path | None) -> list[str]:
    """The arguments of `xmc` that train this run, or go on with it."""
    arguments = ["train", str(recipe), "--data", str(data), "--out", str(run.folder)]
    for setting in run.settings:
        arguments += ["--set", setting]
    if cache is not None:
        arguments += ["--cache", str(cache)]
    return [*arguments, "--resume"] if (run.folder / "run.json").exists() else arguments


def read_logs(run: Run) -> RunLogs:
    """Read the log of a finished run."""
    events = read_log(run.folder / "log.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    end = events[-1]
    return RunLogs(
        epoch_seconds=end["seconds"] / run.config.train.epochs,
        best_epoch=end["epoch"],
        peak_bytes=max(event["peak_memory_bytes"] for event in steps),
        gradient=[(event["step"], event["encoder_grad_norm"]) for event in steps],
        rewirings=[event for event in events if event["event"] == "rewire"],
    )


def plan_runs(variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> list[Run]:
    """Seed by seed, so that all heads can be compared on the first seed soon."""
    return [
        Run(variant, seed, out / variant.name / f"seed-{seed}")
        for seed in seeds
        for variant in variants
    ]


@contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand SIGINT and SIGTERM on to the processes; yields the list of those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process in processes:
            process.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
