"""Whether a recipe fits into a memory, what takes it, how long a step lasts, what to change.

Nothing of the model's size is allocated: see `memory_model.py` for what is counted and how.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from xmc.config import Config, ConfigError, load_recipe
from xmc.training.memory_classifier import dense_bytes
from xmc.training.memory_encoder import passes_of
from xmc.training.memory_model import (
    PYTHON_AND_TORCH,
    Component,
    Device,
    Workload,
    make_sizes,
    on_device,
    prediction_components,
    total,
    training_phases,
)
from xmc.training.plan_changes import Change, find_changes, find_room, training_peak
from xmc.training.step_rate import StepTime, measure_step
from xmc.training.workload import data_workload, given_workload

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_ROWS, _POSITIVES = 100_000, 5.0  # where only the number of labels is given


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
    """Classifier in training: weights, indices, biases, moments; a local index over bags."""
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
    if config.train.objective != "classification":
        raise ConfigError(
            "train.objective: xmc plan predicts the training of classifiers, "
            f'got "{config.train.objective}"'
        )
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
    training = classifier.trained
    rows, _ = passes_of(config)
    peak = training_peak(sizes)
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
        changes=() if fits else tuple(find_changes(sizes, memory or 0)),
        room=find_room(sizes, memory) if fits and memory is not None else {},
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
