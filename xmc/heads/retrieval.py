"""The labels of a dual encoder as something that scores: embeddings of their texts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.config import ContrastiveConfig
from xmc.nn.label_search import ApproximateSearch, exact_topk
from xmc.nn.tower import Tower
from xmc.types import SparseLabels, TopK
from xmc_kernels.checks import check_label_range

_NUMBERS = 1 << 22  # of embeddings gathered at a time


class RetrievalHead(nn.Module):
    """Scores of labels: cosines of their embeddings with a representation.

    Embeddings are made from texts (`embed_`), not trained; labels without a text are never
    returned. What trains is the temperature and, where documents and labels have an encoder each,
    `label_tower`.
    """

    embeddings: Tensor  # [L, D] float32, of length one
    known: Tensor  # [L] bool: has a text
    loss = "contrastive"

    def __init__(
        self,
        num_labels: int,
        dim: int,
        config: ContrastiveConfig,
        *,
        label_tower: Tower | None = None,  # None: labels share the documents' encoder
    ) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(num_labels, dim))
        self.register_buffer("known", torch.zeros(num_labels, dtype=torch.bool))
        # Of the inverse temperature, so that steps are relative.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.label_tower = label_tower
        self.search = config.search
        self._index: ApproximateSearch | None = None  # of the embeddings, made at first use

    @property
    def num_labels(self) -> int:
        return self.embeddings.shape[0]

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, []."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set_embeddings_(self, embeddings: Tensor, known: Tensor) -> None:
        """Take [L, D] vectors of length one, and which labels [L] they are of."""
        self.embeddings.copy_(embeddings)
        self.known.copy_(known)
        self._index = None

    @torch.no_grad()
    def topk(
        self,
        reps: Tensor,  # [B, D], of any length
        k: int,
        exclude: SparseLabels | None = None,  # labels never returned for a row
    ) -> TopK:
        """The k labels of largest cosine, streamed over label tiles or by faiss."""
        x = F.normalize(reps.float(), dim=1)
        if self.search == "exact":
            return exact_topk(x, self.embeddings, self.known, k, exclude)
        if self._index is None:
            self._index = ApproximateSearch(self.embeddings, self.known)
        return self._index.topk(x, k, exclude)

    @torch.no_grad()
    def candidate_scores(
        self,
        reps: Tensor,  # [B, D]
        labels: Tensor,  # [B, C] int64, -1 for padding
    ) -> Tensor:  # [B, C] float32
        """The cosines of chosen labels; -inf for padding and for labels without a text."""
        check_label_range(labels[labels >= 0], self.num_labels)
        x, chosen = F.normalize(reps.float(), dim=1), labels.clamp(min=0)
        size = max(_NUMBERS // max(labels.shape[1] * x.shape[1], 1), 1)
        parts = [
            torch.einsum("bcd,bd->bc", self.embeddings[own], part)
            for own, part in zip(chosen.split(size), x.split(size), strict=True)
        ]
        scores = torch.cat(parts) if parts else x.new_empty(labels.shape)
        return scores.masked_fill((labels < 0) | ~self.known[chosen], -torch.inf)

    def probabilities(self, scores: Tensor) -> Tensor:  # [B, C] -> [B, C]
        """The softmax of the candidates' cosines by temperature, as in training; 0 for -inf."""
        return torch.softmax(scores * self.scale, dim=1).nan_to_num(0.0)
