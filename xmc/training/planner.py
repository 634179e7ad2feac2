"""Whether a recipe fits into a memory, what takes it, how long a step lasts, what to change.

Nothing of the model's size is allocated: see `memory_model.py` for what is counted and how.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xmc.config import Config, ConfigError, load_recipe
from xmc.training.memory_classifier import dense_bytes
from xmc.training.memory_encoder import passes_of
from xmc.training.memory_model import (
    PYTHON_AND_TORCH,
    Component,
    Device,
    Sizes,
    Workload,
    make_sizes,
    on_device,
    prediction_components,
    total,
    training_phases,
)
from xmc.training.step_rate import StepTime, measure_step
from xmc.training.workload import data_workload, given_workload

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_ROWS, _POSITIVES = 100_000, 5.0  # where only the number of labels is given
_MIN_FAN_IN = 16  # below, published accuracies fall off
_WORTH = 0.03  # share of the peak that a change must save to be proposed before costlier ones


@dataclass(frozen=True)
class Change:
    """A setting that saves memory, and the peak once it and all before it are made."""

    settings: tuple[str, ...]  # section.key=value
    peak: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What was predicted for a recipe."""

    config: Config
    workload: Workload
    device: Device
    memory: int | None
    """Bytes to fit into; None where nobody said and no device could be asked."""
    phases: dict[str, list[Component]]
    """Components of training by phase, those in the machine's memory included."""
    prediction: list[Component]
    bytes_per_label: float
    """Classifier in training: weights, indices, biases, moments."""
    dense: dict[str, int]
    """Bytes of a dense head in training: "fused" (our step), "plain" (torch's modules)."""
    classifier: int
    """Bytes of this head in training, to compare with."""
    time: StepTime | None
    """None where nothing was measured."""
    changes: tuple[Change, ...]
    """What to change, first things first, until it fits; empty where it does."""
    room: dict[str, int]
    """Larger settings that would fit as well, each alone."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most of the memory that decides."""
        return max(self.phases, key=lambda name: total(self.device_part(name)))

    @property
    def peak(self) -> int:
        """Bytes of that phase: of the process on a CPU, of the card on a GPU."""
        return total(self.device_part(self.peak_phase))

    @property
    def peak_above_torch(self) -> int:
        """The peak without what `import torch` takes, as measured peaks are stated here."""
        return self.peak - (PYTHON_AND_TORCH if self.device == "cpu" else 0)

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory

    def device_part(self, phase: str) -> list[Component]:
        return on_device(self.phases[phase], self.device)


def plan_recipe(
    recipe: str | Path | Config,
    *,
    overrides: Iterable[str] = (),
    data: str | Path | None = None,
    num_labels: int | None = None,
    num_features: int | None = None,
    num_rows: int | None = None,
    positives_per_row: float | None = None,
    device: str | None = None,
    memory: str | None = None,
    measure: bool = False,
    cache: str | Path | None = None,
) -> Plan:
    """What `xmc plan` does: sizes from a data folder, or from numbers (100,000 rows of 5 labels).

    Raises ConfigError for an unknown recipe, options that contradict each other or say too little,
    DataError for bad data, and what `make_plan` raises.
    """
    config = recipe if isinstance(recipe, Config) else load_recipe(recipe, overrides)
    place = _device(device or config.train.device)
    size = None if memory is None else parse_memory(memory)
    numbers = {
        "--labels": num_labels,
        "--features": num_features,
        "--rows": num_rows,
        "--positives-per-row": positives_per_row,
    }
    given = [name for name, value in numbers.items() if value is not None]
    if data is not None:
        if given:
            raise ConfigError(f"expected --data or {given[0]}, got both: the data say it")
        workload = data_workload(config, Path(data), None if cache is None else Path(cache))
    else:
        if num_labels is None:
            raise ConfigError("expected --data DIR or --labels L, got neither")
        workload = given_workload(
            config,
            num_labels=num_labels,
            num_features=num_features,
            num_rows=_ROWS if num_rows is None else num_rows,
            positives_per_row=_POSITIVES if positives_per_row is None else positives_per_row,
        )
    return make_plan(config, workload, device=place, memory=size, measure=measure)


