"""A layer's labels as kernels read them, block by block: index rows, weights and biases.

A block is a few consecutive labels with one index row each, or labels of one group that share one.
Packed indices and weights other than float32 are spelt out for a block at a time, in a buffer that
stays in the first-level cache.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import overload

from xmc_kernels import quantized
from xmc_kernels._cpu import threads
from xmc_kernels._cpu.bfloat16 import widen
from xmc_kernels._cpu.packed import unpack_rows
from xmc_kernels._cpu.quantized import scale_bytes, scale_halves
from xmc_kernels._cpu.vector import at_address, bits_of
from xmc_kernels.layer import Layer
from xmc_kernels.packing import slot_bits

# Fields of every kernel's record, beside those of `threads.record_type`.
ADDRESSES = "x weight weight_scale index bias bad biases widened unpacked_rows offsets shifts"
INTEGERS = (
    "num_tiles features fan_in group chunk block bias_bytes slot_bits row_bytes index_bytes "
    "unpacked widened_size"
)
UPDATED = 1024  # bfloat16 weights that are updated at a time, or a label's if it has more
_WEIGHTS = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    quantized.INT8: np.int8,
    quantized.INT4: np.uint8,
}
_L1 = 2048  # inputs of a block's labels that are spelt out at once, in the first-level cache


def kinds(layer: Layer, width: int) -> tuple:
    """What kernels are compiled for: types of index and weights, labels taken together.

    uint8 is a packed index, or int4 weights; uint16 stands for bfloat16.
    """
    assert layer.index is not None
    index = layer.index.numpy().dtype
    return index.type, _WEIGHTS[layer.weight.dtype], shared_labels(layer, width)


@functools.cache
def _register_floats() -> int:
    """Numbers that all vector registers hold."""
    return 512 if get_host_cpu_features().get("avx512f") else 128


def shared_labels(layer: Layer, width: int) -> int:
    """How many labels of a group a kernel takes at once, a power of two: sums stay in registers."""
    most = max(1, min(8, _register_floats() // 2 // width, layer.group))
    return 1 << (most.bit_length() - 1)


def layer_fields(tiles: np.ndarray, layer: Layer, num_shares: int) -> dict[str, Any]:
    """ADDRESSES, INTEGERS and the first fields; keep the result, it may own copies."""
    layer = layer.contiguous()
    num_tiles, features, _ = tiles.shape
    fan_in, group = layer.fan_in, layer.group
    block = 16 if group > 1 else max(1, min(16, _L1 // fan_in))
    # More where several tiles pass over them.
    chunk = (4096 if num_tiles == 1 else 32768) // fan_in
    chunk = max(1, chunk // 16) * 16
    widened_size = -(-max(block * fan_in, UPDATED) // 16) * 16
    wide = layer.weight.dtype == torch.float32
    return {
        "num_shares": num_shares,
        "num_labels": layer.num_labels,
        "x": tiles,
        "weight": layer.weight,
        "weight_scale": layer.scale,
        "index": layer.index,
        "bias": layer.bias,
        "bad": np.full(num_shares, -1),  # the first label of a share that was refused
        "biases": threads.zeros(num_shares, chunk),
        "num_tiles": num_tiles,
        "features": features,
        "fan_in": fan_in,
        "group": group,
        "chunk": chunk,
        "block": block,
        "bias_bytes": 0 if layer.bias is None else layer.bias.itemsize,
        "widened": None if wide else threads.zeros(num_shares, widened_size),
        "widened_size": widened_size,
        **(
            {}
            if layer.pattern is None
            else _pattern_fields(layer, layer.pattern, num_shares, block)
        ),
    }


def _pattern_fields(
    layer: Layer, pattern: tuple[int, int], num_shares: int, block: int
) -> dict[str, Any]:
    assert layer.index is not None
    (n, m), bits = pattern, slot_bits(pattern)
    unpacked = -(-layer.fan_in // 8) * 8
    return {
        "slot_bits": bits,
        "shifts": _shifts(bits),
        "row_bytes": layer.index.shape[1],
        "index_bytes": layer.index.numel(),
        "unpacked": unpacked,
        "unpacked_rows": np.zeros((num_shares, block, unpacked), np.int32),
        "offsets": np.arange(unpacked, dtype=np.int32) // n * m,  # the first input of a slot
    }


def _shifts(bits: int) -> np.ndarray:
    """Where eight slots begin in their two words, see `packed.unpack_rows`."""
    of_word = np.arange(4, dtype=np.uint64) * bits
    return np.concatenate([of_word, of_word + 4 * (bits % 2)]).astype(np.uint64)


def raise_bad_index(layer: Layer, fields: dict[str, Any]) -> None:
    """Raise ValueError for the first label that a kernel refused."""
    assert layer.index is not None
    refused = fields["bad"][fields["bad"] >= 0]
    if len(refused):
        values = layer.index[refused[0] // fields["group"]].long()
        raise ValueError(
            f"expected index values in [0, {fields['features']}), label {refused[0]} has "
            f"{int(values.min())} to {int(values.max())}"
        )


@njit(forceinline=True)
def share_range(a, share):
    """The labels of a share: consecutive, equally many but for whole blocks of sixteen."""
    start = a.num_labels * share // a.num_shares // 16 * 16
    last = share + 1 == a.num_shares
    return start, a.num_labels if last else a.num_labels * (share + 1) // a.num_shares // 16 * 16


def chains_of(width: int) -> int:
    """How many multiply-adds of one label go on at a time."""
    return 2 if width > 32 else 4


@njit(forceinline=True)
def block_stop(a, start, limit):
    """Where the block that begins at a label ends: with its group, if it has one."""
    stop = min(start + a.block, limit)
    return min(stop, (start // a.group + 1) * a.group) if a.group > 1 else stop


def index_rows(a, index, share, start, count):
    """Where the index rows of a block lie: pointer, first, step from label to label."""
    raise NotImplementedError  # the kernels' is below


@overload(index_rows, jit_options={"forceinline": True})
def _index_rows(a, index, share, start, count):
    def plain(a, index, share, start, count):
        row = start // a.group * a.fan_in
        return index, row, a.fan_in if a.group == 1 else 0

    def packed(a, index, share, start, count):
        first = start // a.group
        last = first + (count if a.group == 1 else 1)
        rows = at_address(np.int32, a.unpacked_rows + share * 4 * a.block * a.unpacked)
        unpack_rows(a, index, first, last, rows)
        return rows, 0, a.unpacked if a.group == 1 else 0

    return packed if index.dtype == types.uint8 else plain


def weight_rows(a, weight, share, start, count):
    """Where the weights of a block lie as float32: pointer, first."""
    raise NotImplementedError  # the kernels' is below


@overload(weight_rows, jit_options={"forceinline": True})
def _weight_rows(a, weight, share, start, count):
    def float32(a, weight, share, start, count):
        return weight, start * a.fan_in

    def bfloat16(a, weight, share, start, count):
        rows = at_address(np.float32, a.widened + share * 4 * a.widened_size)
        widen(weight, start * a.fan_in, count * a.fan_in, bits_of(rows))
        return rows, 0

    def int8(a, weight, share, start, count):
        rows = at_address(np.float32, a.widened + share * 4 * a.widened_size)
        scale_bytes(weight, at_address(np.float32, a.weight_scale), start, count, a.fan_in, rows)
        return rows, 0

    def int4(a, weight, share, start, count):
        rows = at_address(np.float32, a.widened + share * 4 * a.widened_size)
        scale_halves(weight, at_address(np.float32, a.weight_scale), start, count, a.fan_in, rows)
        return rows, 0

    forms = {types.uint16: bfloat16, types.int8: int8, types.uint8: int4}
    return forms.get(weight.dtype, float32)


@njit(forceinline=True)
def refused(a, index, row, step, count, bad, share, start):
    """Whether one of the sorted index rows of a block leaves [0, features); keeps the first."""
    last = a.fan_in - 1
    for i in range(count if step > 0 else 1):
        at = row + i * step
        if index[at] < 0 or index[at + last] >= a.features:
            if bad[share] < 0:
                bad[share] = start + i
            return True
    return False


@njit(error_model="numpy")
def copy_biases(a, into, start, stop):
    """The biases of a chunk as float32; `into` holds zeros where there are none."""
    if a.bias_bytes == 2:
        widen(at_address(np.uint16, a.bias), start, stop - start, bits_of(into))
    elif a.bias_bytes == 4:
        bias = at_address(np.float32, a.bias)
        for i in range(stop - start):
            into[i] = bias[start + i]
