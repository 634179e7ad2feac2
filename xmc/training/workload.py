"""What a training has to work on: numbers of rows, labels and features, given or counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xmc.config import Config, ConfigError
from xmc.data.batches import load_dataset
from xmc.data.features import fit_features
from xmc.data.formats import has_split, read_labels

LABEL_CHARS = 30  # of a label's name, where no data say otherwise
ROW_ENTRIES = 100  # features of a row, where no data say otherwise


@dataclass(frozen=True)
class Workload:
    """The sizes of a data set that memory and time depend on."""

    num_labels: int
    """L."""
    num_features: int
    """V, ids that the encoder's table or the tokenizer has."""
    num_rows: int
    """N, rows trained on, without those held out."""
    num_positives: int
    """Labels of all these rows together."""
    row_entries: float = ROW_ENTRIES
    """Features (bag) or tokens (transformer) of a row, on average."""
    validation_rows: int = 0
    splits_rows: bool = False
    """Whether rows are held out from training, which copies the labels of both parts."""
    label_chars: float = LABEL_CHARS
    """Characters of a label's name; 0: labels have no names (a data set made in memory)."""

    def __post_init__(self) -> None:
        for name in ("num_labels", "num_features", "num_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("num_positives", "row_entries", "validation_rows", "label_chars"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")


def given_workload(
    config: Config,
    *,
    num_labels: int,
    num_features: int | None,
    num_rows: int,
    positives_per_row: float,
) -> Workload:
    """From numbers; the rows are cut by train.validation as a data set without `val` is.

    Raises ConfigError where the number of features is needed and neither given nor in the recipe.
    """
    features = config.features
    if num_features is None and features.kind == "bag":
        if features.vocabulary != "hashing":
            raise ConfigError(
                "--features: a tf-idf vocabulary has as many features as the data give it; "
                f"say how many (at most features.max_features = {features.max_features})"
            )
        num_features = 2**features.hash_bits
    share = config.train.validation
    held_out = round(num_rows * share)
    tokens = features.kind == "tokens"
    return Workload(
        num_labels=num_labels,
        num_features=num_features or 1,
        num_rows=num_rows - held_out,
        num_positives=round((num_rows - held_out) * positives_per_row),
        row_entries=features.max_length if tokens else ROW_ENTRIES,
        validation_rows=held_out,
        splits_rows=share > 0,
    )


def data_workload(config: Config, data: Path, cache: Path | None) -> Workload:
    """From a data folder, by encoding it as a training would: into the cache, for once and all.

    Raises DataError in one line for anything wrong with the files.
    """
    features = fit_features(config.features, data, model=config.encoder.model, cache=cache)
    train_set = load_dataset(data, "trn", features, cache=cache)
    names = read_labels(data)
    num_rows, share = len(train_set), config.train.validation
    held_out = 0
    if has_split(data, "val"):
        share = 0.0
        held_out = len(load_dataset(data, "val", features, cache=cache))
    elif share:
        held_out = min(max(round(num_rows * share), 1), num_rows - 1)
        num_rows -= held_out
    return Workload(
        num_labels=len(names),
        num_features=features.num_features,
        num_rows=num_rows,
        num_positives=round(int(train_set.labels.indptr[-1]) * num_rows / len(train_set)),
        row_entries=int(train_set.features.indptr[-1]) / len(train_set),
        validation_rows=held_out,
        splits_rows=share > 0,
        label_chars=sum(map(len, names)) / len(names),
    )
