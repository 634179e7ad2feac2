"""How long a step takes on N ranks: parts of it timed in one process, scaled to a rank's share.

Every rank is taken to compute like this process. A step of the classifier over l labels and b rows
takes c0 + c1 b + c2 l + c3 l b seconds, by four measured points (weights are updated once a step,
whatever the rows). A bag's forward pass is linear in the rank's rows; every rank makes the gradient
of the table and its update for the rows of all. A transformer is linear in the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xmc.training.memory_encoder import passes_of
from xmc.training.memory_model import Sizes
from xmc.training.step_rate import StepTime, bag_seconds, classifier_seconds


@dataclass(frozen=True)
class RankTime:
    """Predicted seconds of an optimizer step on a rank, one part after the other."""

    encoder: float
    classifier: float
    communication: float
    steps_per_epoch: int

    @property
    def step(self) -> float:
        return self.encoder + self.classifier + self.communication

    @property
    def epoch(self) -> float:
        return self.step * self.steps_per_epoch


@dataclass(frozen=True)
class Rates:
    """What was measured in one process, of the recipe's rows of a pass and all its labels."""

    whole: StepTime
    """The step of one rank, which a prediction for one rank equals."""
    rows: int
    labels: int
    classifier: tuple[float, float, float, float]
    """c0, c1, c2, c3 of a pass, in seconds."""
    encoder: tuple[float, float, float]
    """A pass of no rows, of each of a rank's rows, and what each row of all ranks takes."""

    def scaled(self, sizes: Sizes, communication: float) -> RankTime:
        """Of a rank; the sizes are those of the same recipe, but for the rows of a pass."""
        rows, _ = passes_of(sizes.config)
        options = sizes.config.train
        step_rows = options.batch_size * options.accumulation
        own = sizes.ranks.share(rows)
        labels = sizes.ranks.share(sizes.workload.num_labels)
        classifier = self._classifier(rows, labels) / self._classifier(self.rows, self.labels)
        encoder = self._encoder(own, rows) / self._encoder(self.rows, self.rows)
        return RankTime(
            self.whole.encoder * encoder,
            self.whole.classifier * classifier,
            communication,
            -(-sizes.workload.num_rows // step_rows),
        )

    def _classifier(self, rows: int, labels: int) -> float:
        fixed, by_row, by_label, by_both = self.classifier
        return fixed + by_row * rows + (by_label + by_both * rows) * labels

    def _encoder(self, own: int, rows: int) -> float:
        fixed, by_row, update = self.encoder
        return fixed + by_row * own + update * rows


def measure_rates(sizes: Sizes, whole: StepTime) -> Rates:
    """Time what `measure_step`, whose result is `whole`, leaves open; two seconds more."""
    rows, passes = passes_of(sizes.config)
    other = rows // 4 if rows >= 4 else 4 * rows
    labels, few = sizes.workload.num_labels, sizes.config.head.group_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        points = {
            (rows, labels): whole.classifier / passes,
            (other, labels): classifier_seconds(sizes, other),
            (rows, few): classifier_seconds(sizes, rows, few),
            (other, few): classifier_seconds(sizes, other, few),
        }
        encoder = (0.0, 1.0, 0.0)  # only the proportion counts
        if sizes.encoder.transformer is None:
            first, second = (bag_seconds(sizes, r, update=False) for r in (rows, other))
            encoder = _encoder(rows, other, first, second, whole.encoder / passes)
    return Rates(whole, rows, labels, _plane(points, rows, other, labels, few), encoder)


def _plane(
    points: dict[tuple[int, int], float], rows: int, other: int, labels: int, few: int
) -> tuple[float, float, float, float]:
    """c0 to c3 through four points (rows, labels); none is below 0, whatever noise says."""
    by_labels = {
        r: max(points[r, labels] - points[r, few], 0) / max(labels - few, 1) for r in (rows, other)
    }
    by_both = max((by_labels[rows] - by_labels[other]) / (rows - other), 0)
    by_label = max(by_labels[rows] - by_both * rows, 0)
    by_row = max((points[rows, few] - points[other, few]) / (rows - other), 0)
    fixed = max(points[rows, few] - by_row * rows, 0)
    return fixed, by_row, by_label, by_both


def _encoder(
    rows: int, other: int, first: float, second: float, whole: float
) -> tuple[float, float, float]:
    by_row = max((first - second) / (rows - other), 0)
    fixed = max(first - by_row * rows, 0)
    return fixed, by_row, max(whole - first, 0) / rows
