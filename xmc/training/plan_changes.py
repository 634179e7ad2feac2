"""What to change in a recipe that does not fit a memory, and what would fit beside one that does.

Every proposal is tried: the peak beside it is that of the changed recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xmc.config import Config
from xmc.training.memory_model import Sizes, make_sizes, on_device, total, training_phases

_MIN_FAN_IN = 16  # below, published accuracies fall off
_MAX_BATCH = 4096  # rows of a pass; larger ones are for the user to ask for
_WORTH = 0.03  # share of the peak that a change must save to be proposed before costlier ones


@dataclass(frozen=True)
class Change:
    """A setting that saves memory, and the peak once it and all before it are made."""

    settings: tuple[str, ...]  # section.key=value
    peak: int
    why: str


def training_peak(sizes: Sizes) -> int:
    """Bytes of the largest phase, in the memory that decides."""
    phases = training_phases(sizes)
    return max(total(on_device(parts, sizes.device)) for parts in phases.values())


def find_changes(sizes: Sizes, memory: int) -> Iterator[Change]:
    """One after another, the first that is worth it, by what changes cost in accuracy or time."""
    peak = training_peak(sizes)
    while peak > memory:
        tried = [(change, other, training_peak(other)) for change, other in _savings(sizes)]
        # Halves of a batch save less and less, and what saves nothing is no change at all.
        worth = [entry for entry in tried if entry[2] <= (1 - _WORTH) * peak]
        fitting = [entry for entry in tried if entry[2] <= memory]
        if not (worth or fitting):
            return
        (settings, why), sizes, peak = (worth or fitting)[0]
        yield Change(settings, peak, why)


def _savings(sizes: Sizes) -> Iterator[tuple[tuple[tuple[str, ...], str], Sizes]]:
    """Valid changes of a recipe, what costs nothing first."""
    for settings, why in _candidates(sizes):
        try:
            config = with_settings(sizes.config, settings)
            changed = _changed(sizes, config)
        except ValueError:
            continue  # does not go together with the rest of the recipe
        yield (tuple(f"{key}={_toml(value)}" for key, value in settings.items()), why), changed


def _candidates(sizes: Sizes) -> Iterator[tuple[dict[str, Any], str]]:
    config = sizes.config
    train, head, encoder = config.train, config.head, config.encoder
    if encoder.kind == "transformer" and not encoder.checkpointing:
        yield {"encoder.checkpointing": True}, "the same result, a third more time in the encoder"
    if sizes.ranks.size > 1 and encoder.kind == "transformer" and train.data_parallel == "ddp":
        why = "the encoder in parts, gathered layer by layer"
        yield {"train.data_parallel": "fsdp"}, why
    most = min(_MAX_BATCH, sizes.workload.num_rows)
    if train.batch_size % 2 == 0 and not train.max_tokens:
        parts = 2
        while train.batch_size // parts > most and train.batch_size % (2 * parts) == 0:
            parts *= 2
        smaller = {
            "train.batch_size": train.batch_size // parts,
            "train.accumulation": train.accumulation * parts,
        }
        yield smaller, "the same step in smaller passes"
    if train.eval_batch_size > 32:
        yield {"train.eval_batch_size": train.eval_batch_size // 2}, "the same result"
    rows_per_step = train.batch_size * train.accumulation
    if train.accumulation > 1 and rows_per_step <= most and not train.max_tokens:
        whole = {"train.batch_size": rows_per_step, "train.accumulation": 1}
        yield whole, "the same step in one pass, without a gradient of the classifier"
    if encoder.kind == "transformer" and encoder.autocast == "none":
        yield {"encoder.autocast": "bfloat16"}, "half of the activations"
    if head.weight_dtype == "float32":
        yield {"head.weight_dtype": "bfloat16"}, "rounded stochastically, no float32 copy"
    rule = config.classifier_optimizer
    # On the CPU a step would leave the compiled kernels, which takes many times as long.
    keeps_kernels = sizes.cuda or not sizes.classifier.fused
    if rule.kind in ("adamw", "momentum") and rule.moments == "float32" and keeps_kernels:
        why = "a byte a moment and the same learning rate; experimental"
        yield {"classifier_optimizer.moments": "float8"}, why
    if rule.kind != "sgd":
        plain = {"classifier_optimizer.kind": "sgd"}
        if rule.moments != "float32":  # which sgd would refuse
            plain = {"classifier_optimizer.moments": "float32", **plain}
        yield plain, "no moments; wants another learning rate"
    if head.kind == "dense" and config.head.fan_in <= sizes.encoder.head_features // 2:
        yield {"head.kind": "sparse"}, f"each label reads {head.fan_in} features"
    if head.kind == "sparse" and head.group_size == 1:
        yield {"head.group_size": 16}, "16 labels share their features"
    if head.kind == "sparse" and not head.pattern and head.fan_in >= 2 * _MIN_FAN_IN:
        yield {"head.fan_in": head.fan_in // 2}, "fewer features a label"
    if head.bag_fan_in >= 2:
        yield {"head.bag_fan_in": head.bag_fan_in // 2}, "fewer features of the bag a label"
    if encoder.kind == "bag" and encoder.dim >= 2 * max(64, head.fan_in):
        yield {"encoder.dim": encoder.dim // 2}, "a smaller table"


def find_room(sizes: Sizes, memory: int) -> dict[str, int]:
    """The largest doublings of the batch of a pass and of the fan-in that still fit."""
    found = {}
    passes = sizes.config.train.accumulation
    for key, most in (
        ("train.batch_size", min(_MAX_BATCH, sizes.workload.num_rows // passes)),
        ("head.fan_in", sizes.encoder.head_features // 2),
    ):
        section, name = key.split(".")
        value = start = getattr(getattr(sizes.config, section), name)
        if name == "fan_in" and (sizes.config.head.kind == "dense" or sizes.config.head.pattern):
            continue
        if name == "batch_size" and sizes.config.train.max_tokens:
            continue
        while 2 * value <= most and _fits(sizes, {key: 2 * value}, memory):
            value *= 2
        if value > start:
            found[key] = value
    return found


def _fits(sizes: Sizes, settings: dict[str, Any], memory: int) -> bool:
    try:
        config = with_settings(sizes.config, settings)
        return training_peak(_changed(sizes, config)) <= memory
    except ValueError:
        return False


def _changed(sizes: Sizes, config: Config) -> Sizes:
    """The same data, device and number of ranks."""
    return make_sizes(config, sizes.workload, sizes.device, world_size=sizes.ranks.size)


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The recipe with "section.key" values replaced. Raises ValueError where they cannot be."""
    for key, value in settings.items():
        section, name = key.split(".")
        options = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: options})
    return config


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
