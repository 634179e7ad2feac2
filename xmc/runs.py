"""The record of a run, `RUN/run.json`: which recipe, which data, which versions."""

from __future__ import annotations

import json
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
