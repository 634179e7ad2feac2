"""Evaluation of trained runs on a split of their data, or of other data with the same labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xmc.data.batches import Dataset, load_dataset
from xmc.data.formats import read_labels, split_name
from xmc.distributed.collectives import World
from xmc.distributed.launch import join_ranks, lost_ranks, rank0_first
from xmc.evaluation.frequency import frequency_topk
from xmc.evaluation.metrics import MetricAccumulator, Scores
from xmc.evaluation.metrics import evaluate as score_batches
from xmc.evaluation.propensity import Propensity
from xmc.heads.retrieval import RetrievalHead
from xmc.model import XMCModel, load_model
from xmc.runs import RunError, check_same_labels, model_folder, read_run
from xmc.serving.ensemble import CANDIDATES, Ensemble
from xmc.types import Batch, SparseLabels, TopK

KS = (1, 3, 5, 10)
RETRIEVAL_KS = (1, 3, 5, 10, 100)  # where a dual encoder takes part

Run = str | Path | XMCModel


@lost_ranks()
def evaluate(
    run: Run | Sequence[Run],
    split: str = "test",
    *,
    data: str | Path | None = None,
    weights: Sequence[float] | None = None,
    candidates: int = CANDIDATES,
    ks: tuple[int, ...] | None = None,
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
        run: the folder that `xmc train` wrote, or the model that `xmc.train` returned; several of
            the same labels are evaluated together (`xmc.serving.ensemble.Ensemble`).
        data: another data folder with the same labels (default: the one the first was trained on;
            a model folder knows none, such as an exported one).
        weights: of several runs, in their order (default: all count alike).
        candidates: labels that each of several runs proposes for a row.
        ks: ranks (default: 1, 3, 5, 10, and 100 where a dual encoder takes part).
        propensity: preset of the constants a and b; `a` and `b` together replace it.
        threshold: by the raw score, of several runs by the mean probability.
        baseline: score the most frequent labels instead of the model's predictions.
        progress: called with the number of rows of each batch.

    Label frequencies (propensities, head/torso/tail) come from the whole training split of the
    first run, or of `data` where that is a model folder. Processes that torchrun started call this
    alike, share the labels and the rows among them, and have the same scores.
    """
    world = join_ranks()
    runs = [run] if isinstance(run, str | Path | XMCModel) else list(run)
    opened = [_open(entry, world) for entry in runs]
    models = [model for model, _ in opened]
    if weights is not None and len(models) == 1:
        raise ValueError(f"expected several runs with weights {list(weights)}, got one")
    ensemble = Ensemble(models, weights, candidates=candidates)
    model, record = opened[0]
    if ks is None:
        dual = any(isinstance(member.head, RetrievalHead) for member in models)
        ks = RETRIEVAL_KS if dual else KS
    deepest = max(ks)
    if data is None and record is None:
        raise RunError(f"{run}: a model folder does not say what it was trained on: give data")
    trained_on = Path(data if record is None else record["data"])  # type: ignore[arg-type]
    folder = trained_on if data is None else Path(data)
    check_same_labels(read_labels(folder), model.labels, folder)

    def load() -> tuple[list[Dataset], SparseLabels]:
        name = split_name(split)
        rows = [load_dataset(folder, name, member.features, cache=cache) for member in models]
        return rows, load_dataset(trained_on, "trn", model.features, cache=cache).labels

    datasets, labels = rank0_first(load, world)
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
        return frequency_topk(frequencies, deepest, len(batch))

    topk_of: Callable[[Batch], TopK]
    if baseline:
        topk_of = most_frequent
    elif len(models) == 1:
        topk_of = model.topk_of(deepest)
    else:
        topk_of = _joint_topk(ensemble, datasets, deepest)
    batches = datasets[0].batches(min(m.config.train.eval_batch_size for m in models))
    return score_batches(topk_of, batches, accumulator, progress=progress)


def _open(run: Run, world: World) -> tuple[XMCModel, dict[str, Any] | None]:
    """A model, of its classifier this rank's part, and the record of its run, if it has one."""
    if not isinstance(run, XMCModel):
        folder = Path(run)
        record = None if (folder / "model.json").exists() else read_run(folder)
        return load_model(model_folder(folder), world=world), record
    if run.folder is None:
        raise RunError("expected a model loaded from its run folder, got one in memory")
    return run, read_run(run.folder.parent)


def _joint_topk(ensemble: Ensemble, datasets: list[Dataset], k: int) -> Callable[[Batch], TopK]:
    """A function of a batch of the first data set; the same rows are read from the others."""

    def topk(batch: Batch) -> TopK:
        inputs = [dataset.features.rows(batch.rows) for dataset in datasets]
        return ensemble.topk(inputs, k, batch.exclude)

    return topk
