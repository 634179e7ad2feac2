"""Where to cut an encoder so that no stage has much more to do than the others."""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xmc.nn.stages import cut_encoder, num_units
from xmc.types import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xmc.nn.transformer import TransformerEncoder


def balanced_cuts(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where stages 1, 2, ... start, so that the largest sum of costs over a stage is smallest.

    Among such cuts, those with the smallest sum of squares of the stages' costs. Exact, by dynamic
    programming in `num_stages * len(costs)^2` steps; every stage gets at least one unit.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"expected 1 to {len(costs)} stages for as many units, got {num_stages}")
    if bad := [cost for cost in costs if not 0 <= cost < math.inf]:
        raise ValueError(f"expected finite costs of at least 0, got {bad[0]}")
    sums = [0.0, *accumulate(costs)]
    largest, _ = _cheapest(sums, num_stages, max, lambda cost: cost)
    scale = largest or 1.0

    def price(cost: float) -> float:
        return (cost / scale) ** 2 if cost <= largest else math.inf

    return _cheapest(sums, num_stages, operator.add, price)[1][1:]


def _cheapest(
    sums: Sequence[float],  # of the costs of the first 0, 1, 2, ... units
    num_stages: int,
    join: Callable[[float, float], float],
    price: Callable[[float], float],
) -> tuple[float, list[int]]:
    """The smallest joined price of stages that hold all units, and where each of them starts."""
    best = [(price(cost), [0]) for cost in sums]  # of the units before each, in one stage
    for stages in range(2, num_stages + 1):
        longer = best.copy()
        for stop in range(stages, len(sums)):
            longer[stop] = min(
                (join(best[start][0], price(sums[stop] - sums[start])), [*best[start][1], start])
                for start in range(stages - 1, stop)
            )
        best = longer
    return best[-1]


def parameter_costs(encoder: TransformerEncoder | PreTrainedModel) -> list[int]:
    """The number of parameters of each unit, trained or not, as `balanced_cuts` wants them.

    They say what a stage holds. The table of the embeddings is looked up, not multiplied, so for
    time see `measured_costs`.
    """
    stages = _units(encoder)
    return [sum(parameter.numel() for parameter in stage.parameters()) for stage in stages]


def measured_costs(
    encoder: TransformerEncoder | PreTrainedModel, tokens: Tokens, *, repeats: int = 5
) -> list[float]:
    """Median seconds of forward and backward of each unit on a batch like `tokens`.

    Leaves gradients as they are. The head's time, which the last stage spends too, is not in it:
    add it to the last cost. Draws dropout from torch's global generators.
    """
    if repeats < 1:
        raise ValueError(f"expected at least 1 repeat, got {repeats}")
    stages = _units(encoder)
    seconds: list[list[float]] = [[] for _ in stages]
    for repeat in range(repeats + 1):
        inputs: tuple[Tensor, ...] = (tokens.ids, tokens.mask)
        for stage, spent in zip(stages, seconds, strict=True):
            inputs, took = _timed(stage, inputs)
            if repeat:  # the first warms up
                spent.append(took)
    return [statistics.median(spent) for spent in seconds]


def _units(encoder: TransformerEncoder | PreTrainedModel) -> list[nn.Module]:
    return [*cut_encoder(encoder, range(1, num_units(encoder)))]


def _timed(stage: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], float]:
    """What the stage makes of its inputs, detached, and the seconds of forward and backward."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    device = inputs[0].device
    _synchronize(device)
    started = time.perf_counter()
    with torch.enable_grad():
        outputs = stage(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [x for x in [*leaves, *stage.parameters()] if x.requires_grad]
    joined = [x for x in outputs if x.requires_grad]
    if joined and wanted:
        ones = [torch.ones_like(x) for x in joined]
        torch.autograd.grad(joined, wanted, ones, allow_unused=True)
    _synchronize(device)
    return tuple(x.detach() for x in outputs), time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
