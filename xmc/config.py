"""Options of a run: frozen dataclasses, read strictly from TOML.

An unknown key, a wrong type or a value outside its range is a `ConfigError` of one line that
names the file, the key, the rule and the value. Nothing is converted silently: "3" is no number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(ge=0, lt=1)]
_MEMORY = re.compile(r"(auto|\d+(\.\d+)?\s*[kmgt]i?b)?", re.IGNORECASE)  # as `xmc plan --memory`


class ConfigError(ValueError):
    """A recipe or an override that cannot be used."""


@dataclass(frozen=True, config=_STRICT)
class FeatureConfig:
    """How a text becomes encoder input."""

    kind: Literal["bag", "tokens"] = "bag"
    """bag: weighted word n-grams for the bag encoder; tokens: token ids for a transformer."""
    vocabulary: Literal["tfidf", "hashing"] = "tfidf"
    """tfidf: one id per n-gram seen often enough; hashing: 2^hash_bits ids, no vocabulary file."""
    ngrams: Literal[1, 2] = 1
    """1: words; 2: words and pairs of neighbouring words."""
    min_df: Positive = 2
    """Keep n-grams that occur in at least this many training documents."""
    max_features: Positive = 500_000
    """Keep at most this many n-grams, the most frequent first."""
    hash_bits: Annotated[int, Field(ge=10, le=26)] = 18
    """Size of the hashed feature space, as a power of two."""
    max_length: Positive = 128
    """Longest token sequence of a transformer, special tokens included."""
    pad_multiple: Positive = 1
    """Batches of tokens are padded to their longest row and on to a multiple of this, but not past
    max_length; 8 suits the matrix units of GPUs, and gives torch.compile fewer shapes."""


@dataclass(frozen=True, config=_STRICT)
class EncoderConfig:
    """The network from features to the representation of D numbers."""

    kind: Literal["bag", "transformer"] = "bag"
    """bag: sum of n-gram vectors, ReLU; transformer: any Hugging Face AutoModel."""
    dim: Positive = 512
    """D of the bag encoder; a transformer brings its own hidden size."""
    dropout: OpenShare = 0.3
    """Dropout on the representation."""
    model: str = ""
    """Where the weights come from at the start: folder or hub name of a transformer, or a run or
    model of xmc, which lends its encoder. A bag encoder starts from a run or model of xmc or, where
    this is empty, at random; it takes over the vocabulary as well, so both recipes agree on it."""
    pooling: Literal["mean", "cls"] = "mean"
    """mean over real tokens, or the first token."""
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    """Arithmetic inside the transformer; float16 is trained with a scaled loss."""
    checkpointing: bool = False
    """Compute the transformer's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Train with torch.compile, which needs a compiler; without one, warn and go on."""
    freeze_layers: Annotated[int, Field(ge=-1)] = -1
    """n: the transformer's embeddings and first n layers keep their weights; -1: all train."""
    lora_rank: NonNegative = 0
    """Train low-rank adapters of this rank beside every linear layer of the transformer, and none
    of its own weights; they are merged in the saved model. 0: none. Needs xmc-toolkit[lora]."""
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """Adapters count lora_alpha / lora_rank times."""
    intermediate: NonNegative = 0
    """P: outputs of a linear layer between the representation and the classifier; 0: none. Large
    (4096) it gives few labels with a long tail more to choose from; small, under a dense head, it
    is the bottleneck: P = 1.5 * fan_in costs a label the bytes of a sparse one."""
    activation: Literal["none", "relu", "gelu"] = "none"
    """After the intermediate layer."""


