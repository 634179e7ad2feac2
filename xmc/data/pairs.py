"""Batches of a dual encoder: documents, and labels as the keys that they are told from.

No label is a key twice, so that no label is its own negative; every label that a document carries
and that is among the keys counts as its positive, wherever it came from. A pair of the filter file
is never mined, but its label may be a key through another document, and then counts as wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc.data.batches import epoch_batches, seeded_generator
from xmc.types import SparseLabels

_PAIR_STREAM = 3  # beside those of xmc.data.batches
_ORDER, _POSITIVE, _NEGATIVE = 0, 1, 2


@dataclass(frozen=True)
class Pairs:
    """The documents and keys of one step."""

    rows: Tensor  # [B] int64
    keys: Tensor  # [K] int64, distinct labels: sampled positives, ascending, then mined ones
    positives: SparseLabels  # B rows over the K keys, at least one in each row
    query_ids: Tensor  # [B] int64, text of the sampled positive
    key_ids: Tensor  # [K] int64, text of each key


def trainable_labels(labels: SparseLabels, known: Tensor) -> SparseLabels:
    """The labels of each row that have a text; copies them."""
    keep = known[labels.indices.long()]
    kept = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return SparseLabels(kept[labels.indptr], labels.indices[keep], labels.num_labels)


def epoch_pairs(
    labels: SparseLabels,  # N rows, with labels that have a text only
    text_ids: Tensor,  # [L] int64, equal where texts are
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    mined: Tensor | None = None,  # [N, P] wrong labels near each row, -1 for none
    per_document: int = 0,
) -> Iterator[Pairs]:
    """The batches of an epoch: every row with a label once, each with one of its labels, drawn.

    Depends on the arguments alone: an epoch interrupted after n batches goes on with `start=n`. Of
    `mined`, each document draws `per_document`, which become keys of the whole batch.
    """

    def generator(what: int) -> torch.Generator:
        return seeded_generator(seed, _PAIR_STREAM, epoch, what)

    counts = labels.counts()
    rows = counts.nonzero().flatten()
    order = rows[torch.randperm(len(rows), generator=generator(_ORDER))]
    drawn = torch.rand(len(labels), generator=generator(_POSITIVE), dtype=torch.float64)
    places = labels.indptr[:-1] + (drawn * counts).long().clamp(max=(counts - 1).clamp(min=0))
    ranks = None
    if mined is not None and per_document:
        noise = torch.rand(mined.shape, generator=generator(_NEGATIVE))
        ranks = noise.masked_fill_(mined < 0, 2.0).argsort(1)[:, :per_document]
    for batch in epoch_batches(order, batch_size, start):
        sampled = labels.indices[places[batch]].long()
        extra = None if mined is None or ranks is None else mined[batch].gather(1, ranks[batch])
        yield make_pairs(batch, labels.rows(batch), sampled, text_ids, extra)


def make_pairs(
    rows: Tensor,  # [B] int64
    labels: SparseLabels,  # B rows of label ids
    sampled: Tensor,  # [B] int64, one of the labels of each row
    text_ids: Tensor,  # [L] int64
    mined: Tensor | None = None,  # any shape, label ids, -1 for none
) -> Pairs:
    """Keys without repeats, and all the positives among them."""
    keys = sampled.unique()
    if mined is not None:
        extra = mined[mined >= 0].long().unique()
        keys = torch.cat([keys, extra[~torch.isin(extra, keys)]])
    return Pairs(rows, keys, _positives(labels, keys), text_ids[sampled], text_ids[keys])


def _positives(labels: SparseLabels, keys: Tensor) -> SparseLabels:
    """B rows over L labels as rows over the positions of those that are keys."""
    in_order, order = keys.sort()
    owners, wanted = labels.tile(0, labels.num_labels)
    places = torch.searchsorted(in_order, wanted).clamp(max=len(keys) - 1)
    found = in_order[places] == wanted
    # As sorted keys, so that positions are sorted within a row.
    pairs = (owners[found] * len(keys) + order[places[found]]).sort().values
    counts = torch.bincount(pairs // len(keys), minlength=len(labels))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return SparseLabels(indptr, (pairs % len(keys)).int(), len(keys))
