"""Evaluation of a trained run on a split of its data, or of other data with the same labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from xmc.data.batches import load_dataset
from xmc.data.formats import read_labels, split_name
from xmc.evaluation.frequency import frequency_topk
from xmc.evaluation.metrics import MetricAccumulator, Scores
from xmc.evaluation.metrics import evaluate as score_batches
from xmc.evaluation.propensity import Propensity
from xmc.model import XMCModel, load_model
from xmc.runs import RunError, read_run
from xmc.types import Batch, TopK

KS = (1, 3, 5, 10)


def evaluate(
    run: str | Path | XMCModel,
    split: str = "test",
    *,
    data: str | Path | None = None,
    ks: tuple[int, ...] = KS,
    propensity: str = "default",
    a: float | None = None,
    b: float | None = None,
    threshold: float | None = None,
    drop_empty: bool = False,
    bootstrap: int = 0,
    baseline: bool = False,
    cache: str | Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Metrics of a run on "test", "validation" or "train" (`tst`, `val`, `trn`).

    Args:
        run: the folder that `xmc train` wrote, or the model that `xmc.train` returned.
        data: another data folder with the same labels (default: the one trained on).
        propensity: preset of the constants a and b; `a` and `b` together replace it.
        baseline: score the most frequent labels instead of the model's predictions.
        progress: called with the number of rows of each batch.

    Label frequencies (propensities, head/torso/tail) come from the whole training split.
    """
    if isinstance(run, XMCModel):
        model = run
        if model.folder is None:
            raise RunError("expected a model loaded from its run folder, got one in memory")
        record = read_run(model.folder.parent)
    else:
        record = read_run(Path(run))
        model = load_model(Path(run) / "model")
    folder = Path(data) if data is not None else Path(record["data"])
    _check_labels(model, folder)
    dataset = load_dataset(folder, split_name(split), model.features, cache=cache)
    labels = load_dataset(Path(record["data"]), "trn", model.features, cache=cache).labels
    frequencies = labels.frequencies()
    accumulator = MetricAccumulator(
        ks,
        inv_propensity=Propensity.from_labels(labels, propensity, a=a, b=b),
        frequencies=frequencies,
        threshold=threshold,
        drop_empty=drop_empty,
        bootstrap=bootstrap,
    )

    def most_frequent(batch: Batch) -> TopK:
        return frequency_topk(frequencies, max(ks), len(batch))

    topk_of = most_frequent if baseline else model.topk_of(max(ks))
    batches = dataset.batches(model.config.train.eval_batch_size)
    return score_batches(topk_of, batches, accumulator, progress=progress)


def _check_labels(model: XMCModel, folder: Path) -> None:
    labels = read_labels(folder)
    if labels == model.labels:
        return
    if len(labels) != len(model.labels):
        raise RunError(
            f"{folder}: expected the {len(model.labels)} labels of the model, got {len(labels)}"
        )
    first = next(
        i for i, pair in enumerate(zip(labels, model.labels, strict=True)) if len(set(pair)) > 1
    )
    raise RunError(
        f"{folder}: label {first} is {labels[first]!r}, in the model it is {model.labels[first]!r}"
    )
