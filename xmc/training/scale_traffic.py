"""What a rank tells the others in a step: bytes, and how many turns of the ring they take.

Every message is one of a ring of N ranks, in which each sends to its right neighbour what it has
and what came from its left one, so that it sends as many bytes as it receives: an all-gather of
parts of n bytes takes N - 1 turns and (N - 1) n bytes, a reduce-scatter of N n bytes the same, an
all-reduce of n bytes 2 (N - 1) turns and 2 (N - 1) / N n bytes (Thakur, Rabenseifner and Gropp,
"Optimization of Collective Communication Operations in MPICH", 2005, sections 3 and 4). gloo's
reduce-scatter is an all-reduce, which the kernel's count of bytes written shows. Nothing of it
grows with L.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from xmc.training.memory_encoder import passes_of
from xmc.training.memory_model import Sizes
from xmc.training.scale_memory import VALIDATION_K, positives_per_row

When = Literal["step", "validation batch", "rewiring"]

_BUCKET = 25 * 2**20  # bytes of a DDP bucket, torch's default


@dataclass(frozen=True)
class Message:
    """Collectives of one purpose."""

    name: str
    when: When
    bytes: int
    """That a rank sends, and receives as many."""
    turns: int
    """Messages one after another, each of which waits for the network."""
    why: str


@dataclass(frozen=True)
class _Ring:
    size: int
    gloo: bool

    def gather(self, part: int) -> tuple[int, int]:
        """(bytes, turns) of an all-gather of parts of so many bytes."""
        return (self.size - 1) * part, self.size - 1

    def all_reduce(self, size: int) -> tuple[int, int]:
        return round(2 * (self.size - 1) * size / self.size), 2 * (self.size - 1)

    def scatter(self, part: int) -> tuple[int, int]:
        """Of a reduce-scatter that leaves so many bytes on each."""
        return self.all_reduce(self.size * part) if self.gloo else self.gather(part)


def messages(sizes: Sizes) -> list[Message]:
    """All that a rank sends in a step, for a batch of validation and for a rewiring."""
    if sizes.ranks.size == 1:
        return []
    ring = _Ring(sizes.ranks.size, gloo=not sizes.cuda)
    return [*_of_passes(sizes, ring), *_of_step(sizes, ring), *_others(sizes, ring)]


def step_messages(found: list[Message]) -> list[Message]:
    return [message for message in found if message.when == "step"]


def _of_passes(sizes: Sizes, ring: _Ring) -> Iterator[Message]:
    """What the heads send in every pass of a step."""
    config, encoder, ranks = sizes.config, sizes.encoder, sizes.ranks
    whole, passes = passes_of(config)
    rows = ranks.share(whole)
    positives = round(rows * positives_per_row(sizes.workload))

    def message(name: str, why: str, *parts: tuple[int, int]) -> Message:
        return Message(
            name,
            "step",
            passes * sum(size for size, _ in parts),
            passes * sum(turns for _, turns in parts),
            why + (f", {passes} passes" if passes > 1 else ""),
        )

    width, kind = 4 * encoder.head_features, "[B, D] float32"
    counts = ring.gather(8)
    labels = (ring.gather(8 * rows), ring.gather(4 * positives))
    yield message("representations", f"all-gather of {kind}", counts, ring.gather(rows * width))
    if sizes.classifier.bag_fan_in:
        entries = round(rows * sizes.workload.row_entries)
        active = min(entries, sizes.classifier.bag_features)
        features = (*(2 * (ring.gather(8 * entries),)), ring.gather(4 * entries))
        yield message(
            "bags",
            "features that labels read: row, id and weight",
            *(*features, counts, counts, ring.gather(8 * active)),
        )
    yield message("positives", "all-gather of the rows' labels", *labels)
    how = "all-reduce, as gloo does a reduce-scatter" if ring.gloo else "reduce-scatter"
    loss = ring.all_reduce(4)
    yield message("gradient of representations", f"{how}", ring.scatter(rows * width), loss)
    if encoder.table:
        bags = ring.gather(rows * 4 * encoder.out_features)
        yield message("gradient of bags", f"all-gather of {kind}, for the table's", bags)
    if config.auxiliary.kind != "none":
        both = rows * 4 * encoder.out_features
        parts = (counts, ring.gather(both), *labels, ring.scatter(both), loss)
        yield message("auxiliary head", "its rows, positives and gradient", *parts)


def _of_step(sizes: Sizes, ring: _Ring) -> Iterator[Message]:
    """The encoder's gradient, and the flags that end a training on all ranks."""
    encoder, ranks = sizes.encoder, sizes.ranks
    rest = encoder.between
    if encoder.table:
        rest = encoder.trained - encoder.table
    elif encoder.transformer is not None:
        own = encoder.weights - encoder.between
        trained = encoder.trained - encoder.between
        if ranks.divides(encoder.transformer):
            yield _fully_sharded(sizes, ring, own, trained)
        elif trained:
            size, turns = ring.all_reduce(4 * trained)
            buckets = -(-4 * trained // _BUCKET)
            why = f"all-reduce in {buckets} buckets"
            yield Message("encoder gradient", "step", size, turns * buckets, why)
    if rest:
        yield _sum("other gradients", "step", "all-reduce, float32", ring.all_reduce(4 * rest))
    yield _sum("flags", "step", "whether a rank was told to stop", ring.all_reduce(16))


def _fully_sharded(sizes: Sizes, ring: _Ring, own: int, trained: int) -> Message:
    """FSDP: weights gathered forward and backward in each pass, gradients summed in the last.

    Weights outside layers are gathered once a pass.
    """
    shape = sizes.encoder.transformer
    assert shape is not None
    _, passes = passes_of(sizes.config)
    share = sizes.ranks.share
    gathers = passes * (2 * share(own) - share(shape.other_weights))
    gathered, scattered = ring.gather(4 * gathers), ring.scatter(4 * share(trained))
    units = shape.layers + 1
    turns = (2 * units - 1) * passes * gathered[1] + units * scattered[1]
    why = "weights gathered layer by layer, forward and backward"
    why += f" in {passes} passes; gradient summed" if passes > 1 else "; gradient summed"
    return Message("encoder weights", "step", gathered[0] + scattered[0], turns, why)


def _others(sizes: Sizes, ring: _Ring) -> Iterator[Message]:
    """Outside of steps."""
    config, encoder, ranks = sizes.config, sizes.encoder, sizes.ranks
    rows, width = config.train.eval_batch_size, 4 * encoder.head_features
    yield _sum(
        "representations",
        "validation batch",
        "all-gather of [B, D] float32",
        ring.gather(ranks.share(rows) * width),
    )
    best = (ring.gather(rows * 4 * VALIDATION_K), ring.gather(rows * 8 * VALIDATION_K))
    yield _sum("top-k", "validation batch", f"{VALIDATION_K} scores and labels a row", *best)
    if config.rewire.method == "rigl":
        whole, passes = passes_of(config)
        step_rows = passes * ranks.share(whole)
        positives = 4 * round(step_rows * positives_per_row(sizes.workload))
        parts = (ring.gather(8), ring.gather(step_rows * width))
        labels = (ring.gather(8 * step_rows), ring.gather(positives))
        yield _sum("rows of the step", "rewiring", "[B, D] and positives", *parts, *labels)


def _sum(name: str, when: When, why: str, *parts: tuple[int, int]) -> Message:
    sizes, turns = zip(*parts, strict=True)
    return Message(name, when, sum(sizes), sum(turns), why)
