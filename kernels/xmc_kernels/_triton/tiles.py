"""Tile sizes and strategies of the Triton kernels, per architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xmc_kernels._triton.launch import bfloat16_product, cdiv, power_of_2
from xmc_kernels.layer import Layer

PARTIAL_BYTES = 48 * 2**20
"""What the private copies of d_x may hold in the deterministic form."""
SCRATCH_BYTES = 64 * 2**20
"""What the blocks of a densified label tile may hold."""

SCORE_BYTES = 32 * 2**20
"""What the scores of a chunk of labels may hold in top-k."""


@dataclass(frozen=True)
class Tiles:
    """Compile-time sizes of one launch."""

    block_g: int
    """Labels of a unit: 1, or a power of two from 16 (labels that share features)."""
    block_f: int
    block_b: int
    walk: int
    """Units that a program goes through."""
    num_warps: int


@dataclass(frozen=True)
class BlockTiles:
    """Compile-time sizes of the kernels of `blocks.py`."""

    block_l: int
    """Labels, a power of two from 16, as are the others."""
    block_d: int
    """Features, at least the largest m of a pattern."""
    block_b: int
    walk: int
    """Blocks of labels that a program goes through for d_x or the weights."""
    num_warps: int


@dataclass(frozen=True)
class ProductTiles:
    """Compile-time sizes of the kernels of `similarity.py`: powers of two from 16."""

    m: int
    """Queries of a tile of scores; queries or keys of a product."""
    n: int
    """Keys of a tile of scores; features of a product."""
    k: int
    """How many products of two numbers are added up at a time."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Table:
    """What one architecture runs with."""

    source: str
    """Date, device and versions of the measurement, or that there was none."""
    tiles: Mapping[tuple[bool, bool, bool], Tiles]
    """(training step, labels share features, float32 operands): largest sizes."""
    blocks: Mapping[bool, BlockTiles]
    """(float32 operands): largest sizes of the kernels of `blocks.py`."""
    products: Mapping[tuple[str, bool], ProductTiles]
    """(kernel of `similarity.py`, float32 operands): largest sizes.

    "sigmoid" is the gradient of that loss; float32 is what "products" have of G for float16, too.
    """
    strategies: Mapping[tuple[bool, bool, bool], tuple[tuple[int, str], ...]]
    """(labels share features, N:M pattern, bfloat16 on both sides): (rows, how to train) rising.

    The last whose rows the batch has.
    """


# scripts/bench/tune_tiles.py rewrites what stands between the next line and "tuned: end".
# tuned: begin
TABLES: dict[str, Table] = {
    "default": Table(
        source="2026-11-21: not timed; the largest sizes that compile without spills (aot.py)",
        tiles={
            (False, False, False): Tiles(block_g=1, block_f=64, block_b=128, walk=32, num_warps=4),
            (False, False, True): Tiles(block_g=1, block_f=64, block_b=128, walk=32, num_warps=4),
            (False, True, False): Tiles(block_g=64, block_f=64, block_b=128, walk=4, num_warps=8),
            (False, True, True): Tiles(block_g=16, block_f=32, block_b=64, walk=4, num_warps=8),
            (True, False, False): Tiles(block_g=1, block_f=64, block_b=128, walk=32, num_warps=4),
            (True, False, True): Tiles(block_g=1, block_f=64, block_b=128, walk=32, num_warps=4),
            (True, True, False): Tiles(block_g=32, block_f=64, block_b=128, walk=4, num_warps=8),
            (True, True, True): Tiles(block_g=16, block_f=32, block_b=64, walk=4, num_warps=8),
        },
        blocks={
            False: BlockTiles(block_l=64, block_d=64, block_b=128, walk=16, num_warps=8),
            True: BlockTiles(block_l=32, block_d=32, block_b=64, walk=16, num_warps=8),
        },
        products={
            ("statistics", False): ProductTiles(m=128, n=128, k=64, num_warps=8, num_stages=3),
            ("statistics", True): ProductTiles(m=64, n=128, k=32, num_warps=8, num_stages=2),
            ("gradient", False): ProductTiles(m=128, n=128, k=64, num_warps=8, num_stages=3),
            ("gradient", True): ProductTiles(m=64, n=128, k=32, num_warps=8, num_stages=2),
            ("sigmoid", False): ProductTiles(m=64, n=128, k=64, num_warps=8, num_stages=3),
            ("sigmoid", True): ProductTiles(m=64, n=128, k=32, num_warps=8, num_stages=2),
            ("products", False): ProductTiles(m=128, n=128, k=64, num_warps=8, num_stages=3),
            ("products", True): ProductTiles(m=128, n=128, k=32, num_warps=8, num_stages=2),
        },
        strategies={
            (False, False, False): ((1, "walk"),),
            (False, False, True): ((1, "walk"), (32, "densify")),
            (False, True, False): ((1, "blocks"),),
            (False, True, True): ((1, "blocks"),),
            (True, False, False): ((1, "walk"),),
            (True, False, True): ((1, "walk"),),
            (True, True, False): ((1, "blocks"),),
            (True, True, True): ((1, "blocks"),),
        },
    ),
}
# tuned: end


def table(device: torch.device) -> Table:
    """The table of a device's architecture, or "default"."""
    return TABLES.get(architecture(device), TABLES["default"])


