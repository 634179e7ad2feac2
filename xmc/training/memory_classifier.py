"""Memory of the classifier: weights, indices, moments, and what a step holds for a while."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xmc.config import Config
from xmc.distributed.collectives import World
from xmc.heads.arranged import ArrangedHead
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.heads.order import is_arranged
from xmc.nn.clusters import num_clusters_for
from xmc.nn.fan_in import FixedFanInLinear
from xmc.training.memory_component import MIB, Component
from xmc.training.scale_ranks import ALONE, Ranks
from xmc.training.workload import Workload
from xmc_kernels.checks import compiled_on_cpu
from xmc_kernels.layer import Layer

_TILE = 4 * MIB  # bytes of a tile of the reference: 2^20 numbers, `_reference/fan_in.py`
_STEP_TILES = 6  # dense weights and gradient, the update's copies; scores, targets, noise
_TOPK_TILES = 8  # dense weights and their inputs (64 bits); scores and their keys (64 bits)
_SHARE = 100_000  # bytes of a thread's buffers, `kernels/README.md`
_REWIRED = 2**18  # weights rewired at a time, `xmc.nn.rewire`
_REWIRE_BYTES = 128  # each; measured
_GPU_BLOCKS = 64 * MIB  # `_triton/tiles.py`, SCRATCH_BYTES
_LABEL_TERMS = 1000  # `xmc.data.label_features`
_CLUSTER_CHUNK = 2**22  # features gathered at a time, there
_CLUSTER_BYTES = 50  # each
_DRAWN = 2**22  # inputs drawn at a time, `xmc.nn.pattern`
_DRAWN_BYTES = 16  # each, which the C library keeps until the first step; measured
_CHOSEN = 2**22  # inputs at a time, `xmc.heads.bag`
_CHOSEN_BYTES = 80  # of each feature of a label then, old or chosen; measured
_MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2, "adagrad": 1}  # of each weight


@dataclass(frozen=True)
class Classifier:
    """Bytes of a classifier head on a rank, counted on the head itself without its numbers."""

    num_labels: int  # of this rank
    in_features: int  # D
    bag_features: int  # V, where labels read features of bags too, else 0
    fan_in: int  # of both kinds
    bag_fan_in: int
    sparse: bool
    weights: int
    indices: int
    rest: int  # biases, scales, orders
    orders: int  # of these, which label is in which row, and back: of all ranks' labels
    moments: int
    local_index: int  # of a head that reads bags, once it is in use
    num_weights: int
    compiled: bool  # whether the CPU's kernels take every layer
    fused: bool  # whether its training step, too, takes them: not with float8 moments
    storage: str  # in words
    memory: str  # what an optimizer remembers, in words

    @property
    def stored(self) -> int:
        """Bytes of a model's file."""
        return self.weights + self.indices + self.rest

    @property
    def trained(self) -> int:
        """Bytes that stay throughout a training."""
        return self.stored + self.moments + self.local_index


def make_classifier(
    config: Config,
    in_features: int,
    num_labels: int,  # on all ranks
    num_bag_features: int,
    world_size: int = 1,
) -> Classifier:
    """Count a head of the recipe, that of rank 0, which has the most labels.

    Raises ValueError for sizes that do not fit and for fewer groups of labels than ranks.
    """
    options, world = config.head, World(0, world_size)
    make = ArrangedHead if is_arranged(num_labels, options) else ClassifierHead
    others = (num_labels, options, config.classifier_optimizer)
    head: nn.Module
    with torch.device("meta"):
        if options.bag_fan_in:
            head = BagClassifierHead.from_options(
                in_features, num_bag_features, *others, world=world
            )
        else:
            head = make.from_config(in_features, *others, world=world)
        x = torch.empty(1, in_features)
    sizes = {"weight": 0, "index_bytes": 0}
    rest = num_weights = 0
    for name, tensor in [*head.named_parameters(), *head.named_buffers()]:
        kind = name.rpartition(".")[2]
        if kind in sizes:
            sizes[kind] += _bytes(tensor)
        else:
            rest += _bytes(tensor)
        num_weights += tensor.numel() if kind == "weight" else 0
    layers = [m for m in head.modules() if isinstance(m, FixedFanInLinear | nn.Linear)]
    own = min(num_labels, sum(layer.out_features for layer in layers))  # phantom rows are none
    # Made later: what a positive counts, and the row of each label.
    orders = 2 * 4 * num_labels * (make is ArrangedHead)
    rest += 4 * own * (options.positive_weight != "none") + orders // 2
    words = options.bag_fan_in
    reads = options.fan_in + words if options.kind == "sparse" else in_features
    storage = f"{num_weights:,} {options.weight_dtype} numbers, {reads} a label"
    optimizer = config.classifier_optimizer
    compiled = all(compiled_on_cpu(x, _layer(layer)) for layer in layers)
    return Classifier(
        num_labels=own,
        in_features=in_features,
        bag_features=num_bag_features if words else 0,
        fan_in=reads,
        bag_fan_in=words,
        sparse=options.kind == "sparse",
        weights=sizes["weight"],
        indices=sizes["index_bytes"],
        rest=rest,
        orders=orders,
        moments=sum(_bytes(tensor) for tensor in head.training_state().values()),
        local_index=4 * own * reads if words else 0,
        num_weights=num_weights,
        compiled=compiled,
        fused=compiled and optimizer.moments == "float32",
        storage=storage,
        memory=f"{_MOMENTS[optimizer.kind]} {optimizer.moments} numbers a weight",
    )


