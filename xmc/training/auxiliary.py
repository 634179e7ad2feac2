"""The auxiliary objective of a run: its clusters, its share of the loss, what is logged of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from xmc.config import Config, ConfigError
from xmc.data.batches import Dataset
from xmc.data.label_features import label_features
from xmc.data.progress import track
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.head import HeadResult
from xmc.nn.clusters import Clusters, cluster_labels
from xmc.types import SparseLabels

CLUSTERS_FILE = "clusters.safetensors"  # in the run folder
_COUNT_ROWS = 1 << 16  # rows counted at a time


def auxiliary_share(step: int, *, scale: float, cutoff: int) -> float:
    """The s of `(1 - s) * classifier + s * auxiliary` in optimizer step `step` (0-based).

    Falls from `scale` to 0 at step `cutoff` by half a cosine, and stays there.
    """
    if step >= cutoff:
        return 0.0
    return 0.5 * scale * (1.0 + math.cos(math.pi * step / cutoff))


def find_clusters(config: Config, train_set: Dataset) -> Clusters | None:
    """Clusters by the features of the training rows; None without an auxiliary objective.

    Raises ConfigError where the labels are too few for two clusters.
    """
    options = config.auxiliary
    if options.kind == "none":
        return None
    if train_set.num_labels <= options.max_labels:
        raise ConfigError(
            f"auxiliary.max_labels: expected fewer than the {train_set.num_labels} labels, "
            f"so that there are two clusters at least, got {options.max_labels}"
        )
    return cluster_labels(
        label_features(train_set),
        max_labels=options.max_labels,
        seed=config.train.seed,
        track=lambda levels: track(levels, "Clustering labels", total=len(levels)),
    )


def load_clusters(config: Config, run: Path) -> Clusters | None:
    """The clusters of a run that is gone on with; ValueError where its file is damaged."""
    return None if config.auxiliary.kind == "none" else Clusters.load(run / CLUSTERS_FILE)


def make_auxiliary(
    config: Config,
    clusters: Clusters | None,
    train_set: Dataset,
    in_features: int,
    device: torch.device,
) -> AuxiliaryHead | None:
    """A fresh auxiliary head, None without clusters; starts as the classifier's bias does."""
    if clusters is None:
        return None
    shares = None
    if config.head.bias_init == "log_prior":
        shares = cluster_shares(clusters, train_set.labels)
    head = AuxiliaryHead.from_config(
        in_features, clusters, config.auxiliary, seed=config.train.seed, shares=shares
    )
    return head.to(device)


def cluster_shares(clusters: Clusters, labels: SparseLabels) -> Tensor:  # [num_clusters]
    """Smoothed share of rows with a label of each cluster: never 0 nor 1."""
    counts = torch.zeros(len(clusters), dtype=torch.int64)
    for start in range(0, len(labels), _COUNT_ROWS):
        part = labels.slice(start, min(start + _COUNT_ROWS, len(labels)))
        counts += clusters.targets(part).frequencies()
    return (counts + 0.5) / (len(labels) + 1.0)


class PartMeter:
    """Loss and gradient of classifier and auxiliary head apart, over the passes of a step."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._losses = [0.0, 0.0]
        self._squares = [0.0, 0.0]

    def add(self, results: Sequence[HeadResult]) -> None:
        """Results of both heads, weighted as they are added up."""
        for part, result in enumerate(results):
            self._losses[part] += float(result.loss)
            self._squares[part] += float(result.d_reps.float().square().sum())

    def values(self) -> dict[str, float]:
        """Losses without their weights; norms of d_reps with them, as the encoder sees them."""
        return {
            "auxiliary_share": self._share,
            "main_loss": self._losses[0] / (1 - self._share),
            "auxiliary_loss": self._losses[1] / self._share,
            "main_reps_grad_norm": math.sqrt(self._squares[0]),
            "auxiliary_reps_grad_norm": math.sqrt(self._squares[1]),
        }
