"""Learning-rate schedule: a factor of the peak rate, counted in optimizer steps."""

from __future__ import annotations

import math


def lr_factor(step: int, *, total: int, warmup: int, kind: str) -> float:
    """Share of the peak learning rate used by optimizer step `step` (0-based) of `total`.

    Rises linearly over `warmup` steps, then falls to 0 at `total` ("cosine", "linear") or stays
    ("constant"). A warm-up longer than a tenth of a short training is cut to that tenth.
    """
    warmup = min(warmup, max(total // 10, 1))
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    if kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