@dataclass(frozen=True, config=_STRICT)
class HeadConfig:
    """The classifier."""

    kind: Literal["sparse", "dense"] = "sparse"
    """sparse: fixed fan-in; dense: every label reads every feature (the baseline)."""
    fan_in: Positive = 64
    """F: features that each label reads."""
    group_size: Positive = 1
    """G: neighbouring labels that share one set of features; silent rows fill the last group."""
    pattern: Annotated[str, Field(pattern=r"^([1-9][0-9]?:(4|8|16|32))?$")] = ""
    """n:m, such as 2:16: each label reads n of every m neighbouring features, and stores which in
    log2(m) bits a feature; fan_in is n * D / m. Empty: any features."""
    weight_dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    """How weights are stored; below float32 they are rounded stochastically, without a float32
    copy. float8 (sparse only, with a scale per label) is experimental."""
    loss: Literal["bce", "squared_hinge"] = "bce"
    """Summed over labels, mean over examples."""
    bag_fan_in: NonNegative = 0
    """Features of the bag itself that each label reads besides fan_in of the representation, those
    that weigh most in its training texts; sparse heads over bags only. Rare labels gain most, for
    which the representation holds little. 0: none."""
    bag_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """What these features, as bags of length one, are multiplied with; with AdamW that multiplies
    how fast their part of a score is learned."""
    bag_init: Rate = 15.0
    """Score that these features alone give at the start to a text like all of a label's texts."""
    bias_init: Literal["zero", "log_prior"] = "log_prior"
    """log_prior: logit of the label's frequency, so that training starts at the base rate."""
    order: Literal["none", "random", "frequency", "cluster"] = "none"
    """Order of the labels inside the classifier, which decides who shares features where group_size
    is above 1. cluster: labels of similar training texts side by side, published as better than
    random for Amazon-670K. Compare: on EURLEX57K (4 epochs, groups of 16) it cost 0.8 of P@5
    against random. Predictions and files go by label ids all the same."""
    dense_share: OpenShare = 0.0
    """Share of the labels, the most frequent, that read every feature (2 to 10% are published);
    the others stay sparse, in the order above."""
    dense_lr_scale: Rate = 1.0
    """Learning rate of these dense rows, as a multiple of classifier_optimizer.lr."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """e: a positive counts (1 - e) * loss(positive) + e * loss(negative), which for bce is a target
    of 1 - e. Negatives stay 0, so that nothing dense is added."""
    positive_weight: Literal["none", "propensity"] = "none"
    """propensity: a positive of label l counts 1 / p_l, so that rare labels count more (Jain et
    al., KDD 2016); p_l by the training rows."""
    propensity: Literal["default", "amazon", "wikipedia"] = "default"
    """Constants a and b of the propensities, by kind of data."""
    propensity_a: Rate = 0.0
    """a and b in numbers, both above 0; 0: those of head.propensity."""
    propensity_b: Rate = 0.0
    """See propensity_a."""

    def __post_init__(self) -> None:
        sparse_only = {
            "pattern": self.pattern,
            "weight_dtype": self.weight_dtype == "float8",
            "order": self.order != "none",
            "dense_share": self.dense_share,
            "bag_fan_in": self.bag_fan_in,
        }
        for name, wanted in sparse_only.items():
            if wanted and self.kind != "sparse":
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} needs kind = 'sparse', got {self.kind!r}"
                )
        if self.bag_fan_in:
            plain = {"group_size": 1, "pattern": "", "order": "none", "dense_share": 0.0}
            for name, value in plain.items():
                if (got := getattr(self, name)) != value:
                    raise ValueError(
                        f"bag_fan_in: expected {name} = {value!r} beside it, got {got!r}"
                    )
            if self.weight_dtype == "float8":
                raise ValueError('bag_fan_in: expected weights of 16 bits or more, got "float8"')
        if (self.propensity_a > 0) != (self.propensity_b > 0):
            raise ValueError(
                "expected both propensity_a and propensity_b above 0, or neither, "
                f"got {self.propensity_a} and {self.propensity_b}"
            )


@dataclass(frozen=True, config=_STRICT)
class RewireConfig:
    """Evolution of the sparse pattern.

    The defaults are gentle on purpose: in short trainings on EURLEX57K (6 epochs), 30% every 100
    steps cost 0.6 to 0.8 points of P@1 against the static pattern. Compare with static.
    """

    method: Literal["static", "set", "rigl"] = "static"
    """static: the pattern drawn at the start stays; set: prune the smallest, regrow at random;
    rigl: prune the smallest, regrow where the gradient is largest."""
    prune: Literal["fraction", "threshold"] = "fraction"
    """fraction: the same number of slots of every label; threshold: all weights below it."""
    fraction: OpenShare = 0.15
    """Share of each label's slots replaced by one rewiring, before annealing. The default is the
    setting published for LF-AmazonTitles-131K, half of what cost accuracy in the trial."""
    threshold: Rate = 0.01
    """Weights of smaller magnitude are replaced (prune = "threshold"), before annealing; published
    settings are 0.01 to 0.05."""
    anneal: Literal["cosine", "constant"] = "cosine"
    """cosine: fraction falls to 0, threshold to 1e-4, at the end of rewiring, so that late inputs
    have time to learn; constant: they stay."""
    interval: Positive = 300
    """Optimizer steps between two rewirings: a new input needs time to outgrow an old one. The
    default is the shortest of the published settings (300 to 1500)."""
    end: Share = 0.66
    """Share of training after which the pattern stays."""
    init: Literal["zero", "uniform"] = "zero"
    """Weight of a new input. zero: the scores do not jump; uniform: U(-1/sqrt F, 1/sqrt F)."""
    moments: Literal["reset", "keep"] = "reset"
    """Optimizer state of a replaced slot. reset: zero; keep: what the old input left, which pushes
    the new weight in the old one's direction."""


