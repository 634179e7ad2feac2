"""From an epoch to optimizer steps and their micro-batches, with little padding.

The rows of a step decide its gradient. How they are cut into micro-batches decides time and memory
alone, because heads return gradients of the mean over the whole step (`xmc.heads.head`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xmc.config import TrainConfig
from xmc.data.batches import (
    STEP_STREAM,
    Dataset,
    TokenStore,
    epoch_batches,
    epoch_order,
    seeded_generator,
)


def epoch_steps(
    dataset: Dataset, options: TrainConfig, epoch: int, start: int = 0
) -> Iterator[list[Tensor]]:
    """The micro-batches, row ids [R] int64, of each optimizer step of an epoch.

    Every row once, in an order that depends on the arguments alone. An epoch interrupted after n
    steps goes on with `start=n`.
    """
    features = dataset.features
    store = features if isinstance(features, TokenStore) else None  # bags have no padding
    rows_per_step = options.batch_size * options.accumulation
    order = epoch_order(len(dataset), options.seed, epoch)
    if options.length_pool and store is not None:
        order = bucket_order(
            order,
            store.widths(order),
            batch_size=rows_per_step,
            pool=options.length_pool,
            generator=seeded_generator(options.seed, STEP_STREAM, epoch),
        )
    for rows in epoch_batches(order, rows_per_step, start):
        yield micro_batches(
            rows,
            None if store is None else store.widths(rows),
            batch_size=min(options.batch_size, options.micro_batch or options.batch_size),
            max_tokens=options.max_tokens,
        )


def bucket_order(
    order: Tensor,  # [N] int64
    widths: Tensor,  # [N] int64, tokens of the rows of `order`
    *,
    batch_size: int,
    pool: int,
    generator: torch.Generator,
) -> Tensor:  # [N] int64
    """`order` rearranged, so that slices of `batch_size` rows hold rows of similar width.

    Pools of `pool` slices are sorted by width, rows of equal width as they came, and the slices of
    a pool shuffled. The rows of a short last slice stay, so that it is a fair sample.
    """
    full = len(order) // batch_size * batch_size
    parts = []
    for first in range(0, full, pool * batch_size):
        part = slice(first, min(first + pool * batch_size, full))
        by_width = order[part][widths[part].argsort(stable=True)].view(-1, batch_size)
        parts.append(by_width[torch.randperm(len(by_width), generator=generator)].flatten())
    return torch.cat([*parts, order[full:]])


def micro_batches(
    rows: Tensor,  # [R] int64
    widths: Tensor | None,  # [R] int64, tokens of each row; None: all alike
    *,
    batch_size: int,
    max_tokens: int = 0,
) -> list[Tensor]:
    """The rows of a step, cut into slices of `batch_size` or, if given, of `max_tokens`.

    With `max_tokens` a slice has as many rows as fit `rows * widest <= max_tokens`. Rows of several
    slices are sorted, widest first: what does not fit into memory fails in the first slice.

    Raises ValueError for a row of more than `max_tokens`.
    """
    if widths is None or (len(rows) <= batch_size and not max_tokens):
        return list(rows.split(batch_size))
    widths, by_width = widths.sort(descending=True, stable=True)
    rows = rows[by_width]
    if not max_tokens:
        return list(rows.split(batch_size))
    slices, first = [], 0
    while first < len(rows):
        count = max_tokens // int(widths[first])
        if count == 0:
            raise ValueError(
                f"expected rows of at most {max_tokens} tokens (max_tokens), "
                f"got row {int(rows[first])} of {int(widths[first])}"
            )
        slices.append(rows[first : first + count])
        first += count
    return slices
