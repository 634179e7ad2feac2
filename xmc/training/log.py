"""The JSONL log of a run: one object a line, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Appends events; a resumed run forgets what was written after its checkpoint.

    Without a path it keeps nothing, which is the log of all ranks but the first.
    """

    def __init__(self, path: Path | None, keep_bytes: int = 0) -> None:
        self._file = None if path is None else path.open("ab")
        if self._file is not None:
            self._file.truncate(keep_bytes)

    def write(self, event: str, **values: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"event": event, **values}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the log to disk and return its length in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete events of a log, oldest first; a line that a crash cut off is none."""
    *lines, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]
