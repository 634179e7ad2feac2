"""What a training and a prediction hold in memory, counted before anything is allocated.

A phase is a list of components that exist at the same time; the peak is that of the largest phase.
Weights, indices and moments are counted on the modules themselves, made on torch's meta device, so
that the count is that of the code. The rest follows the formulas of `kernels/README.md` and of the
functions named in each component's reason. Constants marked "measured" were seen on Linux x86-64
with torch 2.13.0, numba 0.68.1 and transformers 5.23.0 on 2026-11-21.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from xmc.config import Config
from xmc.training.memory_classifier import (
    Classifier,
    accumulated_gradient,
    auxiliary_head,
    choosing_features,
    drawing_inputs,
    label_clustering,
    make_classifier,
    moments,
    read_bags,
    rewiring,
    stored_weights,
    training_step,
    validation_topk,
)
from xmc.training.memory_component import MIB, Component, megabytes
from xmc.training.memory_encoder import (
    Encoder,
    encoder_moments,
    encoder_pass,
    encoder_replica,
    encoder_weights,
    evaluation_pass,
    make_encoder,
    passes_of,
)
from xmc.training.scale_memory import gathered_parts, gathered_validation, ranks_process
from xmc.training.scale_ranks import Ranks
from xmc.training.workload import Workload

Device = Literal["cpu", "cuda"]

PYTHON_AND_TORCH = 220 * 10**6  # resident after `import torch`; measured
_LIBRARIES = 310 * 10**6  # numba, LLVM, kernels from the cache, torch's late imports; measured
_IMPORTS = 45 * 10**6  # of these, before the first step; measured
_TRANSFORMERS = 70 * 10**6  # measured
_CUDA_CONTEXT = 500 * 10**6  # of driver and libraries on the card: assumed, never measured here
_PREDICTION_ROWS = 256  # `Predictor.stream`


@dataclass(frozen=True)
class Sizes:
    """The model whose memory is counted, and where: on the first of these ranks."""

    config: Config
    workload: Workload
    encoder: Encoder
    classifier: Classifier
    device: Device
    threads: int
    ranks: Ranks

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


def make_sizes(
    config: Config,
    workload: Workload,
    device: Device = "cpu",
    *,
    world_size: int = 1,
    encoder: Encoder | None = None,
) -> Sizes:
    """Build the modules on the meta device, or all but a known encoder.

    Raises ValueError for sizes that do not fit.
    """
    encoder = encoder or make_encoder(config, workload)
    classifier = make_classifier(
        *(config, encoder.head_features, workload.num_labels, workload.num_features), world_size
    )
    ranks = Ranks(world_size, config.train.data_parallel)
    return Sizes(config, workload, encoder, classifier, device, torch.get_num_threads(), ranks)


def training_phases(sizes: Sizes) -> dict[str, list[Component]]:
    """Components by phase of a training; empty ones are left out."""
    config, workload = sizes.config, sizes.workload
    encoder, classifier, ranks = sizes.encoder, sizes.classifier, sizes.ranks
    base = [*process(sizes), label_names(workload), vocabulary(config, workload)]
    model = [
        *stored_weights(classifier),
        *moments(classifier),
        *encoder_weights(encoder, ranks),
        *encoder_moments(encoder, ranks),
        *encoder_replica(encoder, ranks),
        training_labels(workload),
        allocator(classifier),
    ]
    auxiliary = auxiliary_head(config, workload.num_labels, encoder.out_features, ranks)
    rows, passes = passes_of(config)
    eval_rows = config.train.eval_batch_size
    phases = {
        "reading data": [*base, reading_labels(workload)],
        "training step": [
            *(*base, *model, auxiliary),
            accumulated_gradient(classifier, passes),
            training_step(classifier, workload, rows, cuda=sizes.cuda, threads=sizes.threads),
            *read_bags(classifier, workload, rows),
            *encoder_pass(encoder, config, workload, ranks, cuda=sizes.cuda),
            *gathered_parts(encoder, config, workload, ranks, cuda=sizes.cuda),
        ],
        "validation": [
            *(*base, *model, auxiliary),
            validation_topk(classifier, workload, eval_rows, sizes.threads),
            *read_bags(classifier, workload, eval_rows),
            evaluation_pass(encoder, config, ranks.share(eval_rows)),
            *gathered_validation(encoder, config, ranks, cuda=sizes.cuda),
        ],
    }
    if config.rewire.method != "static":
        reps = rows * passes if config.rewire.method == "rigl" else 0
        phases["rewiring"] = [*base, *model, auxiliary, rewiring(classifier, config, reps)]
    if config.auxiliary.kind != "none" or config.head.order == "cluster":
        phases["clustering labels"] = [*base, training_labels(workload), label_clustering(workload)]
    if classifier.bag_fan_in:
        # Before the first step, which makes the moments and loads the kernels.
        start = [
            *process(sizes, libraries=_IMPORTS),
            *(label_names(workload), vocabulary(config, workload), training_labels(workload)),
            *(*stored_weights(classifier), *encoder_weights(encoder, ranks)),
        ]
        phases["drawing inputs"] = [*start, drawing_inputs(classifier)]
        phases["choosing features"] = [*start, choosing_features(classifier, workload)]
    if sizes.cuda:
        phases["checkpoint"] = [*base, *model, auxiliary, checkpoint_copy([*model, auxiliary])]
    return {name: _present(parts) for name, parts in phases.items()}


def prediction_components(sizes: Sizes) -> list[Component]:
    """Components of a process that answers texts with a trained model."""
    rows = _PREDICTION_ROWS
    return _present(
        [
            *process(sizes),
            label_names(sizes.workload),
            vocabulary(sizes.config, sizes.workload),
            *stored_weights(sizes.classifier),
            *encoder_weights(sizes.encoder),
            validation_topk(sizes.classifier, sizes.workload, rows, sizes.threads),
            *read_bags(sizes.classifier, sizes.workload, rows),
            evaluation_pass(sizes.encoder, sizes.config, rows),
        ]
    )


def process(sizes: Sizes, *, libraries: int = _LIBRARIES) -> list[Component]:
    """What any run holds, however small its model."""
    if sizes.encoder.transformer is not None:
        libraries += _TRANSFORMERS
    parts = [
        Component("Python and torch", PYTHON_AND_TORCH, "resident after import torch", host=True),
        Component(
            "libraries",
            libraries,
            "numba with compiled kernels, torch's late imports, tokenizers; the very first run "
            "compiles, with 60 MB more",
            host=True,
        ),
    ]
    if sizes.cuda:
        parts.append(Component("CUDA context", _CUDA_CONTEXT, "driver and libraries: assumed"))
    return [*parts, *ranks_process(sizes.ranks, cuda=sizes.cuda)]


def label_names(workload: Workload) -> Component:
    if not workload.label_chars:
        return Component("label names", 0, "")
    # A string takes 49 bytes and its characters, the list 8; read with uids that are dropped.
    size = 2 * workload.num_labels * (57 + workload.label_chars)
    return Component(
        "label names",
        round(size),
        f"L strings of {workload.label_chars:.0f} characters, twice while they are read",
        host=True,
    )


def vocabulary(config: Config, workload: Workload) -> Component:
    if config.features.kind == "tokens":
        return Component("vocabulary", 0, "")
    # Hashed: frequency and idf. Else words, their dictionary, features and pairs; measured.
    each = 12 if config.features.vocabulary == "hashing" else 170
    size = each * workload.num_features if workload.label_chars else 0
    return Component("vocabulary", size, f"V features of {each} bytes", host=True)


def training_labels(workload: Workload) -> Component:
    rows = workload.num_rows + workload.validation_rows
    held_out = workload.num_positives / workload.num_rows * workload.validation_rows
    size = 8 * (rows + 1) + 4 * (workload.num_positives + held_out)
    if workload.splits_rows:
        size += 8 * rows  # the chosen rows of the features
    return Component("labels of the rows", round(size), "CSR: 8 N + 4 positives", host=True)


def reading_labels(workload: Workload) -> Component:
    """`SparseLabels.rows` holds three int64 positions of each label it copies."""
    each = 28 if workload.splits_rows else 4
    size = 16 * workload.num_rows + each * workload.num_positives + 8 * workload.num_labels
    why = "copies of train and validation rows" if workload.splits_rows else "mapped as they are"
    return Component("reading labels", size, why, host=True)


def allocator(classifier: Classifier) -> Component:
    """Freed blocks that the C library keeps, those of drawing the pattern mostly.

    Measured were 3 to 40 MB, with no rule to be seen; this is the middle. Blocks from 32 MiB on go
    back to the system when they are freed.
    """
    drawn = classifier.fan_in * classifier.num_labels if classifier.sparse else 0
    size = min(drawn // 2, 16 * MIB)
    return Component("freed blocks", size, "kept by the C library, roughly", host=True)


def checkpoint_copy(parts: Iterable[Component]) -> Component:
    size = sum(part.bytes for part in parts if not part.host)
    return Component("checkpoint", size, "everything that is saved, copied to the host", host=True)


def total(parts: Iterable[Component]) -> int:
    """Bytes of components together."""
    return sum(part.bytes for part in parts)


def on_device(parts: Iterable[Component], device: Device) -> list[Component]:
    """Those in the memory that decides: all on the CPU, of a GPU those on the card."""
    return [part for part in parts if device == "cpu" or not part.host]


def _present(parts: Iterable[Component]) -> list[Component]:
    return [part for part in parts if part.bytes]


__all__ = [
    "PYTHON_AND_TORCH",
    "Component",
    "Device",
    "Sizes",
    "Workload",
    "make_sizes",
    "megabytes",
    "on_device",
    "prediction_components",
    "total",
    "training_phases",
]
