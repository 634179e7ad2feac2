"""The labels of a dual encoder as something that scores: embeddings of their texts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.config import ContrastiveConfig
from xmc.distributed.collectives import World, merge_topk, sum_
from xmc.distributed.sharding import RowShard
from xmc.heads.fresh import own_labels
from xmc.nn.label_search import ApproximateSearch, exact_topk
from xmc.nn.tower import Tower
from xmc.types import SparseLabels, TopK
from xmc_kernels.checks import check_label_range

_NUMBERS = 1 << 22  # of embeddings gathered at a time


class RetrievalHead(nn.Module):
    """Scores of labels: cosines of their embeddings with a representation.

    Embeddings are made from texts (`set_embeddings_`), not trained; labels without a text are never
    returned. What trains is the temperature and, where documents and labels have an encoder each,
    `label_tower`.

    Where `world` has several ranks, each holds the embeddings of its `shard` of the labels, and all
    call `topk` and `candidate_scores` together with the same arguments, for the same answers. An
    approximate search finds the nearest of each shard, so not quite what one process finds.
    """

    embeddings: Tensor  # [L, D] float32, of length one; L labels of the shard
    known: Tensor  # [L] bool: has a text
    loss = "contrastive"

    def __init__(
        self,
        num_labels: int,
        dim: int,
        config: ContrastiveConfig,
        *,
        label_tower: Tower | None = None,  # None: labels share the documents' encoder
        world: World | None = None,  # None: alone
    ) -> None:
        super().__init__()
        self.world = world or World.alone()
        self.shard = own_labels(num_labels, self.world)
        self.register_buffer("embeddings", torch.zeros(len(self.shard), dim))
        self.register_buffer("known", torch.zeros(len(self.shard), dtype=torch.bool))
        # Of the inverse temperature, so that steps are relative.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.label_tower = label_tower
        self.search = config.search
        self._index: ApproximateSearch | None = None  # of the embeddings, made at first use

    @property
    def num_labels(self) -> int:
        """On all ranks."""
        return self.shard.num_labels

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, []."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set_embeddings_(self, embeddings: Tensor, known: Tensor) -> None:
        """Take [L, D] vectors of length one, and which labels [L] they are of, of the shard."""
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
        """The k labels of largest cosine, streamed over label tiles or by faiss.

        Sends the k best of the shard to each other rank.
        """
        x = F.normalize(reps.float(), dim=1)
        own = None if exclude is None else exclude.within(self.shard)
        if self.search == "exact":
            best = exact_topk(x, self.embeddings, self.known, k, own)
        else:
            if self._index is None:
                self._index = ApproximateSearch(self.embeddings, self.known)
            best = self._index.topk(x, k, own)
        first = self.shard.start
        labels = torch.where(best.labels < 0, best.labels, best.labels + first)
        return merge_topk(TopK(best.scores, labels), self.world)

    @torch.no_grad()
    def candidate_scores(
        self,
        reps: Tensor,  # [B, D]
        labels: Tensor,  # [B, C] int64, -1 for padding
    ) -> Tensor:  # [B, C] float32
        """The cosines of chosen labels; -inf for padding and for labels without a text.

        Sends [B, C] numbers: each rank has those of its shard.
        """
        check_label_range(labels[labels >= 0], self.num_labels)
        x = F.normalize(reps.float(), dim=1)
        mine = (labels >= self.shard.start) & (labels < self.shard.stop)
        chosen = (labels - self.shard.start).masked_fill(~mine, 0)
        size = max(_NUMBERS // max(labels.shape[1] * x.shape[1], 1), 1)
        parts = [
            torch.einsum("bcd,bd->bc", self.embeddings[own], part)
            for own, part in zip(chosen.split(size), x.split(size), strict=True)
        ]
        scores = torch.cat(parts) if parts else x.new_empty(labels.shape)
        scores.masked_fill_(~self.known[chosen], -torch.inf).masked_fill_(~mine, 0)
        return sum_(scores, self.world).masked_fill_(labels < 0, -torch.inf)

    def probabilities(self, scores: Tensor) -> Tensor:  # [B, C] -> [B, C]
        """The softmax of the candidates' cosines by temperature, as in training; 0 for -inf."""
        return torch.softmax(scores * self.scale, dim=1).nan_to_num(0.0)

    def row_shards(self) -> dict[str, RowShard]:
        """Of the tensors in `state_dict`, by name, which rows are here; empty where all are."""
        if self.world.size == 1:
            return {}
        rows = RowShard(self.shard.start, self.shard.stop, self.shard.num_labels)
        return {"embeddings": rows, "known": rows}
