"""The auxiliary objective of a run: its head, its share of the loss, what is logged of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xmc.config import Config
from xmc.data.batches import Dataset
from xmc.distributed.collectives import World, sum_
from xmc.heads.auxiliary import AuxiliaryHead
from xmc.heads.head import HeadResult
from xmc.nn.clusters import Clusters
from xmc.types import SparseLabels

_COUNT_ROWS = 1 << 16  # rows counted at a time


def auxiliary_share(step: int, *, scale: float, cutoff: int) -> float:
    """The s of `(1 - s) * classifier + s * auxiliary` in optimizer step `step` (0-based).

    Falls from `scale` to 0 at step `cutoff` by half a cosine, and stays there.
    """
    if step >= cutoff:
        return 0.0
    return 0.5 * scale * (1.0 + math.cos(math.pi * step / cutoff))


def make_auxiliary(
    config: Config,
    clusters: Clusters | None,
    train_set: Dataset,
    in_features: int,
    device: torch.device,
    world: World = World.alone(),
) -> AuxiliaryHead | None:
    """A fresh auxiliary head, None without the objective; starts as the classifier's bias does.

    The ranks of a world divide its clusters.
    """
    if clusters is None or config.auxiliary.kind == "none":
        return None
    clusters = clusters.coarser(config.auxiliary.max_labels)
    shares = None
    if config.head.bias_init == "log_prior":
        shares = cluster_shares(clusters, train_set.labels)
    head = AuxiliaryHead.from_config(
        in_features, clusters, config.auxiliary, seed=config.train.seed, shares=shares, world=world
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

    def values(self, world: World = World.alone()) -> dict[str, float]:
        """Losses without their weights; norms of d_reps with them, as the encoder sees them.

        Of the rows of all ranks: sends two numbers.
        """
        squares = sum_(torch.tensor(self._squares, dtype=torch.float64), world).tolist()
        return {
            "auxiliary_share": self._share,
            "main_loss": self._losses[0] / (1 - self._share),
            "auxiliary_loss": self._losses[1] / self._share,
            "main_reps_grad_norm": math.sqrt(squares[0]),
            "auxiliary_reps_grad_norm": math.sqrt(squares[1]),
        }
