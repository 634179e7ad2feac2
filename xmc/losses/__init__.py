"""Contrastive losses of any batch: every query against every key, [Bq, Bk] never exists.

Each is a function and a module. Gradients are computed with the loss, tile by tile, and kept
instead of a graph: [Bq, D] and [Bk, D]. Inputs are taken as they are: normalise them for cosines.

    loss = InfoNCE(scale=20.0, learnable=True, symmetric=True)
    q, k = (torch.nn.functional.normalize(encoder(x), dim=1) for x in (documents, label_texts))
    loss(q, k, query_ids=labels, key_ids=labels).backward()
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
