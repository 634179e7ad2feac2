"""The progress bar of a training, on a terminal and off it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from xmc.training.progress import TrainingProgress, untracked


def test_work_between_steps_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**options: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=120)

    monkeypatch.setattr("xmc.training.progress.Console", terminal)
    with TrainingProgress(10, 2, show=True) as progress:
        progress.step(0.5, 100.0, 2**30)
        seen = []
        for item in progress.track([4, 5, 6], "labels"):
            progress._progress.refresh()
            seen.append(item)
        assert "labels" in screen.getvalue()
        assert "2/3" in screen.getvalue()
        screen.truncate(0)
        progress._progress.refresh()
        assert "labels" not in screen.getvalue()  # gone when it is done
        assert "3/10" in screen.getvalue()
    assert seen == [4, 5, 6]


def test_off_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(10, 0, show=True) as progress:
        progress.step(0.5, 100.0, 2**30)
        assert list(progress.track([1, 2], "labels")) == [1, 2]
    assert capsys.readouterr() == ("", "")
    assert list(untracked([3], "labels")) == [3]