def architecture(device: torch.device) -> str:
    """Name of a GPU's architecture such as "sm_90"; "default" for any other device."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def unit_tiles(
    num_rows: int,
    layer: Layer,
    dtype: torch.dtype,
    *,
    fused: bool = False,
    weighted: bool = False,
) -> Tiles:
    """Tiles of the kernels that go unit by unit (`products.py`): the table's, cut to the shape.

    `dtype` is that of x; `fused` is the training step, which holds most at once, and more with
    `weighted` positives. float32 products on tensor cores hold three parts of each operand:
    smaller tiles.
    """
    group = layer.group
    wide = torch.float32 in (dtype, layer.weight.dtype)
    most = table(layer.weight.device).tiles[fused, group > 1, wide]
    block_f = min(max(16, power_of_2(layer.fan_in)), most.block_f)
    block_b = min(max(16, power_of_2(num_rows)), most.block_b)
    # Inputs of a tile stay in registers beside the weight gradient of several.
    crowded = fused and num_rows > block_b and layer.fan_in <= block_f
    if group == 1:
        num_warps = 8 if block_f == 32 or crowded else 4
        if block_f == most.block_f and not crowded:
            num_warps = most.num_warps
        return replace(most, block_f=block_f, block_b=block_b, num_warps=num_warps)
    block_g = min(max(16, power_of_2(group)), most.block_g)
    decoded = layer.pattern is not None or layer.scale is not None
    if fused and block_g == 32 and (block_f < 64 or layer.scale is not None or crowded):
        block_b = min(block_b, 64)
    if weighted and (block_g == 32 or layer.pattern is not None):
        block_b = max(16, min(block_b // 2, 64))
    small = not (fused or wide or block_g == most.block_g or decoded)
    num_warps = 4 if small else most.num_warps
    return replace(most, block_g=block_g, block_f=block_f, block_b=block_b, num_warps=num_warps)


def block_tiles(num_rows: int, layer: Layer, dtype: torch.dtype) -> BlockTiles:
    """Tiles of `blocks.py`, cut to the shape; `dtype` is that of x."""
    assert layer.pattern is not None
    wide = torch.float32 in (dtype, layer.weight.dtype)
    most = table(layer.weight.device).blocks[wide]
    block_b = min(max(16, power_of_2(num_rows)), most.block_b)
    # With fewer than four blocks of inputs threads hold copies of the same weights.
    block_l = most.block_l if most.block_d >= 4 * layer.pattern[1] else min(32, most.block_l)
    return replace(most, block_l=block_l, block_b=block_b)


def product_tiles(
    kernel: str, wide: bool, device: torch.device, m: int, n: int, k: int
) -> ProductTiles:
    """Tiles of a kernel of `similarity.py`, cut to the shape but not below 64 x 64 x 32."""
    most = table(device).products[kernel, wide]
    return replace(
        most,
        m=min(max(64, power_of_2(m)), most.m),
        n=min(max(64, power_of_2(n)), most.n),
        k=min(max(32, power_of_2(k)), most.k),
    )


def num_units(num_labels: int, group: int, block_g: int) -> int:
    """How many units a layer has; a large group is cut into several."""
    return num_labels // group * cdiv(group, block_g)


def deterministic_programs(x_t: Tensor, units: int) -> int:
    """Programs with a private d_x_t in float32 each.

    Depends on the shapes alone, so that every card adds up in the same order.
    """
    return max(1, min(units, 256, PARTIAL_BYTES // max(1, 4 * x_t.numel())))


def dense_labels(x: Tensor, num_labels: int) -> int:
    """Labels of a densified block whose scratch stays within SCRATCH_BYTES.

    A label costs 4 bytes per row for its score, 4 and 1 for gradient and target, and up to 8 per
    feature for weight and gradient (float8 weights take 4 more per slot, not counted).
    """
    num_rows, features = x.shape
    most = SCRATCH_BYTES // (9 * num_rows + 8 * features) // 128 * 128
    return min(max(128, most), num_labels)


def score_labels(x: Tensor, num_labels: int, group: int) -> int:
    """Labels of a chunk whose scores fit SCORE_BYTES: whole groups, a multiple of 16."""
    unit = math.lcm(group, 16)
    most = SCORE_BYTES // (4 * max(1, len(x))) // unit
    return min(max(1, most) * unit, num_labels)


def gradient_labels(num_labels: int, label_bytes: int, block_l: int) -> int:
    """Labels that fit SCRATCH_BYTES at so many bytes each: a multiple of block_l, or all.

    A label costs its loss gradient, and room for new float8 numbers.
    """
    most = SCRATCH_BYTES // max(1, label_bytes) // block_l
    return min(max(1, most) * block_l, num_labels)


def layer_strategy(layer: Layer) -> str:
    """How a layer goes forward and backward: "blocks" with a pattern, else unit by unit."""
    return "walk" if layer.pattern is None else "blocks"


def strategy(x: Tensor, layer: Layer, deterministic: bool) -> str:
    """How to train: "walk" unit by unit, "densify" label tiles for torch's products, or "blocks".

    The default table is counted, not measured: one scattered float32 atomic per multiply-add bounds
    the walk with one label per index row, while at F/D = 1/12 the densified tile costs 12 times the
    operations at 50 times the rate, and no atomics. Without bfloat16 on both sides, or for a few
    rows, the matrix units do not pay; labels that share an index use them in the walk.
    A pattern's pieces of the dense matrix ("blocks") cost D/F times the operations, again on matrix
    units, and neither gathers nor scattered atomics. Deterministic steps do not densify: the order
    inside a library's product is its own affair.
    """
    key = (layer.group > 1, layer.pattern is not None, bfloat16_product(x, layer.weight))
    steps = table(layer.weight.device).strategies[key]
    chosen = [name for rows, name in steps if rows <= max(1, len(x))][-1]
    if deterministic and chosen == "densify":
        return layer_strategy(layer)
    return chosen
