"""Contrastive losses of any batch: every query against every key, [Bq, Bk] never exists.

Each is a function and a module. Gradients are computed with the loss, tile by tile, and kept
instead of a graph: [Bq, D] and [Bk, D]. Inputs are taken as they are: normalise them for cosines.

    loss = InfoNCE(scale=20.0, learnable=True, symmetric=True)
    q, k = (torch.nn.functional.normalize(encoder(x), dim=1) for x in (documents, label_texts))
    loss(q, k, query_ids=labels, key_ids=labels).backward()

Over several ranks: `info_nce`, `sigmoid_loss` and their modules take the `world` of the ranks,
`World.current()` of `xmc.distributed.collectives`. q, k, ids and weights are then the rows of this
rank, any number of them, and the loss is that of the rows of all ranks, joined in order of rank:
- Key i of a rank is the positive of its query i unless `positives` are given, whose columns are
  the keys of all ranks: those of rank 0, then those of rank 1. Ids mean the same on every rank.
- Every rank gets the value of the same global loss. What its backward pass leaves in q and k is
  the gradient of that loss, so the sum over ranks of a parameter's gradients, the scale's among
  them, is the parameter's gradient. DistributedDataParallel and FSDP take the mean over ranks:
  multiply the loss by `world.size` for them. Parameters outside of these, like a learnable scale,
  want an all-reduce of their own, as a sum.
- `exchange="ring"` sends keys from rank to rank while tiles are computed, and holds those of two
  ranks; "gather" holds all, with fewer and larger messages. "auto" gathers up to 64 MiB of keys and
  their gradients. A rank with b keys of D features of s bytes sends about `2 (N - 1) b D s` bytes
  of keys (once gathered, the half of it; `sigmoid_loss` always) and `4 N b D` of gradients, beside
  28 bytes a key of statistics where the loss is symmetric and 8 of ids.
- `wire_dtype=torch.bfloat16` rounds the keys where they travel, and as the loss sees them; nothing
  in one process. Statistics and gradients stay float32.
- All ranks call the loss together, and again where backward runs twice on one graph. What does not
  fit on one of them raises on all.
"""

from xmc.losses.info_nce import InfoNCE, info_nce
from xmc.losses.recall import Mixup, RecallAtK, draw_mixup, recall_at_k
from xmc.losses.sigmoid import SigmoidLoss, sigmoid_loss

__all__ = [
    "InfoNCE",
    "Mixup",
    "RecallAtK",
    "SigmoidLoss",
    "draw_mixup",
    "info_nce",
    "recall_at_k",
    "sigmoid_loss",
]
