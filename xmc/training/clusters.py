"""The label clusters of a run: found once, for the order of labels and the auxiliary objective."""

from __future__ import annotations

from pathlib import Path

import scipy.sparse
from torch import Tensor

from xmc.config import Config, ConfigError
from xmc.data.batches import Dataset
from xmc.data.label_features import label_features
from xmc.data.progress import track
from xmc.model import read_label_embeddings
from xmc.nn.clusters import Clusters, cluster_labels

CLUSTERS_FILE = "clusters.safetensors"  # in the run folder


def find_clusters(config: Config, train_set: Dataset, labels: list[str]) -> Clusters | None:
    """Clusters by the features of the training rows, or by a dual encoder's label embeddings.

    None where the recipe uses none. As fine as the finer of both uses needs them;
    `Clusters.coarser` gives the other. Raises ConfigError where the labels are too few for two
    clusters of an auxiliary objective, and what `read_label_embeddings` raises.
    """
    options = config.auxiliary
    if not _sizes(config):
        return None
    if options.kind != "none" and train_set.num_labels <= options.max_labels:
        raise ConfigError(
            f"auxiliary.max_labels: expected fewer than the {train_set.num_labels} labels, "
            f"so that there are two clusters at least, got {options.max_labels}"
        )
    features: scipy.sparse.csr_matrix | Tensor
    if config.train.label_embeddings:
        features = read_label_embeddings(config.train.label_embeddings, labels)
    else:
        features = label_features(train_set)
    return cluster_labels(
        features,
        max_labels=min(_sizes(config)),
        seed=config.train.seed,
        track=lambda levels: track(levels, "Clustering labels", total=len(levels)),
    )


def load_clusters(config: Config, run: Path) -> Clusters | None:
    """The clusters of a run that is gone on with; ValueError where its file is damaged."""
    return Clusters.load(run / CLUSTERS_FILE) if _sizes(config) else None


def _sizes(config: Config) -> list[int]:
    """The most labels of a cluster, for each use that the recipe makes of clusters."""
    sizes = [] if config.auxiliary.kind == "none" else [config.auxiliary.max_labels]
    if config.head.order == "cluster":
        # Leaves of at most a group; without groups neighbours share nothing, and any size will do.
        group = config.head.group_size
        sizes.append(group if group > 1 else config.auxiliary.max_labels)
    return sizes
