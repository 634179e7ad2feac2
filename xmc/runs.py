"""The record of a run, `RUN/run.json`: which recipe, which data, which versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class RunError(ValueError):
    """A folder that is no run, or a run that is not what it should be."""


def read_run(run: Path) -> dict[str, Any]:
    """The record of a run. Raises RunError when the folder holds none."""
    path = run / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        record["config"], record["data"], record["data_key"]
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}: {run} is not a run folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not the record of a run: {error!r}") from None
    return record


def model_folder(path: Path) -> Path:
    """The folder of the model in a run folder, or the path where that is a model's itself."""
    return path / "model" if (path / "model").is_dir() else path


def check_same_labels(
    labels: Sequence[str], expected: Sequence[str], name: str | Path, model: str = "the model"
) -> None:
    """Raise RunError naming the first label that differs from those of a model."""
    if labels == expected:
        return
    if len(labels) != len(expected):
        raise RunError(f"{name}: expected the {len(expected)} labels of {model}, got {len(labels)}")
    first = next(
        i for i, pair in enumerate(zip(labels, expected, strict=True)) if len(set(pair)) > 1
    )
    raise RunError(
        f"{name}: label {first} is {labels[first]!r}, in {model} it is {expected[first]!r}"
    )
