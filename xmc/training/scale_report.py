"""A plan for several ranks as tables for the terminal, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from xmc.training.memory_component import Component, megabytes
from xmc.training.memory_model import total
from xmc.training.plan_report import (
    change_lines,
    change_values,
    component_table,
    component_values,
    duration,
)
from xmc.training.plan_report import to_dict as plan_to_dict
from xmc.training.scale_plan import RankPlan, ScalePlan, idle_ranks
from xmc.training.scale_traffic import Message

# What a rank holds in a training step, by the first words of components; the rest is "other".
PARTS = {
    "classifier": ("classifier", "label order", "local index", "index translation", "auxiliary"),
    "encoder": ("encoder", "gradient buckets", "gathered layers", "representations", "fragments"),
    "gathered": ("gathered", "joined bags", "buffers of collectives"),
}
_ENCODER = {"ddp": "whole on every rank", "fsdp": "divided over ranks"}
# Components that a rank has whole.
_SAME = (
    *("Python and torch", "libraries", "CUDA context", "NCCL", "process group"),
    *("label names", "label order", "vocabulary", "labels of the rows", "reading labels"),
    "freed blocks",
)


def render(scale: ScalePlan) -> Group:
    """All numbers of ranks, then components and messages of one of them, and the verdict."""
    chosen = detailed(scale)
    phase, title = chosen.peak_phase, f"a rank of {chosen.ranks:,}"
    parts: list[Table | Text] = [
        _memory_table(scale),
        _steps_table(scale),
        component_table(f"{title}: {phase}", chosen.device_part(phase)),
    ]
    if chosen.messages:
        parts.append(_messages_table(f"{title} sends, and receives as much", chosen.messages))
    return Group(*parts, Text("\n".join([*_notes(scale, chosen), "", *_verdict(scale)])))


def detailed(scale: ScalePlan) -> RankPlan:
    """The first number of ranks that fits, else the largest."""
    fitting = [ranks for ranks in scale.ranks if scale.fitting(ranks)]
    return fitting[0] if fitting else scale.ranks[-1]


def memory_parts(ranks: RankPlan) -> dict[str, int]:
    """Bytes of a training step by what takes them, in the memory that decides."""
    found = dict.fromkeys([*PARTS, "other"], 0)
    for part in ranks.device_part("training step"):
        found[_part_of(part)] += part.bytes
    return found


def to_dict(scale: ScalePlan) -> dict[str, Any]:
    """What `render` shows, of every number of ranks, in bytes and seconds."""
    return {
        "scaling": scale.scaling,
        "data_parallel": scale.plan.config.train.data_parallel,
        "bandwidth_bytes_per_second": scale.network.bandwidth,
        "latency_seconds": scale.network.latency,
        "memory_bytes": scale.plan.memory,
        "smallest_ranks_that_fit": scale.smallest,
        "ranks_searched": scale.searched,
        "changes": [change_values(change) for change in scale.changes],
        "ranks": [_values(scale, ranks) for ranks in scale.ranks],
        "one_rank": plan_to_dict(scale.plan),
    }


def _values(scale: ScalePlan, ranks: RankPlan) -> dict[str, Any]:
    time = ranks.time
    return {
        "ranks": ranks.ranks,
        "rows_per_step": ranks.rows,
        "fits": scale.fitting(ranks),
        "peak_bytes": ranks.peak,
        "peak_phase": ranks.peak_phase,
        "host_bytes": ranks.host,
        "step_bytes_by_part": memory_parts(ranks),
        "training": {
            name: [component_values(part) for part in parts] for name, parts in ranks.phases.items()
        },
        "sent_bytes_per_step": ranks.sent,
        "received_bytes_per_step": ranks.sent,
        "messages": [_message(message) for message in ranks.messages],
        "communication_seconds": ranks.communication,
        "encoder_seconds": None if time is None else time.encoder,
        "classifier_seconds": None if time is None else time.classifier,
        "seconds_per_step": None if time is None else time.step,
        "seconds_per_epoch": None if time is None else time.epoch,
        "efficiency": scale.efficiency(ranks),
    }


def _message(message: Message) -> dict[str, Any]:
    return {
        "name": message.name,
        "when": message.when,
        "sent_bytes": message.bytes,
        "received_bytes": message.bytes,
        "turns": message.turns,
        "why": message.why,
    }


def _part_of(part: Component) -> str:
    for name, starts in PARTS.items():
        # Of a step, working memory that does not shrink with the labels is no classifier.
        if part.name.startswith(starts) and part.name != "classifier step":
            return name
    return "other"


def _memory_table(scale: ScalePlan) -> Table:
    memory = "memory of a rank" if scale.plan.device == "cpu" else "GPU memory of a rank"
    table = _numbers_table(f"{memory}: a training step, and the peak", *PARTS, "other", "peak")
    table.add_column("fits", justify="right")
    for ranks in scale.ranks:
        fits = scale.fitting(ranks)
        table.add_row(
            f"{ranks.ranks:,}",
            *map(megabytes, memory_parts(ranks).values()),
            megabytes(ranks.peak),
            "-" if fits is None else "yes" if fits else "no",
        )
    return table


def _steps_table(scale: ScalePlan) -> Table:
    whose = "" if scale.scaling == "strong" else " for each rank"
    title = f"a step of {scale.alone.rows:,} rows{whose} ({scale.scaling} scaling)"
    names = ("sends", "network", "encoder", "classifier", "step", "efficiency")
    table = _numbers_table(title, *names)
    for ranks in scale.ranks:
        time, efficiency = ranks.time, scale.efficiency(ranks)
        parts = () if time is None else (time.encoder, time.classifier, time.step)
        table.add_row(
            f"{ranks.ranks:,}",
            megabytes(ranks.sent),
            duration(ranks.communication),
            *([duration(seconds) for seconds in parts] or 3 * ["-"]),
            "-" if efficiency is None else f"{efficiency:.1%}",
        )
    return table


def _numbers_table(title: str, *names: str) -> Table:
    """One row for each number of ranks."""
    table = Table(title=title, title_justify="left")
    for name in ("ranks", *names):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _messages_table(title: str, messages: Iterable[Message]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("message")
    table.add_column("how")
    table.add_column("when")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("turns", justify="right", no_wrap=True)
    for message in messages:
        size, turns = megabytes(message.bytes), f"{message.turns:,}"
        table.add_row(message.name, message.why, message.when, size, turns)
    return table


def _notes(scale: ScalePlan, chosen: RankPlan) -> list[str]:
    network, config = scale.network, scale.plan.config
    lines = [
        f"network: {megabytes(network.bandwidth)} a second and rank, {duration(network.latency)} "
        "a turn of the ring; nothing is taken to overlap with computing"
    ]
    if config.encoder.kind == "transformer":
        kind = config.train.data_parallel
        lines.append(f"encoder {_ENCODER[kind]} (train.data_parallel = {kind})")
    same = [part for part in chosen.device_part(chosen.peak_phase) if part.name in _SAME]
    lines.append(f"the same on every rank, however many: {_with_largest(same)}")
    if scale.plan.device == "cuda":
        host = max(([p for p in parts if p.host] for parts in chosen.phases.values()), key=total)
        lines.append(f"in the machine's own memory, for each rank: {_with_largest(host)}")
        lines.append("not measured on a GPU: formulas only")
    elif chosen.time is None:
        lines.append("time: not measured")
    else:
        time = chosen.time
        lines.append(
            f"an epoch of {time.steps_per_epoch:,} steps takes about {duration(time.epoch)} on "
            f"{chosen.ranks:,} ranks, each of which computes like this process"
        )
    idle = [ranks.ranks for ranks in scale.ranks if idle_ranks(ranks, config)]
    if idle and scale.scaling == "strong":
        lines.append(f"from {idle[0]:,} ranks on, some have no row of a pass to encode")
    return lines


def _with_largest(parts: list[Component]) -> str:
    named = sorted(parts, key=lambda part: -part.bytes)[:3]
    return f"{megabytes(total(parts))} ({', '.join(_named(part) for part in named)})"


def _named(part: Component) -> str:
    return f"{part.name} {megabytes(part.bytes)}"


def _verdict(scale: ScalePlan) -> list[str]:
    memory, last = scale.plan.memory, scale.ranks[-1]
    if memory is None:
        return ["give --memory to learn how many ranks it takes"]
    size, lines = megabytes(memory), []
    if scale.smallest is None:
        lines.append(f"no number of ranks up to {scale.searched:,} fits {size} each")
    else:
        word = "rank" if scale.smallest == 1 else "ranks"
        lines.append(f"the smallest number that fits {size} each: {scale.smallest:,} {word}")
    if scale.fits or scale.scaling == "weak":
        return lines
    word = "rank" if last.ranks == 1 else "ranks"
    over = f"on {last.ranks:,} {word} it does not fit: peak {megabytes(last.peak)}"
    return [*lines, over, *change_lines(scale.changes, memory)]
