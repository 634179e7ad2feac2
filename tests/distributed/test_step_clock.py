"""Where the time of a step went."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from xmc.distributed import step_clock
from xmc.distributed.step_clock import StepClock, StepReport


def test_what_is_neither_computed_nor_summed_was_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks: Iterator[float] = iter([10.0, 11.0, 14.0, 15.0, 15.5, 16.0, 18.0, 20.0])
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(ticks))
    clock = StepClock(torch.device("cpu"))
    with clock.busy():
        pass
    with clock.busy():
        pass
    with clock.reducing():
        pass
    report = clock.report(max_in_flight=2, num_micro_batches=4, bytes_sent=100)
    assert report == StepReport(10.0, 3.5, 2.0, 2, 4, 100)
    assert report.waiting_seconds == 4.5
    assert report.idle_share == 0.45


def test_reports_of_two_sweeps_add_up() -> None:
    total = StepReport(2.0, 1.0, 0.0, 0, 5, 10) + StepReport(6.0, 2.0, 1.0, 3, 5, 20)
    assert total == StepReport(8.0, 3.0, 1.0, 3, 5, 30)
    assert total.idle_share == 0.5
    assert StepReport(0.0, 0.0, 0.0, 0, 0, 0).idle_share == 0.0
