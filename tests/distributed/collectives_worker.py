"""What each rank does in test_collectives.py."""

from __future__ import annotations

from typing import Any

import torch

from xmc.distributed import collectives
from xmc.distributed.collectives import World
from xmc.types import SparseLabels, TopK


def rows(total: int) -> dict[str, Any]:
    world = World.current()
    x = torch.arange(total * 3, dtype=torch.float64).view(total, 3)
    mine = collectives.share(x, world)
    counts = collectives.counts_of(len(mine), world)
    gathered = collectives.gather_rows(mine, counts, world)
    scattered = collectives.scatter_sum((world.rank + 1) * x, counts, world)
    labels = SparseLabels.from_lists([list(range(row)) for row in range(total)], total + 1)
    first = sum(counts[: world.rank])
    part = labels.slice(first, first + len(mine))
    whole = collectives.gather_labels(part, counts, world)
    return {
        "mine": mine,
        "counts": counts,
        "gathered": gathered,
        "scattered": scattered,
        "indptr": whole.indptr,
        "indices": whole.indices,
        "sum": collectives.sum_(torch.tensor(float(world.rank + 1)), world),
        "agreed": collectives.agreed(f"of rank {world.rank}", world),
    }


def topk(scores: torch.Tensor, k: int) -> TopK:
    world = World.current()
    labels = collectives.share(torch.arange(scores.shape[1]), world)
    part = TopK(scores[:, labels], labels.expand(len(scores), -1)).ranked().resized(k)
    return collectives.merge_topk(part, world)
