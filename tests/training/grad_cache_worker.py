"""One gloo process of the gradient cache's test: `grad_cache_worker.py RANK WORLD_SIZE FOLDER`.

Takes steps on its share of the rows under several arrangements of wrapped encoders, and writes the
gradients and the numbers of all-reduces to FOLDER/result-RANK.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmc.training.cached import cached
from xmc.training.deep_distance import pair_scores
from xmc.training.grad_cache import cached_step

D = 5
SHARES = (9, 4)  # rows of each rank: 3 chunks against 2
CHUNK = 3


def loss(q: Tensor, k: Tensor) -> Tensor:
    """Of the local rows, summed: the mean over ranks is half of the whole."""
    return F.cross_entropy(3 * q @ k.T, torch.arange(len(q)), reduction="sum")


def plain(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    loss(f(q), g(k)).backward()


def step(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    cached_step([f, g], [q, k], loss, chunk=CHUNK)


def step_kept(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    cached_step([f, g], [q, k], loss, chunk=CHUNK, kept=99)


def step_twice(f: Any, g: Any, q: Tensor, k: Tensor) -> None:
    """Two halves, the first inside a `no_sync` of the caller's."""
    with f.no_sync(), g.no_sync():
        cached_step([f, g], [q, k], lambda q, k: loss(q, k) / 2, chunk=CHUNK)
    cached_step([f, g], [q, k], lambda q, k: loss(q, k) / 2, chunk=CHUNK)


def step_quiet(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    cached_step([f, g], [q, k], lambda q, k: loss(q, k) / 2, chunk=CHUNK, synchronize=False)
    cached_step([f, g], [q, k], lambda q, k: loss(q, k) / 2, chunk=CHUNK)


def step_inside(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    """The wrapper is a part of the encoder."""
    f = nn.Sequential(f, nn.Identity())
    cached_step([f, lambda x: g(x)], [q, k], loss, chunk=CHUNK)


def step_decorated(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    encode = cached(chunk=CHUNK)
    loss(encode(f)(q), encode(g)(k)).backward()


def step_deep(f: nn.Module, g: nn.Module, q: Tensor, k: Tensor) -> None:
    """A wrapped network scores tiles of pairs: here the dot product of two towers."""
    scores = pair_scores(lambda q, k: f(q) @ g(k).T, q, k, tile=CHUNK)
    F.cross_entropy(3 * scores, torch.arange(len(q)), reduction="sum").backward()


# Function, whether both inputs share an encoder, and all-reduces a step.
STEPS: dict[str, tuple[Callable[..., None], bool, int]] = {
    "two": (step, False, 2),
    "tied": (step, True, 1),
    "kept": (step_kept, True, 1),
    "outer no_sync": (step_twice, False, 2),
    "synchronize": (step_quiet, True, 1),
    "inside": (step_inside, False, 2),
    "decorated": (step_decorated, False, 2),
    "deep": (step_deep, False, 2),
}


def data() -> tuple[Tensor, Tensor]:
    """The rows of all processes."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(13, D, generator=generator), torch.randn(13, D, generator=generator)


def towers(tied: bool) -> list[nn.Module]:
    torch.manual_seed(2)
    made = [nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D)) for _ in range(2)]
    return [made[0], made[0]] if tied else list(made)


def counted_mean(count, bucket):  # type: ignore[no-untyped-def]
    """What DistributedDataParallel does by itself; it takes no annotations as strings."""
    count[0] += 1
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / dist.get_world_size())


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    start = sum(SHARES[:rank])
    q, k = (x[start : start + SHARES[rank]] for x in data())
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    results: dict[str, Any] = {}
    for name, (function, tied, _) in STEPS.items():
        made = towers(tied)
        count = [0]

        wrapped = {module: DistributedDataParallel(module) for module in dict.fromkeys(made)}
        for wrapper in wrapped.values():
            wrapper.register_comm_hook(count, counted_mean)
        for _ in range(2):  # the second step has its buckets in the order of gradients
            count[0] = 0
            for module in made:
                module.zero_grad()
            function(*(wrapped[module] for module in made), q, k)
        named = [(i, n, p) for i, m in enumerate(made) for n, p in m.named_parameters()]
        grads = {f"{i}.{n}": p.grad for i, n, p in named}
        results[name] = {"all_reduces": count[0], "grads": grads}
    torch.save(results, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
