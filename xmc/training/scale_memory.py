"""Memory of a rank that one process alone does not need: gathered rows and what moves them.

Counted off `xmc.distributed.collectives`: an all-gather pads a rank's part and receives those of
all; gloo, which carries tensors of the CPU, copies what it gathers and what it sums once more. That
was measured (torch 2.13.0, 2026-11-22): 5 parts for a gather among 2 ranks, 9 among 4; the input
again for a sum. NCCL is taken to need no copy, and its own buffers are assumed.
"""

from __future__ import annotations

from xmc.config import Config
from xmc.training.memory_component import MIB, Component
from xmc.training.memory_encoder import Encoder, passes_of
from xmc.training.scale_ranks import Ranks
from xmc.training.workload import Workload

VALIDATION_K = 5  # `xmc.training.trainer`
_GLOO = 25 * 10**6  # torch.distributed, its threads and connections: measured with 2 and 4 ranks
_NCCL = 256 * MIB  # on the card: assumed, never measured here


def ranks_process(ranks: Ranks, *, cuda: bool) -> list[Component]:
    """What it takes to have others to talk to."""
    if ranks.size == 1:
        return []
    parts = [Component("process group", _GLOO, "torch.distributed, gloo", host=True)]
    if cuda:
        parts.append(Component("NCCL", _NCCL, "its buffers: assumed"))
    return parts


def gathered_parts(
    encoder: Encoder, config: Config, workload: Workload, ranks: Ranks, *, cuda: bool
) -> list[Component]:
    """Of a training step: rows of all ranks, their gradient, and what collectives hold."""
    if ranks.size == 1:
        return []
    rows, _ = passes_of(config)
    padded = ranks.size * ranks.share(rows)
    batch = 4 * padded * encoder.head_features
    positives = positives_per_row(workload)
    labels = 8 * (padded + 1) + 4 * round(padded * positives)
    copies = 2 if cuda else 3
    parts = [
        Component("gathered batch", 2 * batch, f"[B, D] of all ranks' {rows} rows, its gradient"),
        Component("gathered positives", copies * labels, "CSR of these rows"),
        Component(
            "buffers of collectives",
            batch // ranks.size + (0 if cuda else batch),
            "the padded part" + ("" if cuda else ", and gloo's copy of the whole"),
        ),
    ]
    if encoder.table:
        parts.append(_gathered_bags(encoder, config, workload, ranks, cuda=cuda))
    return parts


def gathered_validation(
    encoder: Encoder, config: Config, ranks: Ranks, *, cuda: bool
) -> list[Component]:
    """Of validation: rows of all ranks, and the best labels of every rank for them."""
    if ranks.size == 1:
        return []
    rows = config.train.eval_batch_size
    batch = 4 * rows * encoder.head_features
    best = 12 * rows * VALIDATION_K * ranks.size
    copies = 1 if cuda else 2
    return [
        Component("gathered batch", copies * batch, f"[B, D] of all ranks' {rows} rows"),
        Component("gathered top-k", copies * best, f"{VALIDATION_K} labels a row from every rank"),
    ]


def positives_per_row(workload: Workload) -> float:
    """Labels of a training row, on average."""
    return workload.num_positives / workload.num_rows


def _gathered_bags(
    encoder: Encoder, config: Config, workload: Workload, ranks: Ranks, *, cuda: bool
) -> Component:
    """What `xmc.nn.encoder.BagPart` holds: the bags of all rows, the gradient of what they gave."""
    rows, _ = passes_of(config)
    part = 4 * ranks.share(rows) * encoder.out_features
    # The padded part, those of all, and gloo's copy of the whole.
    size = part * (1 + (1 if cuda else 2) * ranks.size)
    size += 12 * round(rows * workload.row_entries) + 8 * (rows + 1)
    return Component("gathered bags", size, f"of all ranks' {rows} rows, and their gradient")
