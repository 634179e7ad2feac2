"""What torchrun tells a process in its environment; quick to import, unlike torch."""

from __future__ import annotations

import os


def launched_ranks() -> int:
    """How many processes torchrun started, 1 where it was not used."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def launched_rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ["RANK"]) if _launched() else 0


def launched_local_rank() -> int:
    """Which of those on this machine this process is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _launched() else 0


def _launched() -> bool:
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()