def stored_weights(classifier: Classifier) -> list[Component]:
    per_row = f"{classifier.indices / classifier.num_labels:.4g} bytes a label"
    return [
        Component("classifier weights", classifier.weights, classifier.storage),
        Component("classifier indices", classifier.indices, f"{per_row}: F / G of them, packed"),
        Component(
            "classifier biases", classifier.rest - classifier.orders, "one a label, with scales"
        ),
        Component("label order", classifier.orders, "label of each row and back, of all labels"),
    ]


def moments(classifier: Classifier) -> list[Component]:
    return [Component("classifier moments", classifier.moments, classifier.memory)]


def accumulated_gradient(classifier: Classifier, passes: int) -> Component:
    """The one gradient of [L, F] that exists, between the passes of a step."""
    size = 4 * (classifier.num_weights + classifier.num_labels) if passes > 1 else 0
    return Component("classifier gradient", size, f"[L, F] float32: a step has {passes} passes")


def read_columns(classifier: Classifier, workload: Workload, rows: int) -> int:
    """D, and where labels read bags a column for each feature that these rows can have."""
    if not classifier.bag_fan_in:
        return classifier.in_features
    active = min(classifier.bag_features, round(rows * workload.row_entries))
    return max(classifier.in_features + active + 1, classifier.fan_in)


def read_bags(classifier: Classifier, workload: Workload, rows: int) -> list[Component]:
    """What a head that reads bags holds beside its layer, in training and prediction."""
    if not classifier.bag_fan_in:
        return []
    columns = read_columns(classifier, workload, rows)
    # An index of 16 bits is translated by way of a copy of 32.
    wide = classifier.local_index * (classifier.indices < classifier.local_index)
    wide += 4 * (classifier.in_features + classifier.bag_features)
    return [
        Component("local index", classifier.local_index, "[L, F] int32, columns of the batch"),
        Component("index translation", wide, "inputs as int32 and their columns, for a moment"),
        Component("joined bags", 2 * 4 * rows * columns, "[B, D + A + 1] and their gradients"),
    ]


def training_step(
    classifier: Classifier, workload: Workload, rows: int, *, cuda: bool, threads: int
) -> Component:
    """Beyond weights and moments; nothing here grows with L."""
    features = read_columns(classifier, workload, rows)
    if cuda:
        size = _GPU_BLOCKS + 2 * 4 * features * (rows + 64)
        return Component("classifier step", size, "blocks of labels, x and d_x: a formula")
    if not classifier.fused:
        size = _reference_tiles(classifier, features, rows, _STEP_TILES)
        return Component("classifier step", size, "tiles of labels")
    size = 4 * features * _padded(rows) * (1 + threads) + _SHARE * threads
    return Component("classifier step", size, f"x, and d_x for each of {threads} threads")


def validation_topk(
    classifier: Classifier, workload: Workload, rows: int, threads: int
) -> Component:
    """Scores and labels of the best of each row, for each thread, and x."""
    features = read_columns(classifier, workload, rows)
    size = 4 * features * _padded(rows) + 12 * 16 * rows * threads
    if not classifier.compiled:
        tiles = _TOPK_TILES if classifier.sparse else _TOPK_TILES // 2
        size = _reference_tiles(classifier, features, rows, tiles)
    return Component("top-k", size, f"{rows} rows, no scores of all labels")


