"""What `xmc plan --ranks` asks for, read from the options of the command line."""

from __future__ import annotations

from pathlib import Path

from xmc.config import ConfigError
from xmc.training.planner import Plan
from xmc.training.scale_network import (
    ETHERNET,
    INFINIBAND,
    Network,
    parse_bandwidth,
    parse_latency,
    parse_ranks,
)
from xmc.training.scale_plan import ScalePlan, plan_scale
from xmc.training.scale_plot import check_suffix, plot_scale


def plan_ranks(
    plan: Plan,
    ranks: str | None,
    *,
    weak: bool = False,
    bandwidth: str | None = None,
    latency: str | None = None,
    plot: Path | None = None,
) -> ScalePlan | None:
    """The plan for these numbers of ranks, drawn into `plot`; None without any.

    Raises ConfigError for options that say nothing without --ranks or cannot be read, and what
    `plan_scale` raises.
    """
    if ranks is None:
        given = {"--weak": weak, "--bandwidth": bandwidth, "--latency": latency, "--plot": plot}
        for option, value in given.items():
            if value:
                raise ConfigError(f"expected --ranks beside {option}, got none")
        return None
    default = INFINIBAND if plan.device == "cuda" else ETHERNET
    network = Network(
        default.bandwidth if bandwidth is None else parse_bandwidth(bandwidth),
        default.latency if latency is None else parse_latency(latency),
    )
    counts = parse_ranks(ranks)
    if plot is not None:
        check_suffix(plot)
    scale = plan_scale(plan, counts, scaling="weak" if weak else "strong", network=network)
    if plot is not None:
        plot_scale(scale, plot)
    return scale