@dataclass(frozen=True, config=_STRICT)
class AuxiliaryConfig:
    """A second objective for the first epochs, so that more gradient reaches the encoder."""

    kind: Literal["none", "clusters"] = "none"
    """clusters: a dense head tells which clusters of labels hold a positive; never part of the
    trained model."""
    scale: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """s in the loss (1 - s) * classifier + s * auxiliary at the first step; cosine to 0."""
    cutoff_epochs: Positive = 10
    """Epochs after which s is 0 and the head is dropped; may be more than train.epochs."""
    max_labels: Positive = 100
    """Most labels of a cluster; there are 2^n clusters of equal size."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean: over examples and clusters; sum: over clusters, mean over examples, as the classifier.
    Beside a classifier's sum, a mean reaches the encoder weakly (1/500 of the gradient with 64
    clusters on EURLEX57K): compare the reps_grad_norms in the log."""
    lr: Rate = 5e-4
    """Learning rate of the head's AdamW after warm-up; same schedule as the others."""


@dataclass(frozen=True, config=_STRICT)
class ContrastiveConfig:
    """A dual encoder (train.objective = "contrastive"): a document is to find its labels' texts.

    The texts of a batch's documents and labels become vectors of length one; each document's own
    labels are told from all others of the batch by a softmax over cosines.
    """

    encoders: Literal["tied", "separate"] = "tied"
    """tied: documents and label texts share one encoder; separate: two that start alike."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """Cosines are divided by it; its value at the start."""
    temperature_lr: Rate = 1e-3
    """Learning rate of the logarithm of the temperature, same schedule as the others; 0: fixed."""
    min_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    """The temperature learned stays at this or above; the default is CLIP's."""
    symmetric: bool = False
    """The mean with the loss of the labels, each of which is to find its documents."""
    decoupled: bool = False
    """Leave a document's own labels out of the denominator of its softmax (arXiv 2110.06848)."""
    chunk: NonNegative = 0
    """Texts per encoder pass: the gradient of the whole batch is cached, so that the memory of
    activations does not grow with train.batch_size, for one more forward pass. 0: all at once."""
    search: Literal["exact", "ann"] = "exact"
    """How the nearest labels are found, in mining and in prediction. exact: by tiles of labels;
    ann: approximately, by faiss (xmc-toolkit[ann]), which pays beyond some hundred thousand."""


