"""A trained or trainable model: features, encoder, head, label strings, and its files.

The folder of a model holds `model.json` (format version, options, sizes), `labels.json.gz` (label
strings in order), `features/` (vocabulary or tokenizer), `encoder/` (a transformer's own options)
and `weights.safetensors`. Only the last changes while a run goes on, and by one rename. Exported
models (`xmc.serving.export`) are of version 2, with `labels.safetensors` for the strings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xmc.config import Config, to_dict
from xmc.data.features import Features, load_features
from xmc.distributed.collectives import World, gather_rows
from xmc.distributed.data_parallel import own_part, own_rows
from xmc.distributed.sharding import RowShard
from xmc.distributed.tensor_file import save_tensors
from xmc.distributed.together import on_rank
from xmc.files import write_json
from xmc.heads.arranged import ArrangedHead
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.heads.order import is_arranged
from xmc.heads.retrieval import RetrievalHead
from xmc.model_files import (
    VERSION,
    check_sums,
    not_weights,
    read_labels,
    read_record,
    read_tensors,
    write_labels,
)
from xmc.model_files import ModelError as ModelError
from xmc.nn.bag_reps import join_bag
from xmc.nn.compressed import CompressedBagEncoder, Storage, compress_
from xmc.nn.encoder import BagEncoder
from xmc.nn.layers import freeze_
from xmc.nn.lora import add_lora_, merged_weights
from xmc.nn.tower import Tower
from xmc.nn.transformer import TransformerEncoder
from xmc.nn.warm_start import read_bag_encoder_
from xmc.runs import check_same_labels
from xmc.types import Bag, BagReps, Batch, SparseLabels, Tokens, TopK


class XMCModel(nn.Module):
    """Encoder and head with what they need to take text in and give label strings out."""

    def __init__(
        self,
        config: Config,
        features: Features,
        labels: Sequence[str],
        encoder: BagEncoder | CompressedBagEncoder | TransformerEncoder,
        head: ClassifierHead | ArrangedHead | RetrievalHead,
        intermediate: nn.Module | None = None,  # between encoder and head; None: nothing
    ) -> None:
        super().__init__()
        self.config = config
        self.features = features
        self.labels = labels
        self.encoder = encoder
        self.intermediate = nn.Identity() if intermediate is None else intermediate
        self.head = head
        self.storage: Storage | None = None  # of a model that is compressed for prediction
        # Of the head's labels; encoder and layers between are whole on every rank.
        self.world = head.world
        self.folder: Path | None = None  # where it was loaded from

    @torch.inference_mode()
    def topk(self, inputs: Bag | Tokens, k: int, exclude: SparseLabels | None = None) -> TopK:
        """The k best labels of each input, without dropout; inputs are the same on all ranks."""
        return self.head.topk(self.reps(inputs), k, exclude)

    @torch.inference_mode()
    def reps(self, inputs: Bag | Tokens) -> Any:  # Tensor [B, D] or BagReps, as the head wants it
        """What the head reads of each input, without dropout; restores the training mode.

        On several ranks all have all inputs, and each encodes a share; one all-gather of [B, D].
        """
        training = self.encoder.training
        self.encoder.eval()
        try:
            counts = [len(part) for part in torch.arange(len(inputs)).tensor_split(self.world.size)]
            first = sum(counts[: self.world.rank])
            # A rank without rows encodes one in vain, as encoders need one.
            start = min(first, max(len(inputs) - 1, 0))
            mine = inputs.slice(start, max(first + counts[self.world.rank], start + 1))
            own = self.intermediate(self.encoder(mine))[: counts[self.world.rank]]
            return self.head_inputs(gather_rows(own, counts, self.world), inputs)
        finally:
            self.encoder.train(training)

    def head_inputs(self, reps: Tensor, inputs: Bag | Tokens) -> Tensor | BagReps:
        """The representations [B, D], with their bags where the head reads these too."""
        if not isinstance(self.head, BagClassifierHead):
            return reps
        assert isinstance(inputs, Bag)  # the recipe was checked
        options = self.config.head
        least = options.fan_in + options.bag_fan_in
        return join_bag(reps, inputs, options.bag_scale, least=least)

    def probabilities(self, scores: Tensor) -> Tensor:  # [B, C] -> [B, C]
        """Estimates of P(label | text) from scores, in the same order.

        "bce": sigmoid(s). "squared_hinge": sigmoid(2 s), because the margin that minimises it is
        2 p - 1 (Zhang, Annals of Statistics 2004), of which this has value and slope at 0. A dual
        encoder: the softmax of the cosines of these labels, by its temperature.
        """
        if isinstance(self.head, RetrievalHead):
            return self.head.probabilities(scores)
        return torch.sigmoid(scores if self.head.loss == "bce" else 2 * scores)

    def shown(self, scores: Tensor) -> Tensor:
        """Scores as `Predictor` gives them: probabilities for "bce", margins or cosines else."""
        return self.probabilities(scores) if self.head.loss == "bce" else scores

    def topk_of(self, k: int) -> Callable[[Batch], TopK]:
        """A function of a batch, as evaluation wants it, that honours the batch's filter."""
        device = next(self.encoder.parameters()).device

        def topk(batch: Batch) -> TopK:
            moved = batch.to(device)
            best = self.topk(moved.inputs, k, moved.exclude)
            return TopK(best.scores.cpu(), best.labels.cpu())

        return topk

    @property
    def classifier(self) -> ClassifierHead | ArrangedHead:
        """The head, where it is a classifier; raises ValueError for a dual encoder."""
        if isinstance(self.head, RetrievalHead):
            raise ValueError("expected the model of a classifier, got a dual encoder's")
        return self.head

    @property
    def retrieval(self) -> RetrievalHead:
        """The head, where it holds label embeddings; raises ValueError for a classifier."""
        if not isinstance(self.head, RetrievalHead):
            raise ValueError("expected the model of a dual encoder, got a classifier's")
        return self.head

    @property
    def body(self) -> nn.Module:
        """All below the head, what autograd and the encoder's optimizer train."""
        return nn.ModuleList([self.encoder, self.intermediate])

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of encoder and head by name, sharing storage with the model."""
        return dict(self.state_dict(keep_vars=False))

    def row_shards(self) -> dict[str, RowShard]:
        """Which rows of a tensor this rank holds, by name, where not all; see `ClassifierHead`.

        Names are those of `weights()`, and with "head." before them those of the head's
        `training_state()`. All other tensors are the same on every rank.
        """
        return {f"head.{name}": rows for name, rows in self.head.row_shards().items()}

    def num_bytes(self) -> int:
        """Bytes of all weights and indices in memory, padding and what is in no file included."""
        tensors = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_model(
    config: Config,
    features: Features,
    labels: list[str],
    *,
    label_shares: Tensor | None = None,  # [L], share of training rows that carry each label
    positive_weight: Tensor | None = None,  # [L], what a positive of each label counts
    order: Tensor | None = None,  # [L], the label of each row of the classifier
    world: World | None = None,  # None: alone
) -> XMCModel:
    """A fresh model with weights drawn from torch's global generator.

    Where `world` has several ranks, all build with the same arguments and the same state of the
    generator, and each gets the classifier's rows of a part of the labels, as one process would
    draw them. Raises ValueError where the recipe wants what the caller has to bring and has not.
    """
    if config.train.objective == "contrastive":
        encoder = _build_encoder(config, features, config.encoder.model)
        intermediate, _ = _build_intermediate(config, encoder.out_features)
        return _retrieval_model(config, features, labels, encoder, intermediate, world)
    wanted = {
        "positive_weight": (config.head.positive_weight != "none", positive_weight),
        "order": (config.head.order != "none" or config.head.dense_share > 0, order),
    }
    for name, (needed, given) in wanted.items():
        if needed and given is None:
            raise ValueError(f"expected {name} [{len(labels)}] for this recipe's head, got None")
    encoder = _build_encoder(config, features, config.encoder.model)
    intermediate, width = _build_intermediate(config, encoder.out_features)
    head = _build_head(
        config,
        width,
        len(labels),
        order,
        label_shares=label_shares,
        positive_weight=positive_weight,
        num_bag_features=features.num_features,
        world=world,
    )
    return XMCModel(config, features, labels, encoder, head, intermediate)


def save_model(model: XMCModel, folder: Path) -> None:
    """Write a complete model folder, part by part; each file appears whole or not at all.

    All ranks of the model call this. The first writes; an error of one is an error on all of them.
    """
    record = {
        "version": VERSION,
        "num_labels": len(model.labels),
        "num_features": model.features.num_features,
        "config": to_dict(model.config),
    }

    def describe() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_inputs(model, folder)
        write_labels(folder / "labels.json.gz", model.labels)

    on_rank(0, describe, model.world)
    save_weights(model, folder)
    on_rank(0, lambda: write_json(folder / "model.json", record), model.world)


def save_inputs(model: XMCModel, folder: Path) -> None:
    """Write what makes inputs of texts and, of a transformer, the options of its own."""
    model.features.save(folder / "features")
    if isinstance(model.encoder, TransformerEncoder):
        model.encoder.save_config(folder / "encoder")


def save_weights(model: XMCModel, folder: Path) -> None:
    """Replace `weights.safetensors` in one rename; adapters are merged into what they adapt.

    All ranks of the model call this and the first writes, the same bytes for any number of them.
    It is sent the others' rows and holds a block of them at a time.
    """
    weights = merged_weights(model)
    shards = {name: rows for name, rows in model.row_shards().items() if name in weights}
    for name, tensor in weights.items():
        if (rows := own_rows(tensor)) is not None:  # of an encoder whose parameters are divided
            shards[name] = rows
    own = {name: own_part(tensor) for name, tensor in weights.items()}
    save_tensors(folder / "weights.safetensors", own, world=model.world, row_shards=shards)


def load_model(folder: Path, *, world: World = World.alone()) -> XMCModel:
    """Read a model folder, on several ranks each the classifier's rows of a part of the labels.

    Raises ModelError naming the file that is missing or damaged.
    """
    record = read_record(folder / "model.json")
    config = record["config"]
    labels = read_labels(folder, record["num_labels"])
    features = load_features(folder / "features", config.features)
    # No weights are drawn and held only to be replaced. A transformer computes some buffers of
    # its own when it is made, so it has to be made for real.
    with nullcontext() if config.encoder.kind == "transformer" else torch.device("meta"):
        encoder = _build_encoder(config, features, str(folder / "encoder"), from_config=True)
    with torch.device("meta"):
        intermediate, width = _build_intermediate(config, encoder.out_features)
        if config.train.objective == "contrastive":
            model = _retrieval_model(config, features, labels, encoder, intermediate, world)
        else:
            num_bag_features = features.num_features
            head = _build_head(
                config, width, len(labels), num_bag_features=num_bag_features, world=world
            )
            model = XMCModel(config, features, labels, encoder, head, intermediate)
        if record["storage"] is not None:
            compress_model_(model, record["storage"])
    path = folder / "weights.safetensors"
    tensors = read_tensors(path, row_shards=model.row_shards())
    if record["checksums"] is not None and world.size == 1:
        check_sums(path, tensors, record["checksums"])
    try:
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(not_weights(path, error)) from None
    model.folder = folder
    return model.eval()


def compress_model_(model: XMCModel, storage: Storage) -> None:
    """Store a model for prediction, in place: its classifier and, of a bag encoder, the table.

    Indices of labels that read words stay as they are: each batch has columns of its own.
    Raises ValueError for a dual encoder, whose label embeddings have no such form.
    """
    if isinstance(model.head, RetrievalHead):
        raise ValueError("expected the model of a classifier to compress, got a dual encoder's")
    if isinstance(model.head, BagClassifierHead):
        storage = replace(storage, packed=False)
    compress_(model.head, storage)
    if isinstance(model.encoder, BagEncoder):
        model.encoder = CompressedBagEncoder(model.encoder, storage)
    model.storage = storage


def read_label_embeddings(source: str | Path, labels: Sequence[str]) -> Tensor:  # [L, D]
    """The label embeddings in a dual encoder's run or model folder; zeros for labels without text.

    Raises ModelError where there is none, RunError where its labels are not these.
    """
    folder = Path(source)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    record = read_record(folder / "model.json")
    if record["config"].train.objective != "contrastive":
        raise ModelError(f"{folder}: expected the model of a dual encoder, got a classifier's")
    own = read_labels(folder, record["num_labels"])
    check_same_labels(own, labels, folder, "this data set")
    return read_tensors(folder / "weights.safetensors", ["head.embeddings"])["head.embeddings"]


def _build_encoder(
    config: Config, features: Features, source: str, *, from_config: bool = False
) -> BagEncoder | TransformerEncoder:
    """A fresh encoder or, `from_config`, the shape of a saved one as prediction needs it."""
    options = config.encoder
    if options.kind == "bag":
        encoder = BagEncoder(features.num_features, options.dim, options.dropout)
        if source and not from_config:
            read_bag_encoder_(encoder, source)
        return encoder
    if from_config:
        return TransformerEncoder.from_config(
            source, pooling=options.pooling, dropout=options.dropout, autocast=options.autocast
        )
    transformer = TransformerEncoder(
        source,
        pooling=options.pooling,
        dropout=options.dropout,
        autocast=options.autocast,
        checkpointing=options.checkpointing,
        compile=options.compile,
    )
    if options.lora_rank:
        add_lora_(transformer.model, rank=options.lora_rank, alpha=options.lora_alpha)
    freeze_(transformer.model, options.freeze_layers)
    return transformer


def _build_intermediate(config: Config, in_features: int) -> tuple[nn.Module | None, int]:
    """The layer between encoder and head, if there is one, and how many features the head gets."""
    options = config.encoder
    if not options.intermediate:
        return None, in_features
    activations = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}
    linear = nn.Linear(in_features, options.intermediate)
    return nn.Sequential(linear, activations[options.activation]()), options.intermediate


def _retrieval_model(
    config: Config,
    features: Features,
    labels: Sequence[str],
    encoder: BagEncoder | TransformerEncoder,
    intermediate: nn.Module | None,
    world: World | None,
) -> XMCModel:
    """A dual encoder; separate encoders start as copies of one another."""
    label_tower = None
    if config.contrastive.encoders == "separate":
        label_tower = copy.deepcopy(Tower(encoder, intermediate or nn.Identity()))
    dim = config.encoder.intermediate or encoder.out_features
    head = RetrievalHead(len(labels), dim, config.contrastive, label_tower=label_tower, world=world)
    return XMCModel(config, features, labels, encoder, head, intermediate)


def _build_head(
    config: Config,
    in_features: int,
    num_labels: int,
    order: Tensor | None = None,
    *,
    label_shares: Tensor | None = None,
    positive_weight: Tensor | None = None,
    num_bag_features: int,
    world: World | None = None,
) -> ClassifierHead | ArrangedHead:
    if config.head.bag_fan_in:
        return BagClassifierHead.from_options(
            in_features,
            num_bag_features,
            num_labels,
            config.head,
            config.classifier_optimizer,
            label_shares=label_shares,
            positive_weight=positive_weight,
            world=world,
        )
    if is_arranged(num_labels, config.head):
        return ArrangedHead.from_config(
            in_features,
            num_labels,
            config.head,
            config.classifier_optimizer,
            order=order,
            label_shares=label_shares,
            positive_weight=positive_weight,
            world=world,
        )
    return ClassifierHead.from_config(
        in_features,
        num_labels,
        config.head,
        config.classifier_optimizer,
        label_shares=label_shares,
        positive_weight=positive_weight,
        world=world,
    )
