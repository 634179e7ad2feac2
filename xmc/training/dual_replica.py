"""The encoders of a dual encoder as one of several ranks trains them: its rows, summed gradients.

All ranks draw the same batches. Each encodes its share of the documents and of the keys, and
`xmc.losses` makes one loss of the rows of all. A rank alone takes all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.data.pairs import Pairs
from xmc.distributed.data_parallel import sum_gradients_
from xmc.model import XMCModel
from xmc.nn.encoder import BagEncoder
from xmc.nn.tower import Tower
from xmc.training.encoder_optimizer import coalesce_gradient_
from xmc.training.gradient_sync import synchronizers
from xmc.training.mining import document_tower, label_tower
from xmc.training.replica import draw_apart_, wrapped
from xmc.types import SparseLabels

_NOISE = 4  # the stream of dropout, beside those of `xmc.data.batches`, pairs and replicas


@dataclass(frozen=True)
class Share:
    """This rank's rows of one side of a batch."""

    rows: Tensor  # what the encoder reads: the own rows and perhaps one more, which counts nothing
    first: int  # own row 0 among those of all ranks
    count: int  # own rows
    total: int  # rows of all ranks

    def of(self, values: Tensor) -> Tensor:
        """The own rows of something [total, ...]."""
        return values[self.first : self.first + self.count]


class DualReplica:
    """The towers to call in training; `sum_gradients_` makes one gradient of all ranks'.

    A transformer is wrapped (`train.data_parallel`) and sums gradients while it goes backward; the
    rest is summed afterwards. With "fsdp" the model's encoders are changed in place: make the
    optimizer after this.
    """

    def __init__(self, model: XMCModel, config: Config) -> None:
        self.world = model.world
        self._seed = config.train.seed
        self._chunked = bool(config.contrastive.chunk)
        given = (document_tower(model), label_tower(model))
        encoders = [tower.encoder for tower in given]
        kind = config.train.data_parallel
        called = {e: wrapped(e, self.world, kind) for e in dict.fromkeys(encoders)}
        self.towers: tuple[Tower, ...] = given
        if any(called[e] is not e for e in encoders):
            self.towers = tuple(Tower(called[t.encoder], t.intermediate) for t in given)
        self._bags = [e for e in called if isinstance(e, BagEncoder)]
        wrappers = synchronizers(called.values())
        self.passes_must_agree = bool(wrappers)
        summed = {p for wrapper in wrappers for p in wrapper.parameters()}
        of_head = [model.retrieval.log_scale]
        self._trained = nn.ModuleList(given)
        self._plain = [
            p
            for p in [*self._trained.parameters(), *of_head]
            if p.requires_grad and p not in summed
        ]

    def share(self, rows: Tensor) -> Share:
        """This rank's part of the rows [R] of all.

        A wrapped encoder talks to those of the other ranks in every pass, so all ranks read as many
        rows; and the gradient cache wants one at least.
        """
        parts = rows.tensor_split(self.world.size)
        mine = parts[self.world.rank]
        first = sum(map(len, parts[: self.world.rank]))
        wanted = len(parts[0]) if self.passes_must_agree else int(self._chunked)
        spare = rows[: max(wanted - len(mine), 0)]
        return Share(torch.cat([mine, spare]), first, len(mine), len(rows))

    def positives(self, work: Pairs, documents: Share) -> SparseLabels:
        """Of this rank's documents, over the keys of all ranks."""
        return work.positives.slice(documents.first, documents.first + documents.count)

    def encode(self, which: int, inputs: Any, share: Share) -> Tensor:  # [count, D]
        """What a tower, 0 for documents and 1 for labels, makes of a share's rows.

        Of bags all ranks draw the dropout of all rows, as one process would.
        """
        tower = self.towers[which]
        if isinstance(tower.encoder, BagEncoder) and self.world.size > 1:
            tower.encoder.dropout.part = share.first, share.total
        reps: Tensor = tower(inputs)
        return reps[: share.count]

    def draw_apart_(self, step: int) -> None:
        """Give the ranks random states of their own, where each draws the dropout of its own rows.

        Keyed by step, so that a run goes on alike from a checkpoint.
        """
        if self.world.size > 1 and (self._chunked or not self._bags):
            draw_apart_(self._seed, _NOISE, step, self.world)

    def sum_gradients_(self) -> None:
        """After the backward pass: sum over ranks what no wrapper has summed."""
        if self.world.size > 1:
            coalesce_gradient_(self._trained)
            sum_gradients_(self._plain, self.world)
