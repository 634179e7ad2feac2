"""The body of a model as one of several ranks trains it: its rows, its noise, the summed gradient.

All ranks draw the same rows for a step and each takes its share of every micro-batch. Classifiers
talk to each other on their own (`xmc.heads.classifier`). A rank alone takes all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.data.batches import BagStore, Dataset, seeded_generator
from xmc.distributed.collectives import World, share
from xmc.distributed.data_parallel import replicated, sum_gradients_
from xmc.model import XMCModel
from xmc.nn.encoder import BagEncoder, BagPart
from xmc.nn.layers import layers_of
from xmc.nn.transformer import TransformerEncoder
from xmc.training.gradient_sync import synchronized, synchronizers
from xmc.types import Bag, Batch

_NOISE = 3  # the stream of dropout, beside those of `xmc.data.batches`


class Replica:
    """Runs the encoder on this rank's rows, sums its gradients over ranks.

    The table of a bag encoder gets its gradient from the rows of all ranks as it goes backward
    (`xmc.nn.encoder.BagPart`). A transformer is wrapped (`train.data_parallel`), which sums while
    it goes backward. What else there is, like the layer between encoder and head, is summed after
    the last pass of a step. With "fsdp" the model's encoder is changed in place: make the optimizer
    afterwards.
    """

    def __init__(self, model: XMCModel, config: Config) -> None:
        self.world = world = model.world
        self._model = model
        self._seed = config.train.seed
        self._encoder = wrapped(model.encoder, world, config.train.data_parallel)
        self._wrappers = synchronizers([self._encoder])
        summed: set[Tensor] = set(self._encoder.parameters()) if self._wrappers else set()
        if isinstance(model.encoder, BagEncoder):
            summed = {model.encoder.table.weight}
        self._plain = [p for p in model.body.parameters() if p.requires_grad and p not in summed]

    def rows(self, rows: Tensor) -> Tensor:
        """Which of the rows [R] of a micro-batch are this rank's."""
        return share(rows, self.world)

    def batch(self, dataset: Dataset, rows: Tensor) -> tuple[Batch, Bag | None]:
        """This rank's share of the rows [R] of a micro-batch, and the bags of all, if ranks have.

        A wrapped encoder talks to those of the other ranks in every pass, so it reads one row where
        this rank has none: the inputs are then longer than the labels. Bags can do without.
        """
        mine = self.rows(rows)
        if isinstance(dataset.features, BagStore):
            return dataset.batch(mine), dataset.features.rows(rows) if self.world.size > 1 else None
        if len(mine):
            return dataset.batch(mine), None
        spare = dataset.batch(rows[:1])
        return Batch(spare.inputs, spare.labels.slice(0, 0), mine), None

    def encode(
        self,
        batch: Batch,
        bag: Bag | None,  # of the rows of all ranks
    ) -> Tensor:  # [B_r, D]
        """What the encoder makes of `batch`'s rows; a spare row has the gradient 0."""
        if bag is not None:
            counts = [len(part) for part in torch.arange(len(bag)).tensor_split(self.world.size)]
            encoder = self._model.encoder
            assert isinstance(encoder, BagEncoder)
            encoder.part = BagPart(bag.to(batch.labels.device), counts, self.world)
            encoder.dropout.part = encoder.part.first, len(bag)
        pooled: Tensor = self._encoder(batch.inputs)
        return pooled if len(pooled) == len(batch) else pooled[: len(batch)]

    @contextmanager
    def one_pass(self, *, last: bool) -> Iterator[None]:
        """A pass of a step, forward and backward; wrappers sum in the last one alone."""
        with synchronized(self._wrappers, self._wrappers if last else ()):
            yield

    def sum_gradients_(self) -> None:
        """After the last pass: sum over ranks what no wrapper has summed."""
        sum_gradients_(self._plain, self.world)

    def draw_apart_(self, step: int) -> None:
        """Give the ranks random states of their own, where they drop out rows of their own.

        Keyed by step, so that a run goes on alike from a checkpoint. Nothing for a rank alone, nor
        for bags, of whose dropout all ranks draw all.
        """
        if self.world.size > 1 and not isinstance(self._model.encoder, BagEncoder):
            draw_apart_(self._seed, _NOISE, step, self.world)


def wrapped(encoder: nn.Module, world: World, kind: Literal["ddp", "fsdp"]) -> nn.Module:
    """What to call in training: a transformer of several ranks is wrapped, or changed in place."""
    if world.size == 1 or not isinstance(encoder, TransformerEncoder):
        return encoder
    blocks = layers_of(encoder.model)[1] if kind == "fsdp" else ()
    return replicated(encoder, world, kind, blocks=list(blocks))


def draw_apart_(seed: int, stream: int, step: int, world: World) -> None:
    """Give each rank a random state of its own, the same whenever the step is taken."""
    key = (seed, stream, step, world.rank, world.size)
    torch.manual_seed(seeded_generator(*key).initial_seed())
