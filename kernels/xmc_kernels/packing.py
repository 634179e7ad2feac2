"""Packed indices: log2(m) bits a slot where n of every m consecutive inputs are read.

Slot k of a row lies in block k // n and names input `(k // n) * m + local`; only `local` is
stored, in bits [k b, (k + 1) b) of the row's bytes, lowest bit first, b = log2(m). A row takes
ceil(F b / 8) bytes, the last bits zero. F = n D / m. Source: SRigL, arXiv 2305.02299.

Any index is n = F inputs of one block that holds them all, m the power of two from D up: it takes
ceil(log2 D) bits a slot, and the inputs are still free. That is a form for files and prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = (4, 8, 16, 32)
"""The m that exist where there are several blocks."""
WIDEST = 2**15
"""The largest m: above it, an index packed into one block takes as many bits as uint16."""
_TILE = 2**20  # slots packed or unpacked at a time: their bits take eight times as much


def check_pattern(pattern: tuple[int, int], fan_in: int, in_features: int) -> None:
    """Raise ValueError unless n of every m consecutive inputs make this fan-in."""
    n, m = pattern
    if pattern == one_block(fan_in, in_features):
        return
    if m not in BLOCKS:
        raise ValueError(f"expected pattern (n, m) with m of {BLOCKS}, got m = {m}")
    if not 1 <= n <= m:
        raise ValueError(f"expected pattern (n, m) with n in [1, {m}], got n = {n}")
    if in_features % m:
        raise ValueError(f"expected pattern ({n}, {m}) to divide {in_features} features by {m}")
    if fan_in * m != n * in_features:
        raise ValueError(
            f"expected fan-in {n * in_features // m} for {n} of every {m} of {in_features} "
            f"features, got {fan_in}"
        )


def one_block(fan_in: int, in_features: int) -> tuple[int, int] | None:
    """The pattern of a free index that is packed; None where uint16 or int32 is as small."""
    m = max(BLOCKS[0], 1 << (in_features - 1).bit_length())
    return (fan_in, m) if m <= WIDEST else None


def pattern_fan_in(pattern: tuple[int, int], in_features: int) -> int:
    """F: n of each block, of which there may be one that is not full."""
    n, m = pattern
    return n * max(1, in_features // m)


def slot_bits(pattern: tuple[int, int]) -> int:
    """B = log2(m), the bits of a slot."""
    return pattern[1].bit_length() - 1


def packed_bytes(fan_in: int, pattern: tuple[int, int]) -> int:
    """Bytes of a row."""
    return -(-fan_in * slot_bits(pattern) // 8)


def pack_index(index: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Index [R, F] of inputs, sorted per row, as bytes [R, P] uint8.

    Trusts that each run of n slots lies in its block of m inputs: see `checks.validate_index`.
    """
    bits = slot_bits(pattern)
    num_rows, fan_in = index.shape
    width = packed_bytes(fan_in, pattern)
    packed = torch.empty(num_rows, width, dtype=torch.uint8, device=index.device)
    shifts = torch.arange(bits, device=index.device)
    weights = 2 ** torch.arange(8, device=index.device)
    step = max(1, _TILE // fan_in)
    for start in range(0, num_rows, step):
        local = index[start : start + step].to(torch.int32) % pattern[1]
        spread = (local.unsqueeze(2) >> shifts & 1).flatten(1)
        spread = torch.nn.functional.pad(spread, (0, 8 * width - fan_in * bits))
        packed[start : start + step] = (spread.view(-1, width, 8) * weights).sum(2)
    return packed


def unpack_index(packed: Tensor, pattern: tuple[int, int], fan_in: int) -> Tensor:
    """The inputs [R, F] int32 of packed rows [R, P]."""
    n, m = pattern
    bits = slot_bits(pattern)
    first = torch.arange(fan_in, device=packed.device) * bits
    base = torch.arange(fan_in, dtype=torch.int32, device=packed.device) // n * m
    # A slot of up to 15 bits lies in three bytes; behind the last byte there is none to read.
    low, high, top = ((first // 8 + byte).clamp(max=packed.shape[1] - 1) for byte in range(3))
    shift = (first % 8).to(torch.int32)
    out = torch.empty(packed.shape[0], fan_in, dtype=torch.int32, device=packed.device)
    step = max(1, _TILE // fan_in)
    for start in range(0, len(packed), step):
        rows = packed[start : start + step].to(torch.int32)
        words = rows[:, low] | rows[:, high] << 8 | rows[:, top] << 16
        out[start : start + step] = (words >> shift & (m - 1)) + base
    return out
