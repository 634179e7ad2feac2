"""The body of a model as one of several ranks trains it: its rows, its noise, the summed gradient.

All ranks draw the same rows for a step and each takes its share of every micro-batch. Classifiers
talk to each other on their own (`xmc.heads.classifier`). A rank alone takes all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.data.batches import Dataset, seeded_generator
from xmc.distributed.collectives import share
from xmc.distributed.data_parallel import replicated, sum_gradients_
from xmc.model import XMCModel
from xmc.nn.encoder import BagEncoder
from xmc.nn.layers import layers_of
from xmc.nn.transformer import TransformerEncoder
from xmc.training.encoder_optimizer import coalesce_gradient_
from xmc.training.gradient_sync import synchronized, synchronizers
from xmc.types import Batch

_NOISE = 3  # the stream of dropout, beside those of `xmc.data.batches`


class Replica:
    """Runs the encoder on this rank's rows, sums its gradients over ranks.

    A bag's gradient is sparse, and its rows go to all ranks after the last pass of a step. A
    transformer is wrapped (`train.data_parallel`), which sums while it goes backward. The layer
    between encoder and head is summed like the bag. With "fsdp" the model's encoder is changed in
    place: make the optimizer afterwards.
    """

    def __init__(self, model: XMCModel, config: Config) -> None:
        self.world = world = model.world
        self._model = model
        self._seed = config.train.seed
        self._encoder: nn.Module = model.encoder
        if world.size > 1 and isinstance(model.encoder, TransformerEncoder):
            kind = config.train.data_parallel
            blocks = layers_of(model.encoder.model)[1] if kind == "fsdp" else ()
            self._encoder = replicated(model.encoder, world, kind, blocks=list(blocks))
        self._wrappers = synchronizers([self._encoder])
        wrapped = set(self._encoder.parameters()) if self._wrappers else set()
        self._plain = [p for p in model.body.parameters() if p.requires_grad and p not in wrapped]

    def rows(self, rows: Tensor) -> Tensor:
        """Which of the rows [R] of a micro-batch are this rank's."""
        return share(rows, self.world)

    def batch(self, dataset: Dataset, rows: Tensor) -> Batch:
        """This rank's share of the rows [R] of a micro-batch.

        A wrapped encoder talks to those of the other ranks in every pass, so it reads one row where
        this rank has none: the inputs are then longer than the labels. Bags can do without.
        """
        mine = self.rows(rows)
        if len(mine) or isinstance(self._model.encoder, BagEncoder):
            return dataset.batch(mine)
        spare = dataset.batch(rows[:1])
        return Batch(spare.inputs, spare.labels.slice(0, 0), mine)

    def encode(
        self,
        batch: Batch,
        num_rows: int,  # of the micro-batch, on all ranks
    ) -> Tensor:  # [B_r, D]
        """What the encoder makes of `batch`'s rows; a spare row has the gradient 0."""
        self._set_part(num_rows)
        pooled: Tensor = self._encoder(batch.inputs)
        return pooled if len(pooled) == len(batch) else pooled[: len(batch)]

    @contextmanager
    def one_pass(self, *, last: bool) -> Iterator[None]:
        """A pass of a step, forward and backward; wrappers sum in the last one alone."""
        with synchronized(self._wrappers, self._wrappers if last else ()):
            yield

    def sum_gradients_(self) -> None:
        """After the last pass: sum over ranks what no wrapper has summed."""
        if self.world.size > 1:
            coalesce_gradient_(self._model.body)
            sum_gradients_(self._plain, self.world)

    def draw_apart_(self, step: int) -> None:
        """Give the ranks random states of their own, where they drop out rows of their own.

        Keyed by step, so that a run goes on alike from a checkpoint. Nothing for a rank alone, nor
        for bags, of whose dropout all ranks draw all.
        """
        if self.world.size > 1 and not isinstance(self._model.encoder, BagEncoder):
            key = (self._seed, _NOISE, step, self.world.rank, self.world.size)
            torch.manual_seed(seeded_generator(*key).initial_seed())

    def _set_part(self, num_rows: int) -> None:
        encoder = self._model.encoder
        if self.world.size > 1 and isinstance(encoder, BagEncoder):
            small, larger = divmod(num_rows, self.world.size)
            first = self.world.rank * small + min(self.world.rank, larger)
            encoder.dropout.part = first, num_rows
