"""Gradient synchronisation of wrapped modules, held back for all backward passes but the last."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def synchronizers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The outermost modules that synchronise gradients: DistributedDataParallel, FSDP 1 and 2."""
    found: dict[nn.Module, None] = {}
    for module in modules:
        if _synchronizes(module):
            found[module] = None
        else:
            found.update(dict.fromkeys(synchronizers(module.children())))
    return list(found)


@contextmanager
def synchronized(wrappers: Collection[nn.Module], last: Collection[nn.Module]) -> Iterator[None]:
    """A forward and a backward pass after which only the wrappers in `last` synchronise.

    Those keep their own setting where it can be asked for: inside an outer `no_sync` they stay
    silent. FSDP 2 has a setting that cannot be read, so it is switched on.
    """
    with ExitStack() as stack:
        for wrapper in wrappers:
            hooks: Any = wrapper
            if hasattr(hooks, "set_requires_gradient_sync"):
                hooks.set_requires_gradient_sync(wrapper in last)
            elif wrapper not in last:
                stack.enter_context(hooks.no_sync())
        yield


def _synchronizes(module: nn.Module) -> bool:
    return any(
        callable(getattr(module, name, None)) for name in ("no_sync", "set_requires_gradient_sync")
    )
