"""Contrastive losses of any batch: every query against every key, [Bq, Bk] never exists.

Each is a function and a module. Gradients are computed with the loss, tile by tile, and kept
instead of a graph: [Bq, D] and [Bk, D]. Inputs are taken as they are: normalise them for cosines.
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