def rewiring(classifier: Classifier, config: Config, reps: int) -> Component:
    """SET works on a tile of weights; RigL on tiles of scores and of dense gradients too."""
    at_once = min(_REWIRED, classifier.num_weights)
    why = f"{_REWIRE_BYTES} bytes for each of 2^18 weights at a time"
    extra = 0
    if config.rewire.method == "rigl":
        at_once = min(at_once, _TILE // 4 * classifier.fan_in // classifier.in_features)
        extra = 3 * _TILE + 2 * 4 * reps * classifier.in_features
        why = "tiles of the dense gradient, and all rows of the step"
    return Component("rewiring", _REWIRE_BYTES * at_once + extra, why)


def auxiliary_head(
    config: Config, num_labels: int, in_features: int, ranks: Ranks = ALONE
) -> Component:
    """Dense over clusters, with AdamW's moments; present until its cut-off.

    Clusters are divided over ranks, which label is in which is known to all.
    """
    if config.auxiliary.kind == "none":
        return Component("auxiliary head", 0, "")
    clusters = ranks.share(num_clusters_for(num_labels, config.auxiliary.max_labels))
    numbers = 4 * clusters * (in_features + 1) * 3 + 12 * num_labels
    numbers += 4 * clusters * in_features if _accumulates(config) else 0
    return Component(
        "auxiliary head", numbers, f"{clusters:,} clusters x D with two moments, 12 bytes a label"
    )


def label_clustering(workload: Workload) -> Component:
    """At most: how far the rows of a label repeat their features depends on the data."""
    size = 2 * 8 * _label_entries(workload, _LABEL_TERMS) + _collecting(workload)
    why = "at most: features of each label, twice while they are joined"
    return Component("label features", size, why, host=True)


def drawing_inputs(classifier: Classifier) -> Component:
    """Of a head that reads bags: inputs of both kinds, and these side by side."""
    size = 2 * classifier.local_index + _drawing(classifier)
    return Component("drawn inputs", size, "[L, F] int32, twice while they are joined", host=True)


def choosing_features(classifier: Classifier, workload: Workload) -> Component:
    """Of a head that reads bags: the features that weigh most in the texts of each label."""
    entries = _label_entries(workload, classifier.bag_fan_in)
    old = min(workload.num_labels, _CHOSEN // classifier.fan_in) * classifier.bag_fan_in
    chosen = 8 * entries + _CHOSEN_BYTES * (old + min(old, entries))
    size = max(2 * 8 * entries + _collecting(workload), chosen) + _drawing(classifier)
    why = "at most: features of each label, and tiles of labels that get them"
    return Component("chosen features", size, why, host=True)


def dense_bytes(classifier: Classifier, config: Config, rows: int) -> dict[str, int]:
    """What a dense head would take in training: by our step, and by plain torch (B rows)."""
    optimizer = config.classifier_optimizer
    state = _MOMENTS[optimizer.kind]
    weights = 4 * classifier.num_labels * (classifier.in_features + 1)
    narrow = classifier.num_labels * (classifier.in_features + 4 + 4)  # a bias's, and a scale
    fused = weights + state * (narrow if optimizer.moments == "float8" else weights)
    # Plain torch: a gradient of every weight; scores, targets and their gradient [B, L].
    plain = weights * (2 + state) + 3 * 4 * rows * classifier.num_labels
    return {"fused": fused, "plain": plain}


def _accumulates(config: Config) -> bool:
    train = config.train
    cut = 0 < train.micro_batch < train.batch_size or bool(train.memory_limit)
    return train.accumulation > 1 or train.max_tokens > 0 or cut


def _drawing(classifier: Classifier) -> int:
    return _DRAWN_BYTES * min(_DRAWN, classifier.num_labels * classifier.fan_in)


def _label_entries(workload: Workload, most: int) -> int:
    return min(most * workload.num_labels, _row_entries(workload))


def _collecting(workload: Workload) -> int:
    """Bytes of the sorted positives, and of the rows of some labels while they are summed."""
    summed = min(_CLUSTER_CHUNK, _row_entries(workload))
    return 40 * workload.num_positives + _CLUSTER_BYTES * summed


def _row_entries(workload: Workload) -> int:
    """Features of the rows of all labels."""
    return round(workload.num_positives * workload.row_entries)


def _layer(layer: FixedFanInLinear | nn.Linear) -> Layer:
    if isinstance(layer, FixedFanInLinear):
        return Layer(layer.weight, layer.index, layer.bias, layer.pattern, layer.weight_scale)
    return Layer(layer.weight, None, layer.bias)


def _reference_tiles(classifier: Classifier, features: int, rows: int, tiles: int) -> int:
    everything = 4 * classifier.num_labels * max(rows, features)
    return tiles * min(_TILE, everything)


def _padded(rows: int) -> int:
    return -(-rows // 64) * 64


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
