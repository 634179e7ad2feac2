"""One gloo process of a DistributedDataParallel test: `ddp_worker.py RANK WORLD_SIZE FOLDER`.

Trains a bag encoder and a sparse layer, wrapped as a user would, for a few steps on its share of
the rows, and writes what it ended with to FOLDER/result-RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmc.nn.encoder import BagEncoder
from xmc.nn.fan_in import FixedFanInLinear
from xmc.nn.lazy import LazyAdamW
from xmc.types import Bag

ROWS, STEPS = 8, 3


class Model(nn.Module):
    """Text to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BagEncoder(40, 12)
        self.layer = FixedFanInLinear(12, 10, 5, group_size=2)

    def forward(self, bag: Bag) -> Tensor:
        scores: Tensor = self.layer(self.encoder(bag))
        return scores


def data(step: int) -> tuple[Bag, Tensor]:
    """The rows of all processes."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.cat([torch.randperm(40, generator=generator)[:6] for _ in range(ROWS)])
    weights = torch.rand(6 * ROWS, generator=generator)
    return Bag(ids, torch.arange(ROWS + 1) * 6, weights), torch.randn(ROWS, 10, generator=generator)


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)  # different weights and patterns, until the wrapper is made
    model = Model()
    drawn = model.layer.index.clone()
    wrapped: nn.Module = model
    if world_size > 1:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        wrapped = DistributedDataParallel(model)
    optimizer = LazyAdamW(wrapped.parameters(), lr=0.05)
    share = ROWS // world_size
    for step in range(STEPS):
        bag, target = data(step)
        mine = slice(rank * share, (rank + 1) * share)
        optimizer.zero_grad()
        scores = wrapped(bag.slice(mine.start, mine.stop))
        (scores - target[mine]).square().sum(1).mean().backward()
        optimizer.step()
    assert model.encoder.table.weight.grad.is_sparse
    torch.save({"drawn": drawn, "state": model.state_dict()}, folder / f"result-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