def make_plan(
    config: Config,
    workload: Workload,
    *,
    device: Device = "cpu",
    memory: int | None = None,
    measure: bool = False,
) -> Plan:
    """Predict memory, and with `measure` time, of training `config` on `workload`.

    Args:
        memory: bytes to fit into; None asks the device (see `device_memory`).
        measure: run parts of the step for about two seconds; on the CPU only.

    Raises ValueError where sizes do not fit together (a fan-in above D, say) and where a
    transformer has no config.json to count by.
    """
    sizes = make_sizes(config, workload, device)
    memory = device_memory(device) if memory is None else memory
    phases = training_phases(sizes)
    classifier = sizes.classifier
    training = classifier.stored + classifier.moments
    rows, _ = passes_of(config)
    peak = _peak(sizes)
    fits = memory is None or peak <= memory
    return Plan(
        config=config,
        workload=workload,
        device=device,
        memory=memory,
        phases=phases,
        prediction=prediction_components(sizes),
        bytes_per_label=training / workload.num_labels,
        dense=dense_bytes(classifier, config, rows),
        classifier=training,
        time=measure_step(sizes) if measure and device == "cpu" else None,
        changes=() if fits else tuple(_find_changes(sizes, memory or 0)),
        room=_find_room(sizes, memory) if fits and memory is not None else {},
    )


def _device(name: str) -> Device:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return "cpu"
    if name == "cuda":
        return "cuda"  # planned for, whether it is there or not
    raise ConfigError(f'--device: expected auto, cpu or cuda, got "{name}"')


def device_memory(device: Device) -> int | None:
    """Bytes of the machine's memory or of the first GPU's; None without that GPU."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def parse_memory(text: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "500MB". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", text.lower())
    if not match or not float(match[1]):
        raise ConfigError(f'--memory: expected a size such as 24GB or 16GiB, got "{text}"')
    return round(float(match[1]) * _UNITS[match[2]])


def _peak(sizes: Sizes) -> int:
    phases = training_phases(sizes)
    return max(total(on_device(parts, sizes.device)) for parts in phases.values())


def _find_changes(sizes: Sizes, memory: int) -> Iterator[Change]:
    """One after another, the first that is worth it, by what changes cost in accuracy or time."""
    peak = _peak(sizes)
    while peak > memory:
        tried = [(change, other, _peak(other)) for change, other in _savings(sizes)]
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
            changed = make_sizes(config, sizes.workload, sizes.device)
        except ValueError:
            continue  # does not go together with the rest of the recipe
        yield (tuple(f"{key}={_toml(value)}" for key, value in settings.items()), why), changed


def _candidates(sizes: Sizes) -> Iterator[tuple[dict[str, Any], str]]:
    config = sizes.config
    train, head, encoder = config.train, config.head, config.encoder
    if encoder.kind == "transformer" and not encoder.checkpointing:
        yield {"encoder.checkpointing": True}, "the same result, a third more time in the encoder"
    if train.batch_size > 1 and not train.max_tokens:
        halved = {
            "train.batch_size": train.batch_size // 2,
            "train.accumulation": train.accumulation * 2,
        }
        if train.batch_size % 2 == 0:
            yield halved, "the same step in smaller passes"
    if train.eval_batch_size > 32:
        yield {"train.eval_batch_size": train.eval_batch_size // 2}, "the same result"
    if train.accumulation > 1 and not train.max_tokens:
        whole = {
            "train.batch_size": train.batch_size * train.accumulation,
            "train.accumulation": 1,
        }
        yield whole, "the same step in one pass, without a gradient of the classifier"
    if encoder.kind == "transformer" and encoder.autocast == "none":
        yield {"encoder.autocast": "bfloat16"}, "half of the activations"
    if head.weight_dtype == "float32":
        yield {"head.weight_dtype": "bfloat16"}, "rounded stochastically, no float32 copy"
    if config.classifier_optimizer.kind != "sgd":
        yield {"classifier_optimizer.kind": "sgd"}, "no moments; wants another learning rate"
    if head.kind == "dense" and config.head.fan_in <= sizes.encoder.head_features // 2:
        yield {"head.kind": "sparse"}, f"each label reads {head.fan_in} features"
    if head.kind == "sparse" and head.group_size == 1:
        yield {"head.group_size": 16}, "16 labels share their features"
    if head.kind == "sparse" and not head.pattern and head.fan_in >= 2 * _MIN_FAN_IN:
        yield {"head.fan_in": head.fan_in // 2}, "fewer features a label"
    if encoder.kind == "bag" and encoder.dim >= 2 * max(64, head.fan_in):
        yield {"encoder.dim": encoder.dim // 2}, "a smaller table"


def _find_room(sizes: Sizes, memory: int) -> dict[str, int]:
    """The largest doublings of the batch of a pass and of the fan-in that still fit."""
    found = {}
    for key, most in (
        ("train.batch_size", sizes.workload.num_rows),
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
        return _peak(make_sizes(config, sizes.workload, sizes.device)) <= memory
    except ValueError:
        return False


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The recipe with "section.key" values replaced. Raises ValueError where they cannot be."""
    for key, value in settings.items():
        section, name = key.split(".")
        options = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: options})
    return config


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
