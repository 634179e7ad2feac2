"""Inverse propensities: how much a rare label counts in the propensity-scored metrics.

Jain, Prabhu and Varma, "Extreme multi-label loss functions for recommendation, tagging, ranking
and other missing label applications", KDD 2016, section 4: inv_p(l) = 1 + C (N_l + b)^(-a) with
C = (ln N - 1) (b + 1)^a, for N training rows of which N_l carry label l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc.types import SparseLabels

PRESETS: dict[str, tuple[float, float]] = {
    "amazon": (0.6, 2.6),
    "wikipedia": (0.5, 0.4),
    "default": (0.55, 1.5),
}
"""(a, b) by kind of data set: the fits of the paper, "default" for all that is neither."""


@dataclass(frozen=True)
class Propensity:
    """The inverse propensity of every label, with the constants a report has to name."""

    inverse: Tensor  # [L] float64
    a: float
    b: float
    num_rows: int
    source: str
    """Where a, b and N come from, in words for the report."""

    @classmethod
    def from_labels(
        cls,
        labels: SparseLabels,
        preset: str = "default",
        *,
        a: float | None = None,
        b: float | None = None,
    ) -> Propensity:
        """From the labels of the training rows; `a` and `b` together replace the preset's.

        `labels` holds the training documents only: rows made from label texts count neither in N
        nor in N_l.
        """
        if (a is None) != (b is None):
            raise ValueError(f"expected both a and b, or neither, got a={a} and b={b}")
        if preset not in PRESETS:
            raise ValueError(f'expected a preset of {", ".join(PRESETS)}, got "{preset}"')
        source = f'preset "{preset}"'
        if a is None or b is None:
            a, b = PRESETS[preset]
        else:
            source = "a and b given"
        source += "; N and label counts of the training rows"
        inverse = inverse_propensity(labels.frequencies(), labels.num_rows, a, b)
        return cls(inverse, a, b, labels.num_rows, source)


def inverse_propensity(
    label_counts: Tensor,  # [L], training rows that carry each label
    num_rows: int,
    a: float,
    b: float,
) -> Tensor:  # [L] float64
    """`1 + C (label_counts + b)^-a` with `C = (ln num_rows - 1) (b + 1)^a`.

    Raises ValueError for fewer than 3 rows (C would be negative), a or b that is not positive, or
    a count outside [0, num_rows].
    """
    if num_rows < 3:
        raise ValueError(f"expected at least 3 training rows for propensities, got {num_rows}")
    for name, value in (("a", a), ("b", b)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected a finite {name} > 0, got {value}")
    if label_counts.dim() != 1:
        raise ValueError(f"expected label_counts of shape [L], got {list(label_counts.shape)}")
    counts = label_counts.to(torch.float64)
    if counts.numel() and not bool(((counts >= 0) & (counts <= num_rows)).all()):
        raise ValueError(
            f"expected label counts in [0, {num_rows}] (the number of training rows), "
            f"got {label_counts.min().item()} to {label_counts.max().item()}"
        )
    constant = (math.log(num_rows) - 1.0) * (b + 1.0) ** a
    return 1.0 + constant * (counts + b) ** -a
