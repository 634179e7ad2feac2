"""Random numbers that depend on what is computed, not on what was computed before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def keyed_random(key: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Default generators of the CPU and of `devices` start from `key` inside, and are put back."""
    others = [device for device in devices if device.type != "cpu"]
    kinds = {device.type for device in others}
    if len(kinds) > 1:
        raise ValueError(f"expected devices of one type beside the CPU, got {sorted(kinds)}")
    kind = next(iter(kinds), "cuda")
    indices = [device.index or 0 for device in others]
    with torch.random.fork_rng(devices=indices, device_type=kind):
        torch.default_generator.manual_seed(key)
        for index in indices:
            # Not torch.manual_seed, which seeds what is not put back too.
            torch.get_device_module(kind).default_generators[index].manual_seed(key)
        yield


def mixed(*numbers: int) -> int:
    """A key of 63 bits from integers in order, by rounds of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


_MASK = (1 << 64) - 1
