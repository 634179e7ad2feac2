"""Gradient synchronisation of wrapped modules, held back for all backward passes but the last."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from xmc.distributed.collectives import World, gather_rows


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


def check_same_passes(passes: Mapping[nn.Module, int]) -> None:
    """Raise ValueError, on every rank, where ranks plan other numbers of passes through a module.

    Only of modules that FSDP 2 has sharded: they gather their parameters in every pass, and a rank
    with more passes than the others would wait for them for ever. DistributedDataParallel does not
    mind. One all-gather of an integer for each such module.
    """
    for number, (module, own) in enumerate(passes.items()):
        mesh = next((p.device_mesh for p in module.parameters() if hasattr(p, "device_mesh")), None)
        if mesh is None:
            continue
        # Of a mesh with replicas too, the last dimension is that of the shards.
        world = World.current(mesh.get_group(mesh.ndim - 1))
        row = torch.tensor([own], device=mesh.device_type)
        counts = gather_rows(row, [1] * world.size, world).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                "expected as many passes on every rank through a module that FSDP shards, "
                f"got {counts} through module {number}: give all ranks as many chunks"
            )


def _synchronizes(module: nn.Module) -> bool:
    return any(
        callable(getattr(module, name, None)) for name in ("no_sync", "set_requires_gradient_sync")
    )
