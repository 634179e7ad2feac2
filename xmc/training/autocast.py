"""Autocast around passes that run later than the forward pass they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@contextmanager
def without_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    """Backward passes run in the types that their forward pass chose."""
    with ExitStack() as stack:
        for kind in _kinds(devices):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@dataclass(frozen=True)
class Autocast:
    """The autocast settings of some devices at one moment."""

    settings: tuple[tuple[str, torch.dtype, bool], ...]  # device type, dtype, enabled

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> Autocast:
        return cls(
            tuple(
                (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
                for kind in _kinds(devices)
            )
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same settings; weights cast inside are forgotten behind it."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self.settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def _kinds(devices: Iterable[torch.device]) -> list[str]:
    return sorted({"cpu", *(device.type for device in devices)})
