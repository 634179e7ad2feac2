"""The auxiliary head: which clusters hold a positive label, for the encoder's sake only.

Source: arXiv 2411.03171, section 3: through a sparse classifier little gradient reaches the encoder
early on; a dense head over label clusters adds some, and is dropped later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xmc.config import AuxiliaryConfig, OptimizerConfig
from xmc.heads.classifier import ClassifierHead
from xmc.heads.head import HeadResult
from xmc.nn.clusters import Clusters
from xmc.types import SparseLabels


class AuxiliaryHead:
    """A dense linear classifier over clusters; a cluster is positive with any of its labels.

    Binary cross-entropy, averaged over the rows and, unless `reduction` is "sum", over the
    clusters. Trained like any `ClassifierHead`, by AdamW: its weights enter no autograd. It never
    belongs to a model.
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
    ) -> AuxiliaryHead:
        """A fresh head on the CPU; `shares` make it start at the base rates.

        Draws from a generator of its own, so that the rest of a run draws what it would without.
        """
        layer = torch.nn.utils.skip_init(nn.Linear, in_features, len(clusters))
        bound = 1 / math.sqrt(in_features)  # as nn.Linear does
        with torch.no_grad():
            layer.weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            layer.bias.zero_()
            if shares is not None:
                layer.bias.copy_(torch.logit(shares.double(), eps=1e-7))
        optimizer = OptimizerConfig(kind="adamw", lr=config.lr)
        head = ClassifierHead(layer, loss="bce", optimizer=optimizer)
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