@dataclass(frozen=True, config=_STRICT)
class NegativesConfig:
    """Hard negatives of a dual encoder: wrong labels that lie near a document."""

    per_document: NonNegative = 0
    """Mined labels that each document of a batch adds to the keys of all; 0: the labels of the
    batch's other documents are the only negatives."""
    every: Positive = 1
    """Epochs between two minings."""
    start: NonNegative = 1
    """Epochs before the first mining: an encoder that has learned nothing finds nothing hard."""
    pool: Positive = 20
    """Nearest wrong labels that are kept of each document, of which per_document are drawn anew in
    each epoch."""
    skip: NonNegative = 0
    """The nearest labels that are left out, because they may be right and only not marked so."""

    def __post_init__(self) -> None:
        if self.per_document > self.pool:
            raise ValueError(
                f"expected per_document of at most pool = {self.pool}, got {self.per_document}"
            )


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """One optimizer and its peak learning rate."""

    kind: Literal["sgd", "momentum", "adamw", "adagrad"] = "adamw"
    """The update rule; the encoder takes adamw only."""
    lr: Rate = 1e-2
    """Learning rate after warm-up."""
    weight_decay: Rate = 0.0
    """Decoupled (AdamW) decay; never on biases or norms."""
    momentum: OpenShare = 0.9
    """Used by momentum only."""
    betas: tuple[OpenShare, OpenShare] = (0.9, 0.999)
    """Used by adamw only."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """Used by adamw and adagrad."""
    moments: Literal["float32", "float8"] = "float32"
    """Of the classifier_optimizer, kinds adamw and momentum: how it remembers each weight. float8
    (experimental): a byte a number, rounded stochastically, so that adamw takes 2 bytes a weight
    instead of 8. A CPU's step is then the slow one in plain torch."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of a transformer's encoder_optimizer only: each layer below the last learns at this share of
    the rate of the layer above it, the embeddings last. 1: all alike."""
    offload: bool = False
    """Of a transformer's encoder_optimizer only: keep its moments in the memory of the CPU. A step
    copies them to the GPU and back, a part at a time; 8 bytes a weight less there."""

    def __post_init__(self) -> None:
        if self.moments == "float8" and self.kind not in ("adamw", "momentum"):
            raise ValueError(
                f"moments = 'float8' needs kind = 'adamw' or 'momentum', got {self.kind!r}"
            )


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """Steps, schedules and the validation split."""

    objective: Literal["classification", "contrastive"] = "classification"
    """classification: encoder and classifier; contrastive: a dual encoder of documents and label
    texts, which has no classifier (sections contrastive and negatives)."""
    epochs: Positive = 10
    """Passes over the training rows."""
    batch_size: Positive = 128
    """Examples per encoder pass."""
    accumulation: Positive = 1
    """Encoder passes per optimizer step; the batch of a step is batch_size * accumulation."""
    max_tokens: NonNegative = 0
    """Tokens per encoder pass, padding included: a pass takes as many rows of the step as fit,
    however many passes that makes; the batch of a step stays. 0: batch_size rows a pass."""
    micro_batch: NonNegative = 0
    """Rows per encoder pass where that is less than batch_size, the last pass of a step ragged; the
    batch of a step stays, and so does its gradient. 0: batch_size rows a pass."""
    memory_limit: str = ""
    """Memory of the training process, such as 2GB, or of the GPU (auto: what it has): encoder
    passes get as many rows of the step as fit, by measurement (bags: all of them, as a rule, or the
    training says that they do not fit). Met within some percent. Empty: batch_size rows a pass."""
    length_pool: NonNegative = 0
    """Optimizer steps whose rows are sorted by length together, so that a transformer's batches
    need little padding; the steps of a pool are shuffled. 0: rows of a step are drawn at random."""
    warmup_steps: NonNegative = 200
    """Optimizer steps of linear warm-up, before the decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of both learning rates to 0 over the rest of training."""
    validation: OpenShare = 0.1
    """Share of the training rows held out for model selection where the data has no val split."""
    select_by: Literal["P@1", "P@3", "P@5", "R@10", "R@100"] = "P@5"
    """The validation metric that chooses the best epoch; R@10 and R@100 for a dual encoder only."""
    patience: NonNegative = 0
    """Stop after this many epochs without improvement; 0 trains all epochs."""
    clip_norm: Rate = 0.0
    """Largest norm of the encoder gradient; 0 leaves it alone."""
    checkpoint_every: Positive = 1000
    """Optimizer steps between checkpoints; one is also written after every epoch."""
    eval_batch_size: Positive = 512
    """Examples scored at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks (torchrun) hold a transformer. ddp: each has all of it; fsdp: each has a
    part of its weights and moments, gathered layer by layer. Of a classifier each always has a part
    of the labels."""
    async_checkpoint: bool = False
    """Go on training while a checkpoint is written, from a copy in host memory."""
    label_embeddings: str = ""
    """Run or model of a dual encoder of the same labels. Where labels are clustered (auxiliary.kind
    and head.order), it is by its embeddings of their texts instead of by their training rows."""
    label_texts: bool = False
    """Train on the text of each label too, as a row of that label. Such rows count in no frequency,
    propensity or validation."""
    seed: NonNegative = 42
    """Decides weights, patterns, dropout, validation rows and the order of examples."""

    def __post_init__(self) -> None:
        given = [n for n in ("micro_batch", "memory_limit", "max_tokens") if getattr(self, n)]
        if len(given) > 1:
            names = " and ".join(given)
            raise ValueError(f"expected one of {names}: each says how large a pass is")
        if not _MEMORY.fullmatch(self.memory_limit):
            raise ValueError(
                f'memory_limit: expected a size such as 2GB or 512MiB, got "{self.memory_limit}"'
            )


@dataclass(frozen=True, config=_STRICT)
class Config:
    """Everything a run depends on, besides the data."""

    features: FeatureConfig = field(default_factory=FeatureConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    rewire: RewireConfig = field(default_factory=RewireConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    encoder_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-3))
    classifier_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.encoder.kind == "transformer" and not self.encoder.model:
            raise ValueError("encoder.model: a transformer encoder needs a folder or hub name")
        wanted = "bag" if self.encoder.kind == "bag" else "tokens"
        if self.features.kind != wanted:
            raise ValueError(
                f'features.kind: a {self.encoder.kind} encoder reads "{wanted}", '
                f'got "{self.features.kind}"'
            )
        if self.encoder.kind == "bag":
            for key, default in _TRANSFORMER_ONLY.items():
                if (value := getattr(self.encoder, key)) != default:
                    raise ValueError(f"encoder.{key}: a bag encoder has no layers, got {value}")
            if self.train.data_parallel != "ddp":
                raise ValueError(
                    "train.data_parallel: a bag encoder is whole on every rank, expected "
                    f'"ddp", got "{self.train.data_parallel}"'
                )
            for key in ("max_tokens", "length_pool"):
                if value := getattr(self.train, key):
                    raise ValueError(f"train.{key}: a bag encoder pads nothing, got {value}")
        if 0 < self.train.max_tokens < self.features.max_length:
            raise ValueError(
                f"train.max_tokens: expected at least features.max_length = "
                f"{self.features.max_length}, got {self.train.max_tokens}"
            )
        if self.train.data_parallel == "fsdp":
            _check_fully_sharded(self)
        if self.encoder.activation != "none" and not self.encoder.intermediate:
            raise ValueError(
                f'encoder.activation: "{self.encoder.activation}" needs encoder.intermediate, got 0'
            )
        name, width = "dim", self.encoder.dim
        if self.encoder.intermediate:
            name, width = "intermediate", self.encoder.intermediate
        elif self.encoder.kind == "transformer":
            width = self.head.fan_in  # its hidden size is not known here
        if self.head.bag_fan_in:
            if self.features.kind != "bag":
                raise ValueError(
                    f'head.bag_fan_in: needs features.kind = "bag", got "{self.features.kind}"'
                )
            if self.rewire.method != "static":
                raise ValueError(
                    "head.bag_fan_in: the features of the bag stay as chosen, expected "
                    f'rewire.method = "static", got "{self.rewire.method}"'
                )
        contrastive = self.train.objective == "contrastive"
        if self.head.kind == "sparse" and self.head.fan_in > width and not contrastive:
            raise ValueError(
                f"head.fan_in: expected at most encoder.{name} = {width}, got {self.head.fan_in}"
            )
        if self.rewire.method != "static" and self.head.kind == "dense":
            raise ValueError(
                f'rewire.method: a dense head has no pattern to rewire, got "{self.rewire.method}"'
            )
        for name in ("encoder_optimizer", "classifier_optimizer"):
            decay = getattr(self, name).layer_decay
            layered = name == "encoder_optimizer" and self.encoder.kind == "transformer"
            if decay != 1 and not layered:
                raise ValueError(
                    f"{name}.layer_decay: expected 1, as only a transformer has layers, got {decay}"
                )
            if getattr(self, name).offload and not layered:
                raise ValueError(
                    f"{name}.offload: expected false, as only a transformer's moments can be "
                    "offloaded, got true"
                )
        if self.encoder_optimizer.kind != "adamw":
            raise ValueError(
                'encoder_optimizer.kind: the encoder is trained by "adamw", '
                f'got "{self.encoder_optimizer.kind}"'
            )
        if self.encoder_optimizer.moments != "float32":
            raise ValueError(
                'encoder_optimizer.moments: the encoder remembers in "float32", '
                f'got "{self.encoder_optimizer.moments}"'
            )
        if contrastive:
            _check_contrastive(self)
        else:
            _check_classification(self)
        clustered = self.auxiliary.kind != "none" or self.head.order == "cluster"
        if self.train.label_embeddings and not clustered:
            raise ValueError(
                "train.label_embeddings: expected labels to be clustered by them "
                "(auxiliary.kind or head.order), got neither"
            )


def _check_fully_sharded(config: Config) -> None:
    """What a transformer whose weights are in parts does not know."""
    for key, plain in {"lora_rank": 0, "compile": False}.items():
        if (value := getattr(config.encoder, key)) != plain:
            raise ValueError(
                f'encoder.{key}: expected {plain!r} with data_parallel = "fsdp", got {value!r}'
            )
    if config.encoder_optimizer.offload:
        raise ValueError(
            'encoder_optimizer.offload: expected false with data_parallel = "fsdp", got true'
        )
    if config.encoder.autocast == "float16":
        raise ValueError(
            'encoder.autocast: expected "bfloat16" or "none" with data_parallel = "fsdp", '
            'got "float16"'
        )


def _check_contrastive(config: Config) -> None:
    """A dual encoder has no classifier: options of one would do nothing."""
    default = Config()
    for section in ("head", "rewire", "auxiliary", "classifier_optimizer"):
        options, plain = getattr(config, section), getattr(default, section)
        for key in (option.name for option in dataclasses.fields(options)):
            if (value := getattr(options, key)) != getattr(plain, key):
                raise ValueError(
                    f"{section}.{key}: a dual encoder has no classifier, got {value!r}"
                )
    for key, value in {
        "accumulation": 1,
        "max_tokens": 0,
        "micro_batch": 0,
        "memory_limit": "",
    }.items():
        if (given := getattr(config.train, key)) != value:
            raise ValueError(
                f"train.{key}: a dual encoder's batch is one step (contrastive.chunk cuts it for "
                f"the encoder), expected {value!r}, got {given!r}"
            )
    if config.train.length_pool:
        raise ValueError(
            "train.length_pool: the documents of a batch are each other's negatives and are drawn "
            f"at random, expected 0, got {config.train.length_pool}"
        )
    if config.train.label_texts:
        raise ValueError("train.label_texts: a dual encoder reads label texts as keys, got true")
    if config.encoder.autocast == "float16":
        raise ValueError('encoder.autocast: a dual encoder takes "bfloat16" or "none"')
    least, start = config.contrastive.min_temperature, config.contrastive.temperature
    if start < least:
        raise ValueError(
            f"contrastive.temperature: expected at least min_temperature = {least}, got {start}"
        )


def _check_classification(config: Config) -> None:
    plain = {"contrastive": ContrastiveConfig(), "negatives": NegativesConfig()}
    for section, options in plain.items():
        if getattr(config, section) != options:
            raise ValueError(
                f'{section}: these options need train.objective = "contrastive", '
                f'got "{config.train.objective}"'
            )
    if config.train.select_by in ("R@10", "R@100"):
        raise ValueError(
            f'train.select_by: "{config.train.select_by}" needs train.objective = "contrastive", '
            f'got "{config.train.objective}"'
        )


_TRANSFORMER_ONLY = {"checkpointing": False, "compile": False, "freeze_layers": -1, "lora_rank": 0}
_ADAPTER = TypeAdapter(Config)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, ready for JSON; `from_dict` reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(values: dict[str, Any], *, source: str) -> Config:
    """Validate nested values; `source` names them in an error."""
    _check_plain(values, source)
    try:
        # JSON mode reads the list of a TOML array as the tuple it stands for, all else strictly.
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe, by path or by the name of a shipped one, and apply `a.b=value` overrides.

    Raises ConfigError naming the file and the key, FileNotFoundError-free: a missing recipe is a
    ConfigError that lists the shipped names.
    """
    path = _find(recipe)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    source = str(path)
    overrides = list(overrides)
    for override in overrides:
        _apply(values, override)
    if overrides:
        source += " with --set"
    return from_dict(values, source=source)


