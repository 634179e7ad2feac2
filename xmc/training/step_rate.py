"""How long a training step takes here: a part of it is run for a moment, and scaled up.

The classifier is the fused step itself, over as many labels as take about a quarter of a second;
its cost is linear in L but for what a step over next to no labels takes. A bag encoder is run
whole. A transformer is counted, 6 operations a weight and token, at the rate of a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmc.config import HeadConfig
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.nn.bag_reps import join_bag
from xmc.nn.encoder import BagEncoder
from xmc.nn.lazy import LazyAdamW
from xmc.training.memory_encoder import passes_of
from xmc.training.memory_model import Sizes
from xmc.types import Bag, BagReps, SparseLabels

_TARGET_SECONDS = 0.25  # of the piece that is timed
_TABLE_ROWS = 50_000  # of a bag's table at most: a step costs the same with more


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of an optimizer step and of an epoch, without validation."""

    encoder: float
    classifier: float
    steps_per_epoch: int

    @property
    def step(self) -> float:
        return self.encoder + self.classifier

    @property
    def epoch(self) -> float:
        return self.step * self.steps_per_epoch


def measure_step(sizes: Sizes) -> StepTime:
    """Time the parts of a step on the CPU, two seconds at most beside loading the kernels."""
    config, workload = sizes.config, sizes.workload
    rows, passes = passes_of(config)
    step_rows = config.train.batch_size * config.train.accumulation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = passes * classifier_seconds(sizes, rows)
        if sizes.encoder.transformer is None:
            encoder = passes * bag_seconds(sizes, rows)
        else:
            encoder = transformer_seconds(sizes, step_rows)
    return StepTime(encoder, classifier, -(-workload.num_rows // step_rows))


def transformer_operations(sizes: Sizes, rows: int) -> float:
    """Floating-point operations of a step: 2 a weight and token forward, twice that backward.

    With gradient checkpointing the forward pass is done twice. Attention adds 4 T H a token and
    layer. Embeddings are looked up, not multiplied.
    """
    shape, length = sizes.encoder.transformer, sizes.workload.row_entries
    assert shape is not None
    weights = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.inner)
    forward = 2 * weights + shape.layers * 4 * length * shape.hidden
    again = 1 if sizes.config.encoder.checkpointing else 0
    return rows * length * forward * (3 + again)


def classifier_seconds(sizes: Sizes, rows: int, num_labels: int | None = None) -> float:
    """Of one pass over all labels, or over as many as these."""
    group = sizes.config.head.group_size
    most = -(-(num_labels or sizes.workload.num_labels) // group) * group  # phantom rows too
    labels = min(most, max(1, 4096 // group) * group)
    while True:
        step = _classifier_step(sizes, labels, rows)
        seconds = _seconds(step, repeats=1)
        if labels == most or seconds > _TARGET_SECONDS / 4:
            break
        wanted = labels * min(16.0, _TARGET_SECONDS / seconds)
        labels = min(most, max(labels + group, int(wanted) // group * group))
    seconds = min(seconds, _seconds(step, repeats=2))
    if labels == most:
        return seconds
    fixed = min(seconds, _seconds(_classifier_step(sizes, group, rows), repeats=2))
    return fixed + (seconds - fixed) * most / labels


def _classifier_step(sizes: Sizes, num_labels: int, rows: int) -> Callable[[], object]:
    config, in_features = sizes.config, sizes.encoder.head_features
    options = (num_labels, config.head, config.classifier_optimizer)
    reps: Any = torch.randn(rows, in_features)
    head: ClassifierHead
    if config.head.bag_fan_in:
        num_features = sizes.workload.num_features
        head = BagClassifierHead.from_options(in_features, num_features, *options)
        reps = _joined(reps, _bag(sizes, rows, num_features), config.head)
    else:
        head = ClassifierHead.from_config(in_features, *options)
    positives = torch.arange(rows, dtype=torch.int32) % num_labels
    labels = SparseLabels(torch.arange(rows + 1), positives, num_labels)
    return lambda: head.loss_and_grad(reps, labels)


def bag_seconds(sizes: Sizes, rows: int, *, update: bool = True) -> float:
    """Of forward, backward and update of a bag encoder, and of joining bags that labels read.

    Without an update of forward and joining alone.
    """
    options = sizes.config.encoder
    table_rows = min(sizes.workload.num_features, _TABLE_ROWS)
    encoder = BagEncoder(table_rows, options.dim, options.dropout)
    optimizer = LazyAdamW(encoder.parameters())
    bag, head = _bag(sizes, rows, table_rows), sizes.config.head

    def step() -> None:
        reps = encoder(bag)
        if head.bag_fan_in:
            reps = _joined(reps, bag, head).values
        if update:
            reps.backward(torch.ones_like(reps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return _seconds(step, repeats=2)


def _bag(sizes: Sizes, rows: int, num_features: int) -> Bag:
    """Random features, as many a row as the data have."""
    entries = max(1, min(round(sizes.workload.row_entries), num_features))
    ids = torch.randint(num_features, (rows * entries,))
    return Bag(ids, torch.arange(rows + 1) * entries, torch.ones(len(ids)))


def _joined(reps: Tensor, bag: Bag, head: HeadConfig) -> BagReps:
    return join_bag(reps, bag, head.bag_scale, least=head.fan_in + head.bag_fan_in)


def transformer_seconds(sizes: Sizes, rows: int) -> float:
    """Counted operations at the rate of a product of the feed-forward layer's shape."""
    shape = sizes.encoder.transformer
    assert shape is not None
    dtype = torch.float32 if sizes.config.encoder.autocast == "none" else torch.bfloat16
    left = torch.randn(512, shape.hidden, dtype=dtype)
    right = torch.randn(shape.hidden, shape.inner, dtype=dtype)
    seconds = _seconds(lambda: left @ right, repeats=3)
    rate = 2 * 512 * shape.hidden * shape.inner / seconds
    return transformer_operations(sizes, rows) / rate


def _seconds(step: Callable[[], object], *, repeats: int) -> float:
    """The fastest of some runs, after one that does not count."""
    step()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - started)
    return best
