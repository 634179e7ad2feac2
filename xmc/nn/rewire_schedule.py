"""When to rewire and how much: counted in optimizer steps, annealed over the rewiring period."""

from __future__ import annotations

import math

from xmc.config import RewireConfig

_LAST_THRESHOLD = 1e-4  # arXiv 2411.03171


def is_due(config: RewireConfig, step: int, total_steps: int) -> bool:
    """Whether the pattern is rewired after optimizer step `step` (from 1) of `total_steps`."""
    if config.method == "static" or step < 1 or step % config.interval:
        return False
    return step < config.end * total_steps


def rewire_progress(config: RewireConfig, step: int, total_steps: int) -> float:
    """Share of the rewiring period that has passed after `step`, in [0, 1]: `t / T_end`."""
    last = config.end * total_steps
    return min(1.0, step / last) if last else 1.0


def prune_amount(config: RewireConfig, progress: float) -> float:
    """The fraction or threshold of a rewiring at that progress.

    Cosine: the fraction goes to 0 as `fraction / 2 (1 + cos(pi t / T_end))` (RigL, section 3), the
    threshold likewise to 1e-4 (arXiv 2411.03171). A threshold below that stays as it is.
    """
    first = config.fraction if config.prune == "fraction" else config.threshold
    if config.anneal == "constant":
        return first
    last = 0.0 if config.prune == "fraction" else min(_LAST_THRESHOLD, first)
    return last + (first - last) / 2 * (1 + math.cos(math.pi * progress))
