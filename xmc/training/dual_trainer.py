"""Training of a dual encoder: documents and the texts of their labels, told apart in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.data.batches import Dataset
from xmc.data.label_store import LabelTexts
from xmc.data.pairs import Pairs, epoch_pairs, trainable_labels
from xmc.distributed.data_parallel import own_part, own_rows
from xmc.distributed.sharding import RowShard
from xmc.losses import info_nce
from xmc.model import XMCModel
from xmc.training.checkpoint import load_into
from xmc.training.dual_replica import DualReplica, Share
from xmc.training.encoder_optimizer import clip_gradient_, make_encoder_optimizer
from xmc.training.grad_cache import cached_step
from xmc.training.log import RunLog
from xmc.training.loop import StepReport, TrainingError
from xmc.training.mining import embed_labels_, label_tower, mine, mining_is_due
from xmc.training.progress import Track, untracked
from xmc.training.schedule import lr_factor
from xmc.training.validation import validation_scores

_KS = (1, 3, 5, 10, 100)
_METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "R@10", "R@100")
_NOT_TRAINED = ("head.embeddings", "head.known")  # made from the weights, so in no checkpoint


class DualTrainer:
    """Trains a dual encoder on the rows that have a label with a text.

    `xmc.training.loop.TrainingLoop` runs it. Embeddings of the labels are made anew for every
    validation and mining, from the weights there are.

    The ranks of the model's world train it together, as one process would: each encodes its share
    of a batch's documents and keys, the loss is that of all of them, and each embeds and holds a
    part of the labels. Mined labels are the same on every rank.
    """

    def __init__(
        self,
        model: XMCModel,
        config: Config,
        train_set: Dataset,
        validation_set: Dataset | None,
        label_texts: LabelTexts,
    ) -> None:
        self.model = model
        self.head = model.retrieval
        self.config = config
        self.train_set = train_set
        self.validation_set = validation_set
        self.label_texts = label_texts
        self.labels = trainable_labels(train_set.labels, label_texts.known)
        self.device = self.head.embeddings.device
        self.replica = DualReplica(model, config)
        self.trained = nn.ModuleList([model.body, *([] if self._tied else [label_tower(model)])])
        self.optimizer = _make_optimizer(self.trained, self.head.log_scale, config)
        options = config.train
        self.num_rows = int((self.labels.counts() > 0).sum())
        if not self.num_rows:
            raise TrainingError("no training row has a label with a text")
        self.steps_per_epoch = math.ceil(self.num_rows / options.batch_size)
        self.total_steps = options.epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps taken
        self.track: Track = untracked
        self.mined: Tensor | None = None  # [N, pool] int32, wrong labels near each row
        self._embedded_at = -1  # the step whose weights the embeddings are of

    @property
    def _tied(self) -> bool:
        return self.head.label_tower is None

    def steps(self, epoch: int, start: int) -> Iterator[Pairs]:
        """The batches of an epoch, after a mining if one is due."""
        if start == 0 and mining_is_due(self.config.negatives, epoch):
            self._embed()
            self.mined = mine(
                self.model,
                self.train_set,
                self.config.negatives,
                batch_size=self.config.train.eval_batch_size,
                track=self.track,
            )
        yield from epoch_pairs(
            self.labels,
            self.label_texts.first,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            epoch=epoch,
            start=start,
            mined=self.mined,
            per_document=self.config.negatives.per_document,
        )

    def run_step(self, work: Pairs, log: RunLog, *, measure: bool) -> StepReport:
        """An optimizer step; logs the temperature after it and the keys it had."""
        self._set_rates()
        shares = [self.replica.share(rows) for rows in (work.rows, work.keys)]
        stores = (self.train_set.features, self.label_texts.features)
        inputs = [
            store.rows(share.rows).to(self.device)
            for store, share in zip(stores, shares, strict=True)
        ]
        self.replica.draw_apart_(self.step)
        loss = self._loss_and_gradients(inputs, work, shares)
        self.replica.sum_gradients_()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}: lower encoder_optimizer.lr"
            )
        norm = 0.0
        if measure or self.config.train.clip_norm:
            norm = clip_gradient_(self.trained, self.config.train.clip_norm, self.replica.world)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.head.log_scale.clamp_(max=-math.log(self.config.contrastive.min_temperature))
        self.step += 1
        values = {
            "encoder_grad_norm": norm,
            "encoder_lr": self.optimizer.param_groups[0]["lr"],
            "temperature": 1 / float(self.head.scale.detach()),
            "keys": len(work.keys),
        }
        return StepReport(loss, len(work.rows), values)

    def after_step(self, log: RunLog) -> None:
        """Nothing changes between two steps."""

    def validate(self) -> dict[str, float] | None:
        """Scores on the validation rows; None where there are none. Embeds the labels anew."""
        self._embed()
        return validation_scores(
            self.model, self.validation_set, self.config, ks=_KS, metrics=_METRICS
        )

    def tensors(self) -> dict[str, Tensor]:
        """Weights and mined negatives, for a checkpoint."""
        tensors = {f"model.{name}": own_part(tensor) for name, tensor in self._weights().items()}
        if self.mined is not None:
            tensors["negatives.mined"] = self.mined
        return tensors

    def row_shards(self) -> dict[str, RowShard]:
        """Which rows this rank has of weights that ranks share; the mined labels are whole."""
        rows = {name: own_rows(tensor) for name, tensor in self._weights().items()}
        return {f"model.{name}": part for name, part in rows.items() if part is not None}

    def state(self) -> dict[str, Any]:
        """Nothing that is not in `tensors`."""
        return {}

    def restore_(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what a checkpoint holds; its optimizer is the loop's business."""
        weights = {name: own_part(tensor) for name, tensor in self._weights().items()}
        load_into(weights, tensors, "model.")
        self.mined = tensors.get("negatives.mined")
        self._embedded_at = -1

    def _weights(self) -> dict[str, Tensor]:
        weights = self.model.weights()
        return {name: tensor for name, tensor in weights.items() if name not in _NOT_TRAINED}

    def _embed(self) -> None:
        if self._embedded_at == self.step:
            return
        embed_labels_(
            self.model,
            self.label_texts,
            batch_size=self.config.train.eval_batch_size,
            track=self.track,
        )
        self._embedded_at = self.step

    def _loss_and_gradients(
        self, inputs: Sequence[Any], work: Pairs, shares: Sequence[Share]
    ) -> float:
        """The loss of a batch, the same on every rank; fills the gradients of this rank's rows."""
        options, replica = self.config.contrastive, self.replica
        documents, keys = shares
        positives = replica.positives(work, documents).to(self.device)

        def loss(of_documents: Tensor, of_keys: Tensor) -> Tensor:
            return info_nce(
                of_documents[: documents.count],
                of_keys[: keys.count],
                scale=self.head.scale,
                symmetric=options.symmetric,
                positives=positives,
                query_ids=documents.of(work.query_ids).to(self.device),
                key_ids=keys.of(work.key_ids).to(self.device),
                decoupled=options.decoupled,
                world=replica.world,
            )

        if options.chunk:
            return float(cached_step(replica.towers, inputs, loss, chunk=options.chunk))
        value = loss(*(replica.encode(n, inputs[n], shares[n]) for n in range(2)))
        value.backward()
        return float(value.detach())

    def _set_rates(self) -> None:
        config = self.config
        factor = lr_factor(
            self.step,
            total=self.total_steps,
            warmup=config.train.warmup_steps,
            kind=config.train.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _make_optimizer(
    trained: nn.Module, log_scale: nn.Parameter, config: Config
) -> torch.optim.Optimizer:
    """That of the encoders and, with a rate of its own and no decay, the temperature's."""
    optimizer = make_encoder_optimizer(trained, config)
    for group in optimizer.param_groups:
        group["peak_lr"] = config.encoder_optimizer.lr * group["lr_scale"]
    rate = config.contrastive.temperature_lr
    optimizer.add_param_group({"params": [log_scale], "weight_decay": 0.0, "peak_lr": rate})
    return optimizer
