"""How a classifier starts: a rank's share of the labels, and its layer as one process draws it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xmc.config import HeadConfig
from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.pattern import draw_uniform_
from xmc.types import LabelShard

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
}


def own_labels(num_labels: int, world: World, group_size: int = 1) -> LabelShard:
    """The labels of this rank, in whole groups. Raises ValueError where a rank would get none."""
    groups = -(-num_labels // group_size)
    if groups < world.size:
        what = "label" if group_size == 1 else f"group of {group_size} labels"
        raise ValueError(
            f"expected at least one {what} for each of {world.size} ranks, got {groups}"
        )
    return LabelShard.partition(num_labels, world.rank, world.size, unit=group_size)


def fresh_layer(
    in_features: int, shard: LabelShard, config: HeadConfig
) -> FixedFanInLinear | nn.Linear:
    """The rows of a shard, drawn as one layer of all labels would draw them."""
    dtype = DTYPES[config.weight_dtype]
    if config.kind == "dense":
        return dense_layer(in_features, shard, dtype=dtype)
    return FixedFanInLinear(
        in_features,
        len(shard),
        config.fan_in,
        group_size=config.group_size,
        pattern=_pattern(config.pattern),
        dtype=dtype,
        rows=RowShard(shard.start, shard.stop, shard.num_labels),
    )


def dense_layer(
    in_features: int,
    shard: LabelShard,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> nn.Linear:
    """`nn.Linear(in_features, num_labels)` as far as the shard goes, with a bias to be replaced."""
    device = torch.get_default_device()
    layer = nn.Linear(in_features, len(shard), device="meta", dtype=dtype)
    if device.type == "meta":
        return layer
    layer.to_empty(device=device)
    rows = RowShard(shard.start, shard.stop, shard.num_labels)
    # As `nn.Linear.reset_parameters`, whose kaiming bound is 1/sqrt(D) but for rounding.
    bound = math.sqrt(3) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / in_features**0.5)
    draw_uniform_(layer.weight, bound, rows, generator=generator)
    draw_uniform_(layer.bias, 1 / math.sqrt(in_features), rows, generator=generator)
    return layer


def starting_bias(
    bias: Tensor | None,  # [labels of the shard]
    shares: Tensor | None,  # [L], of all labels
    shard: LabelShard,
) -> nn.Parameter:  # [labels of the shard] float32
    """The logits of the shares, or zeros: one a label, not worth the rounding of weights."""
    assert bias is not None
    start = torch.zeros_like(bias, dtype=torch.float32)
    if shares is not None:
        own = shares[shard.start : shard.stop]
        start.copy_(torch.logit(own.double(), eps=1e-7))
    return nn.Parameter(start)


def _pattern(text: str) -> tuple[int, int] | None:
    """(n, m) from "n:m"."""
    if not text:
        return None
    n, m = text.split(":")
    return int(n), int(m)
