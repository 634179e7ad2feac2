"""Made-up data of any size with labels that can be learned: for tests of memory and speed.

Label frequencies follow a power law. Each label has a few features of its own (a hash of the label
says which), and a row has the features of its labels with some noise; so a linear model can learn
it, and neither the generator nor the data holds anything of size labels x features.
"""

from __future__ import annotations

import numpy as np
import torch

from xmc.data.batches import BagStore, Dataset
from xmc.types import SparseLabels

_SIGNATURE = 6  # features of a label
_NOISE = 6  # random features of a row
_BLOCK = 1 << 14  # rows made at a time


def make_synthetic(
    num_rows: int,
    num_labels: int,
    num_features: int,
    *,
    labels_per_row: int = 3,
    seed: int = 0,
    exponent: float = 1.0,
) -> Dataset:
    """A data set in memory: about 4 bytes for each of its entries and 8 for each of its features.

    Label l is drawn with a probability proportional to `(l + 1) ** -exponent` (0: all the same).
    A row has up to `labels_per_row` distinct labels, at least one. The same arguments give the same
    data; another seed gives other rows of the same labels, so that a test set can be drawn.
    """
    for name, value in (
        ("num_rows", num_rows),
        ("num_labels", num_labels),
        ("num_features", num_features),
        ("labels_per_row", labels_per_row),
    ):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if exponent < 0:
        raise ValueError(f"expected an exponent of at least 0, got {exponent}")
    generator = np.random.default_rng(seed)
    blocks = []
    for start in range(0, num_rows, _BLOCK):
        size = min(_BLOCK, num_rows - start)
        drawn = _power_law(generator.random((size, labels_per_row)), num_labels, exponent)
        noise = generator.integers(0, num_features, (size, _NOISE))
        owned = _signatures(drawn, num_features)
        blocks.append((*_distinct(drawn), *_distinct(np.concatenate([owned, noise], 1))))
    label_counts, labels, counts, ids = (
        np.concatenate(parts) for parts in zip(*blocks, strict=True)
    )
    values = np.repeat((1 / np.sqrt(counts)).astype(np.float32), counts)  # norm 1, as in tf-idf
    store = BagStore(
        _offsets(counts), torch.from_numpy(ids), torch.from_numpy(values), num_features
    )
    positives = SparseLabels(_offsets(label_counts), torch.from_numpy(labels), num_labels)
    return Dataset(store, positives, key=f"synthetic-{seed}")


def _power_law(uniform: np.ndarray, num_labels: int, exponent: float) -> np.ndarray:
    """Labels by the inverse of the distribution function, smooth instead of summed."""
    if exponent == 1:
        drawn = np.exp(uniform * np.log(num_labels + 1)) - 1
    else:
        power = 1 - exponent
        drawn = (1 + uniform * ((num_labels + 1.0) ** power - 1)) ** (1 / power) - 1
    return np.minimum(drawn.astype(np.int64), num_labels - 1)


def _signatures(labels: np.ndarray, num_features: int) -> np.ndarray:  # [N, K] -> [N, K * S]
    """The features of each label: a multiplicative hash of the label and a counter."""
    mixed: np.ndarray = labels[:, :, None].astype(np.uint64) * np.uint64(_SIGNATURE)
    mixed = (mixed + np.arange(_SIGNATURE, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = mixed ^ (mixed >> np.uint64(32))
    return (mixed % np.uint64(num_features)).astype(np.int64).reshape(len(labels), -1)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of each row: how many [N] int64, and which [n] int32, sorted."""
    values = np.sort(values, axis=1)
    first = np.ones(values.shape, bool)
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    return first.sum(1), values[first].astype(np.int32)


def _offsets(counts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
