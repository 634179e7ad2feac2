"""Hard negatives of a dual encoder: the wrong labels nearest to each training document."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc.config import NegativesConfig
from xmc.data.batches import Dataset
from xmc.data.label_store import LabelTexts
from xmc.heads.retrieval import RetrievalHead
from xmc.model import XMCModel
from xmc.nn.tower import Tower
from xmc.training.progress import Track, untracked
from xmc.types import LabelShard, SparseLabels


def mining_is_due(options: NegativesConfig, epoch: int) -> bool:
    """Whether an epoch (0-based) begins with a mining."""
    since = epoch - options.start
    return options.per_document > 0 and since >= 0 and since % options.every == 0


@torch.no_grad()
def embed_labels_(
    model: XMCModel, texts: LabelTexts, *, batch_size: int, track: Track = untracked
) -> None:
    """Give the head the embeddings of all labels that have a text; others stay 0.

    Goes by `batch_size` labels; without dropout, and torch's random state is not touched. On
    several ranks each embeds those of its shard, in as many passes as the others, which encoders
    that talk to each other (FSDP) need. Sends nothing else.
    """
    head = model.retrieval
    tower, shard = label_tower(model), head.shard
    device = head.embeddings.device
    embeddings = torch.zeros_like(head.embeddings)
    rows = texts.known.nonzero().flatten()
    shards = (
        LabelShard.partition(head.num_labels, rank, head.world.size)
        for rank in range(head.world.size)
    )
    most = max(len(_inside(rows, other)) for other in shards)
    own = _inside(rows, shard)
    training = tower.training
    tower.eval()
    try:
        for start in track(range(0, most, batch_size), "labels"):
            chosen = own[start : start + batch_size]
            # A rank without labels left encodes one in vain.
            read = chosen if len(chosen) else rows[:1]
            reps = tower(texts.features.rows(read).to(device)).float()
            embeddings[(chosen - shard.start).to(device)] = reps[: len(chosen)].to(embeddings.dtype)
    finally:
        tower.train(training)
    head.set_embeddings_(embeddings, texts.known[shard.start : shard.stop])


def _inside(rows: Tensor, shard: LabelShard) -> Tensor:
    """The labels of a shard among rising ones."""
    return rows[(rows >= shard.start) & (rows < shard.stop)]


@torch.no_grad()
def mine(
    model: XMCModel,
    data: Dataset,
    options: NegativesConfig,
    *,
    batch_size: int,
    track: Track = untracked,
) -> Tensor:  # [N, pool] int32
    """The nearest labels of each row that are none of its own nor filtered; -1 for none.

    By the embeddings that the head holds, the nearest `skip` left out. On several ranks each
    encodes a share of every batch and compares it with its labels, and all get the same.
    """
    head = model.retrieval
    device = head.embeddings.device
    found = torch.full((len(data), options.pool), -1, dtype=torch.int32)
    for start in track(range(0, len(data), batch_size), "negatives"):
        batch = data.batch(torch.arange(start, min(start + batch_size, len(data)))).to(device)
        wrong = batch.labels if batch.exclude is None else _joined(batch.labels, batch.exclude)
        best = head.topk(model.reps(batch.inputs), options.skip + options.pool, wrong)
        found[start : start + len(batch)] = best.labels[:, options.skip :].int().cpu()
    return found


def document_tower(model: XMCModel) -> Tower:
    """The documents' side of a dual encoder; shares its weights."""
    return Tower(model.encoder, model.intermediate)


def label_tower(model: XMCModel) -> Tower:
    """The labels' side of a dual encoder: that of the documents where they are tied."""
    head: RetrievalHead = model.retrieval
    return document_tower(model) if head.label_tower is None else head.label_tower


def _joined(one: SparseLabels, other: SparseLabels) -> SparseLabels:
    """The labels of each row of either, sorted and distinct."""
    rows, labels = (
        torch.cat(parts)
        for parts in zip(*(x.tile(0, x.num_labels) for x in (one, other)), strict=True)
    )
    keys = (rows * one.num_labels + labels).unique()
    counts = torch.bincount(keys // one.num_labels, minlength=len(one))
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseLabels(indptr, (keys % one.num_labels).int(), one.num_labels)