def shipped_recipes() -> list[str]:
    folder = resources.files("xmc.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def describe_options(config: Config | None = None) -> list[tuple[str, Any, str]]:
    """(section.key, value, meaning) of every option, in order."""
    rows = []
    for section, options in to_dict(config or Config()).items():
        fields = TypeAdapter(type(getattr(Config(), section))).json_schema()["properties"]
        for key, value in options.items():
            meaning = " ".join(fields[key].get("description", "").split())
            rows.append((f"{section}.{key}", value, meaning))
    return rows


def _find(recipe: str | Path) -> Path:
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in shipped_recipes():
        return Path(str(resources.files("xmc.recipes") / f"{recipe}.toml"))
    raise ConfigError(
        f"{recipe}: no such recipe file, nor a shipped recipe ({', '.join(shipped_recipes())})"
    )


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected section.key=value")
    value: object = text.strip()  # a bare word is a string: --set head.kind=dense
    if "\n" not in text:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            value = tomllib.loads(f"value = {text}")["value"]
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {part} is not a section")
    section[parts[-1]] = value


def _check_plain(value: object, source: str, name: str = "") -> None:
    """Refuse what TOML has and JSON lacks (dates), with the name of its key."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(entry, source, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for entry in value:
            _check_plain(entry, source, name)
    elif not isinstance(value, str | int | float):
        raise ConfigError(
            f"{source}: {name}: expected a number, string, list or table, got {value!r}"
        )


def _explain(error: ValidationError) -> str:
    """One line for the first problem, with the known keys where a key is unknown."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "unexpected_keyword_argument":
        known = _keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{name}: unknown key (known: {', '.join(known)}){hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    message = message[0].lower() + message[1:]
    return f"{name}: {message}, got {problem['input']!r}"


def _keys(sections: list[str]) -> list[str]:
    current: Any = Config()
    for section in sections:
        current = getattr(current, section)
    return [option.name for option in dataclasses.fields(current)]
