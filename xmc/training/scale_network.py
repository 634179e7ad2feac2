"""What a network does to messages: bytes a second and seconds a turn, read from a command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from xmc.config import ConfigError
from xmc.training.scale_traffic import Message

_PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Network:
    """Of each rank, both ways at once: Hockney's model, without overlap or congestion."""

    bandwidth: float
    """Bytes a second."""
    latency: float
    """Seconds of a message of no bytes."""

    def seconds(self, messages: Iterable[Message]) -> float:
        return sum(m.turns * self.latency + m.bytes / self.bandwidth for m in messages)


# Assumed, not measured: 10 Gbit/s Ethernet; a 200 Gbit/s adapter for each GPU.
ETHERNET = Network(1.25e9, 50e-6)
INFINIBAND = Network(25e9, 20e-6)


def parse_bandwidth(text: str) -> float:
    """Bytes a second of "25GB/s" or "10Gbit/s". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)(b|bit)/s\s*", text.lower())
    if not match or match[2] not in _PREFIXES or not float(match[1]):
        raise ConfigError(f'--bandwidth: expected a rate such as 25GB/s or 10Gbit/s, got "{text}"')
    return float(match[1]) * _PREFIXES[match[2]] / (8 if match[3] == "bit" else 1)


def parse_latency(text: str) -> float:
    """Seconds of "20us" or "0.1ms". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([num]?s)\s*", text.lower())
    if not match:
        raise ConfigError(f'--latency: expected a time such as 20us or 0.1ms, got "{text}"')
    return float(match[1]) * _SECONDS[match[2]]


def parse_ranks(text: str) -> tuple[int, ...]:
    """Numbers of "8", "1,8,64", or "1..1000": powers of two up to, and with, the last.

    Rising and distinct. Raises ConfigError for anything else.
    """
    first, dots, last = text.partition("..")
    try:
        ends = (int(first), int(last)) if dots else None
        found = () if dots else tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(
            f'--ranks: expected numbers such as "8", "1,8,64" or "1..1000", got "{text}"'
        ) from None
    if ends is not None:
        return _doublings(*ends)
    if found[0] < 1:
        raise ConfigError(f"--ranks: expected at least 1 rank, got {found[0]}")
    return found


def _doublings(first: int, last: int) -> tuple[int, ...]:
    if not 1 <= first <= last:
        raise ConfigError(f'--ranks: expected a range such as 1..1000, got "{first}..{last}"')
    found = [first]
    while 2 * found[-1] < last:
        found.append(2 * found[-1])
    return tuple(found) if found[-1] == last else (*found, last)
