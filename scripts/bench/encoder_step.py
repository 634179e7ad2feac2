"""Time one training step of the bag encoder: forward, backward and the optimizer.

    python scripts/bench/encoder_step.py [--features 100000] [--dim 512] [--rows 128] [--ngrams 400]

Compares `BagEncoder` + `LazyAdamW` with `nn.EmbeddingBag(sparse=True)` + `SparseAdam`, and with the
same module over the plain torch definitions of its two operations. Feature ids follow a power law;
six batches take turns, so that no batch stays in the cache. Appends one line per variant to
`scripts/bench/results/encoder_step.jsonl`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from provenance import RESULTS, append, provenance
from torch import nn

from xmc.nn.encoder import BagEncoder
from xmc.nn.lazy import LazyAdamW
from xmc.types import Bag
from xmc_kernels._reference.bag_sum import bag_sum
from xmc_kernels._reference.lazy_adamw import lazy_adamw_

BATCHES = 6


def make_batches(features: int, rows: int, ngrams: int) -> list[Bag]:
    """Bags whose ids follow 1 / rank^0.75, distinct within a row."""
    draw = np.random.default_rng(0)
    share = 1 / np.arange(1, features + 1) ** 0.75
    share /= share.sum()
    bags = []
    for _ in range(BATCHES):
        ids = [np.unique(draw.choice(features, size=ngrams, p=share)) for _ in range(rows)]
        offsets = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0)
        flat = torch.from_numpy(np.concatenate(ids))
        bags.append(Bag(flat, offsets, torch.rand(len(flat)) / ngrams**0.5))
    return bags


def ours(features: int, dim: int, d_reps: torch.Tensor) -> Callable[[Bag], None]:
    encoder = BagEncoder(features, dim)
    optimizer = LazyAdamW(encoder.parameters(), lr=1e-3, weight_decay=0.0)

    def step(bag: Bag) -> None:
        encoder(bag).backward(d_reps)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(features: int, dim: int, d_reps: torch.Tensor) -> Callable[[Bag], None]:
    step = ours(features, dim, d_reps)

    def reference_adamw(*tensors: torch.Tensor, betas: tuple[float, float], **options: float):  # type: ignore[no-untyped-def]
        lazy_adamw_(*tensors, beta1=betas[0], beta2=betas[1], **options)

    def patched(bag: Bag) -> None:
        with (
            mock.patch("xmc.nn.encoder.bag_sum", bag_sum),
            mock.patch("xmc.nn.lazy.lazy_adamw_", reference_adamw),
        ):
            step(bag)

    return patched


def torch_modules(features: int, dim: int, d_reps: torch.Tensor) -> Callable[[Bag], None]:
    table = nn.EmbeddingBag(features, dim, mode="sum", sparse=True, include_last_offset=True)
    bias = nn.Parameter(torch.zeros(dim))
    optimizers = [
        torch.optim.SparseAdam(table.parameters(), lr=1e-3),
        torch.optim.AdamW([bias], lr=1e-3),
    ]

    def step(bag: Bag) -> None:
        F.relu(table(bag.ids, bag.offsets, bag.weights) + bias).backward(d_reps)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--ngrams", type=int, default=400)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bags = make_batches(options.features, options.rows, options.ngrams)
    d_reps = torch.randn(options.rows, options.dim) / options.rows
    variants = {
        "BagEncoder + LazyAdamW": ours(options.features, options.dim, d_reps),
        "the same, plain torch operations": plain(options.features, options.dim, d_reps),
        "nn.EmbeddingBag + SparseAdam": torch_modules(options.features, options.dim, d_reps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(-2, options.repeats):
        for name, step in variants.items():
            started = time.perf_counter()
            step(bags[repeat % BATCHES])
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        low, median, high = (round(1e3 * float(q), 2) for q in np.quantile(values, [0.2, 0.5, 0.8]))
        line = {
            "what": name,
            "median_ms": median,
            "p20_ms": low,
            "p80_ms": high,
            **vars(options),
            "entries": int(np.mean([len(bag.ids) for bag in bags])),
            "distinct": int(np.mean([len(bag.ids.unique()) for bag in bags])),
            "dtype": "float32",
            **provenance(),
        }
        append(RESULTS / "encoder_step.jsonl", [line])
        print(f"{name:36s} {median:8.2f} ms  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
