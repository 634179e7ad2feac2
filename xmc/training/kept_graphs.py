"""Which chunks keep their graph from the first pass, so that they need no second forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc.training.encoding import Encoding
from xmc.training.gradient_sync import synchronized

Job = tuple[int, int]  # an encoder and one of its chunks


def forward(encodings: list[Encoding], jobs: list[Job], *, kept: int, keep_bytes: int) -> list[Job]:
    """Represent all chunks; returns those that keep their graph.

    Those are the last `kept`, or as many of the first as save at most `keep_bytes` for their
    backward pass, parameters and inputs not counted. An encoder that synchronises its gradients
    does so behind its first chunk, which therefore runs last and keeps none.
    """
    able = [
        (which, index)
        for which, index in jobs
        if encodings[which].needs_grad and not (index == 0 and encodings[which].wrappers)
    ]
    budget = _Budget(keep_bytes)
    last, fit = set(able[max(len(able) - kept, 0) :]), set(able)
    graphs = []
    with_graph = False
    for job in jobs:
        which, index = job
        measured = keep_bytes > 0 and job in fit and budget.has_room()
        if with_graph != (measured or job in last):
            with_graph = not with_graph
            # Weights that autocast has cast without a graph would take no gradient in one.
            torch.clear_autocast_cache()
        encoding = encodings[which]
        with ExitStack() as stack:
            if with_graph:
                stack.enter_context(synchronized(encoding.wrappers, last=()))
            if measured:
                stack.enter_context(budget.measure(encoding.tensors))
            encoding.forward(index, graph=with_graph)
        if measured and not budget.holds():
            encoding.drop_graph(index)
        elif with_graph:
            graphs.append(job)
    torch.clear_autocast_cache()
    return graphs


@contextmanager
def saved_bytes(ignored: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Bytes by storage that graphs made inside save for their backward pass, each counted once."""
    known = {_storage(tensor)[0] for tensor in ignored if tensor.layout == torch.strided}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            address, size = _storage(tensor)
            if address not in known:
                sizes[address] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield sizes


@dataclass
class _Budget:
    limit: int
    used: int = 0
    newest: int = 0
    largest: int = 0

    def has_room(self) -> bool:
        """Whether another chunk as large as the largest so far would fit."""
        return self.used + self.largest <= self.limit

    @contextmanager
    def measure(self, ignored: Iterable[Tensor]) -> Iterator[None]:
        with saved_bytes(ignored) as sizes:
            yield
        self.newest = sum(sizes.values())
        self.largest = max(self.largest, self.newest)

    def holds(self) -> bool:
        """Count the newest chunk in if it fits."""
        fits = self.used + self.newest <= self.limit
        self.used += self.newest if fits else 0
        return fits


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
