"""A plan as tables for the terminal, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from xmc.training.memory_component import Component, megabytes
from xmc.training.memory_model import total
from xmc.training.plan_changes import Change
from xmc.training.planner import Plan


def render(plan: Plan) -> Group:
    """Peak of training by component, prediction, time, verdict and what to change."""
    phase = plan.peak_phase
    parts: list[Table | Text] = [
        component_table(f"training: {phase}", plan.device_part(phase)),
        component_table(
            "prediction", [p for p in plan.prediction if plan.device == "cpu" or not p.host]
        ),
        Text("\n".join([*_sizes(plan), *_time(plan), "", *_verdict(plan)])),
    ]
    return Group(*parts)


def to_dict(plan: Plan) -> dict[str, Any]:
    """What `render` shows, in bytes and seconds."""
    time = plan.time
    return {
        "device": plan.device,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "peak_bytes_above_torch": plan.peak_above_torch,
        "peak_phase": plan.peak_phase,
        "training": {
            name: [component_values(part) for part in parts] for name, parts in plan.phases.items()
        },
        "prediction": [component_values(part) for part in plan.prediction],
        "bytes_per_label": plan.bytes_per_label,
        "classifier_bytes": plan.classifier,
        "dense_classifier_bytes": plan.dense,
        "seconds_per_step": None if time is None else time.step,
        "seconds_per_epoch": None if time is None else time.epoch,
        "steps_per_epoch": None if time is None else time.steps_per_epoch,
        "changes": [change_values(change) for change in plan.changes],
        "room": plan.room,
    }


def component_table(title: str, parts: list[Component]) -> Table:
    """Components of one peak, the largest first."""
    whole = total(parts)
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("component", "peak")
    table.add_column("what it is")
    table.add_column("bytes", megabytes(whole), justify="right", no_wrap=True)
    table.add_column("share", "100%", justify="right")
    for part in sorted(parts, key=lambda part: -part.bytes):
        table.add_row(part.name, part.why, megabytes(part.bytes), f"{part.bytes / whole:.0%}")
    return table


def _sizes(plan: Plan) -> list[str]:
    others = [
        f"{name} {megabytes(total(plan.device_part(name)))}"
        for name in plan.phases
        if name != plan.peak_phase
    ]
    lines = [f"at other times: {', '.join(others)}"]
    if plan.device == "cuda":
        host = max(sum(p.bytes for p in parts if p.host) for parts in plan.phases.values())
        lines.append(f"in the machine's own memory: {megabytes(host)}")
        lines.append("not measured on a GPU: formulas only")
    lines += [
        "features are mapped from a file: the system drops their pages when memory is short",
        f"a label takes {plan.bytes_per_label:,.0f} bytes in training, the classifier "
        f"{megabytes(plan.classifier)}; a dense one {megabytes(plan.dense['fused'])}, "
        f"in plain torch (gradient, scores) {megabytes(plan.dense['plain'])}",
    ]
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.time is None:
        reason = "not measured on a GPU" if plan.device == "cuda" else "not measured"
        return [f"time: {reason}"]
    time = plan.time
    return [
        f"a step takes about {duration(time.step)} here (encoder {duration(time.encoder)}, "
        f"classifier {duration(time.classifier)}), an epoch of {time.steps_per_epoch:,} steps "
        f"{duration(time.epoch)}, {plan.config.train.epochs} epochs "
        f"{duration(time.epoch * plan.config.train.epochs)}"
    ]


def _verdict(plan: Plan) -> list[str]:
    peak = megabytes(plan.peak)
    if plan.memory is None:
        return [f"peak {peak}; give --memory to learn whether that fits"]
    memory = megabytes(plan.memory)
    if plan.fits:
        lines = [f"fits: peak {peak} of {memory}", *_recommended(plan)]
        if plan.room:
            more = " or ".join(f"--set {key}={value}" for key, value in plan.room.items())
            lines.append(f"there is room for {more}")
        return lines
    lines = [f"does not fit: peak {peak}, {megabytes(plan.peak - (plan.memory or 0))} too much"]
    return [*lines, *change_lines(plan.changes, plan.memory)]


def change_lines(changes: Sequence[Change], memory: int) -> list[str]:
    """What to change until it fits, first things first, or that nothing tried makes it fit."""
    lines = []
    for number, change in enumerate(changes):
        word = "change first" if number == 0 else "then"
        setting = " ".join(f"--set {setting}" for setting in change.settings)
        lines.append(f"  {word}: {setting} ({change.why}): peak {megabytes(change.peak)}")
    if not changes or changes[-1].peak > memory:
        lines.append("  no setting that is tried makes it fit: it needs more memory or less data")
    return lines


def change_values(change: Change) -> dict[str, Any]:
    """A change for JSON."""
    return {"set": list(change.settings), "peak_bytes": change.peak, "why": change.why}


def _recommended(plan: Plan) -> list[str]:
    train, head = plan.config.train, plan.config.head
    shape = "dense" if head.kind == "dense" else f"fan-in {head.fan_in}"
    shape += f" and {head.bag_fan_in} features of the bag" if head.bag_fan_in else ""
    return [
        f"as it is: {train.batch_size} rows a pass, {train.accumulation} passes a step, {shape}, "
        f"{head.weight_dtype} weights, {plan.config.classifier_optimizer.kind}"
    ]


def component_values(part: Component) -> dict[str, Any]:
    """A component for JSON."""
    return {"name": part.name, "bytes": part.bytes, "why": part.why, "host": part.host}


def duration(seconds: float) -> str:
    """Three digits in a unit that suits."""
    if 0 < seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
