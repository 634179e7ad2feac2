"""Progress of a training: a bar if standard error is a terminal, a line an epoch in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Passes items on while their number is shown under a description."""


def untracked(items: Sequence[T], description: str) -> Sequence[T]:
    """The items, and nothing shown."""
    return items


class TrainingProgress:
    """Shows steps, time left, loss, validation P@k, examples/s and peak memory."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        console = Console(stderr=True)
        self._show = show and console.is_terminal
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not self._show,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, numbers="")
        self._loss = self._rate = 0.0
        self._scores = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, loss: float, examples_per_second: float, memory_bytes: int) -> None:
        if not self._show:
            return
        self._loss = 0.95 * self._loss + 0.05 * loss if self._loss else loss
        self._rate = (
            0.95 * self._rate + 0.05 * examples_per_second if self._rate else examples_per_second
        )
        numbers = (
            f"loss {self._loss:.3f}  {self._rate:,.0f} examples/s  "
            f"{memory_bytes / 2**30:.2f} GiB  {self._scores}"
        )
        self._progress.update(self._task, advance=1, numbers=numbers)

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Pass the items on while a bar of their own shows how many: for work between two steps."""
        task = self._progress.add_task(description, total=len(items), numbers="")
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def validation(self, epoch: int, values: dict[str, float]) -> None:
        """Keep the scores in the bar and print them as a line of their own."""
        self._scores = f"P@1 {100 * values['P@1']:.1f}"
        line = "  ".join(f"{name} {100 * value:.2f}" for name, value in values.items())
        self._console.print(f"epoch {epoch:>3}  {line}", highlight=False, soft_wrap=True)
