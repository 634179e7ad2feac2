"""Scores by document: what a run predicts for each, and how two heads differ on the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmc.config import Config
from xmc.data.batches import Dataset, load_dataset, train_validation_split
from xmc.data.features import fit_features
from xmc.data.formats import has_split
from xmc.evaluation.bootstrap import PoissonBootstrap
from xmc.evaluation.metrics import LEVEL
from xmc.evaluation.propensity import Propensity
from xmc.evaluation.ranking import (
    Array,
    denominator,
    largest_per_row,
    membership,
    propensity_columns,
    ranking_columns,
)
from xmc.files import write_file
from xmc.model import load_model
from xmc.types import SparseLabels

METRICS = ("P@1", "P@3", "P@5", "PSP@5")
_KS = (1, 3, 5)


@dataclass(frozen=True)
class EvaluationSet:
    """The documents that a comparison scores."""

    dataset: Dataset
    rows: Tensor  # [N] int64, lines of the split's file: the same document has the same number


@dataclass(frozen=True)
class Documents:
    """What each document adds to the metrics of one run."""

    rows: Tensor  # [N] int64
    columns: dict[str, Array]  # numerators and denominators, [N] each

    def values(self) -> dict[str, float]:
        """The metrics as fractions."""
        return {
            name: float(self.columns[name].sum() / self.columns[denominator(name)].sum())
            for name in METRICS
        }


@dataclass(frozen=True)
class Difference:
    """One metric of a head minus that of another, on the same documents and seeds."""

    mean: float
    low: float
    high: float


def evaluation_set(config: Config, data: Path, split: str, *, cache: Path | None) -> EvaluationSet:
    """The "val" or "tst" documents of a run; those it held out where the data has no val split.

    Raises ConfigError, DataError where there are none.
    """
    features = fit_features(config.features, data, model=config.encoder.model, cache=cache)
    if split == "tst" or has_split(data, "val"):
        dataset = load_dataset(data, split, features, cache=cache)
        return EvaluationSet(dataset, torch.arange(len(dataset)))
    train_set = load_dataset(data, "trn", features, cache=cache)
    share, seed = config.train.validation, config.train.seed
    _, rows = train_validation_split(len(train_set), share, seed)
    return EvaluationSet(train_set.subset(rows), rows)


def training_propensity(config: Config, data: Path, preset: str, cache: Path | None) -> Propensity:
    """From the whole training split, as `xmc evaluate` has it."""
    features = fit_features(config.features, data, model=config.encoder.model, cache=cache)
    return Propensity.from_labels(load_dataset(data, "trn", features, cache=cache).labels, preset)


def score_run(run: Path, split: str, documents: EvaluationSet, propensity: Propensity) -> Documents:
    """Scores of a finished run's best epoch; predictions are kept in the run's folder."""
    path = run / f"predictions-{split}.safetensors"
    if not path.exists():
        predicted = _predict(run, documents.dataset)
        write_file(path, lambda temporary: save_file({"labels": predicted}, temporary))
    labels = load_file(path)["labels"]
    return Documents(documents.rows, document_columns(labels, documents.dataset.labels, propensity))


def document_columns(
    predicted: Tensor,  # [N, K] int32, best first, -1 for padding
    labels: SparseLabels,  # N rows
    propensity: Propensity,
) -> dict[str, Array]:
    """What every document adds to numerator and denominator of each of `METRICS`."""
    best = predicted.long().numpy()
    indptr, indices = labels.indptr.numpy(), labels.indices.numpy().astype(np.int64)
    counts, inverse = np.diff(indptr), propensity.inverse.numpy()
    hits = membership(best, indptr, indices, labels.num_labels)
    columns = ranking_columns(hits, counts, _KS)
    ideal = largest_per_row(inverse[indices], indptr, best.shape[1])
    columns |= propensity_columns(hits * inverse[best], ideal, counts, _KS)
    names = dict.fromkeys((*METRICS, *(denominator(name) for name in METRICS)))
    return {name: columns[name] for name in names}


def paired_differences(
    ours: Sequence[Documents],  # one for each seed
    theirs: Sequence[Documents],
    *,
    replicates: int,
    seed: int = 0,
) -> dict[str, Difference]:
    """`ours - theirs` in each of `METRICS`, with 95% intervals from a paired bootstrap.

    Documents are resampled, each with all that its seeds say: the interval tells how far the
    difference of these trained models hangs on the documents, not on the seeds.

    Raises ValueError where both did not score the same documents.
    """
    for mine, other in zip(ours, theirs, strict=True):
        if not torch.equal(mine.rows, other.rows):
            raise ValueError("expected the same documents to be scored by both heads")
    rows = torch.cat([documents.rows for documents in ours]).numpy()
    _, document = np.unique(rows, return_inverse=True)
    names = list(ours[0].columns)
    divisors = {denominator(name) for name in METRICS}
    block = np.zeros((int(document.max()) + 1, len(names)))
    for column, name in enumerate(names):
        values = np.concatenate([documents.columns[name] for documents in ours])
        if name not in divisors:  # these are the same for both
            values = values - np.concatenate([documents.columns[name] for documents in theirs])
        np.add.at(block[:, column], document, values)
    bootstrap = PoissonBootstrap(replicates, seed)
    bootstrap.add(block)
    sums = block.sum(0)
    found = {}
    for name in METRICS:
        pair = names.index(name), names.index(denominator(name))
        found[name] = Difference(
            float(sums[pair[0]] / sums[pair[1]]), *bootstrap.interval(*pair, LEVEL)
        )
    return found


def _predict(run: Path, dataset: Dataset) -> Tensor:  # [N, 5] int32
    model = load_model(run / "model")
    if model.config.train.device != "cpu" and torch.cuda.is_available():
        model.to("cuda")
    topk_of = model.topk_of(max(_KS))
    batches = dataset.batches(model.config.train.eval_batch_size)
    return torch.cat([topk_of(batch).labels.int() for batch in batches])
