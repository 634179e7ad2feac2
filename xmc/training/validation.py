"""Scores on the validation rows, between two epochs."""

from __future__ import annotations

from collections.abc import Sequence

from xmc.config import Config
from xmc.data.batches import Dataset
from xmc.evaluation.metrics import MetricAccumulator, evaluate
from xmc.model import XMCModel


def validation_scores(
    model: XMCModel,
    rows: Dataset | None,
    config: Config,
    *,
    ks: tuple[int, ...],
    metrics: Sequence[str],
) -> dict[str, float] | None:
    """The metrics at the ranks `ks` of a model on rows; None where there are none."""
    if rows is None:
        return None
    scores = evaluate(
        model.topk_of(max(ks)),
        rows.batches(config.train.eval_batch_size),
        MetricAccumulator(ks=ks),
    )
    return {name: scores.values[name] for name in metrics}
