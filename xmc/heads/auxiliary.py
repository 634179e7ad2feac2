"""The auxiliary head: which clusters hold a positive label, for the encoder's sake only.

Source: arXiv 2411.03171, section 3: through a sparse classifier little gradient reaches the encoder
early on; a dense head over label clusters adds some, and is dropped later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmc.config import AuxiliaryConfig, OptimizerConfig
from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.heads.classifier import ClassifierHead
from xmc.heads.fresh import dense_layer, own_labels, starting_bias
from xmc.heads.head import HeadResult
from xmc.nn.clusters import Clusters
from xmc.types import SparseLabels


class AuxiliaryHead:
    """A dense linear classifier over clusters; a cluster is positive with any of its labels.

    Binary cross-entropy, averaged over the rows and, unless `reduction` is "sum", over the
    clusters. Trained like any `ClassifierHead`, by AdamW: its weights enter no autograd. It never
    belongs to a model. On several ranks the clusters are divided as labels are elsewhere.
    """

    def __init__(self, classifier: ClassifierHead, clusters: Clusters, *, reduction: str = "mean"):
        if classifier.num_labels != len(clusters):
            raise ValueError(
                f"expected a classifier of {len(clusters)} clusters, got {classifier.num_labels}"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"expected a reduction of mean, sum, got {reduction!r}")
        self.classifier = classifier
        self.clusters = clusters
        self.reduction = reduction

    @classmethod
    def from_config(
        cls,
        in_features: int,
        clusters: Clusters,
        config: AuxiliaryConfig,
        *,
        seed: int,
        shares: Tensor | None = None,  # [num_clusters], share of rows with a label of the cluster
        world: World | None = None,  # None: alone
    ) -> AuxiliaryHead:
        """A fresh head on the CPU; `shares` make it start at the base rates.

        Draws from a generator of its own, so that the rest of a run draws what it would without.
        Raises ValueError for fewer clusters than ranks.
        """
        world = world or World.alone()
        shard = own_labels(len(clusters), world)
        layer = dense_layer(in_features, shard, generator=torch.Generator().manual_seed(seed))
        layer.bias = starting_bias(layer.bias, shares, shard)
        optimizer = OptimizerConfig(kind="adamw", lr=config.lr)
        head = ClassifierHead(layer, loss="bce", optimizer=optimizer, world=world, shard=shard)
        return cls(head, clusters, reduction=config.reduction)

    def to(self, device: torch.device | str) -> AuxiliaryHead:
        """The same head elsewhere; to be called before the first step, which makes the moments."""
        classifier = self.classifier.to(device)
        return AuxiliaryHead(classifier, self.clusters.to(device), reduction=self.reduction)

    @property
    def lr(self) -> float:
        return self.classifier.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.classifier.lr = value

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.classifier.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.classifier.steps = value

    def loss_and_grad(
        self,
        reps: Tensor,  # [B, D]
        labels: SparseLabels,  # B rows over labels, not over clusters
        *,
        num_rows: int | None = None,
        update: bool = True,
        weight: float = 1.0,
    ) -> HeadResult:
        """See `Head.loss_and_grad`; holds one [B, num_clusters] block of scores."""
        if self.reduction == "mean":
            weight /= len(self.clusters)
        targets = self.clusters.targets(labels)
        return self.classifier.loss_and_grad(
            reps, targets, num_rows=num_rows, update=update, weight=weight
        )

    def training_state(self) -> dict[str, Tensor]:
        """Weights and moments, by name; the same storage, so that they can be loaded into."""
        weights = {f"layer.{name}": t for name, t in self.classifier.layer.state_dict().items()}
        return weights | self.classifier.training_state()

    def row_shards(self) -> dict[str, RowShard]:
        """Which rows of those tensors this rank holds, by name; empty for all."""
        return self.classifier.row_shards()
