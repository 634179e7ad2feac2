"""What the benchmark of pipelines runs: sizes, and how long each stage sleeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SCENARIOS = ("even", "one slow", "one irregular", "all irregular")
_BACKWARD = 2  # times a forward pass


@dataclass(frozen=True)
class Setting:
    """What is run; durations are those of sleep, which stands for a device's work."""

    stages: int
    micro_batches: int
    scenario: str
    forward_ms: float = 10.0
    """Of a stage and micro-batch; backward takes twice as long."""
    slow_stage: int = 0
    factor: float = 2.0
    """How many times longer the slow stage takes; on the average where it is irregular."""
    rows: int = 4  # of a micro-batch
    T: int = 16
    D: int = 32

    def durations(self, stage: int, step: int) -> np.ndarray:  # [M, 2]
        """Seconds of forward and backward of each micro-batch: the same for every engine."""
        generator = np.random.default_rng((step, stage))
        seconds = np.full((self.micro_batches, 2), 1e-3 * self.forward_ms)
        seconds[:, 1] *= _BACKWARD
        is_slow = stage == self.slow_stage
        if self.scenario == "one slow" and is_slow:
            seconds *= self.factor
        elif self.scenario == "one irregular" and is_slow:
            seconds *= 1 + (self.factor - 1) * generator.exponential(size=seconds.shape)
        elif self.scenario == "all irregular":
            seconds *= generator.gamma(2, 0.5, size=seconds.shape)  # mean 1, variance 1/2
        return seconds
