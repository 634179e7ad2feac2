"""Tiled contrastive losses as losses of sentence-transformers and its trainer.

They take what that library's losses take, the features of one column of texts after the other and
the labels of the rows, and call the model as it does; nothing of it is imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.losses.info_nce import InfoNCE
from xmc.training.cached import cached
from xmc.training.chunks import Chunk, Chunks, cut, num_rows
from xmc.types import SparseLabels

Features = Mapping[str, Any]
"""A column's tokens, padded: `input_ids` [B, T], `attention_mask` [B, T] and so on."""

_WITHOUT_ROWS = ("offsets", "cu_seq_lens_q")  # static embeddings, flattened texts

_TILES = """@misc{cheng2024breaking,
    title={Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss},
    author={Zesen Cheng and others},
    year={2024},
    eprint={2410.17243},
    archivePrefix={arXiv},
}"""
_CACHE = """@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
}"""
_SUPERVISED = """@misc{khosla2020supervised,
    title={Supervised Contrastive Learning},
    author={Prannay Khosla and others},
    year={2020},
    eprint={2004.11362},
    archivePrefix={arXiv},
}"""


class _TiledLoss(nn.Module, ABC):
    """The representations of all columns, from one model, in whole or by the gradient cache."""

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        symmetric: bool = False,
        learnable: bool = False,
        decoupled: bool = False,
        normalize: bool = True,
        chunk: Chunk | None = None,
    ) -> None:
        super().__init__()
        self.model = model  # by this name the trainer puts a wrapped model in its place
        self.info_nce = InfoNCE(
            scale, learnable=learnable, symmetric=symmetric, decoupled=decoupled
        )
        self.normalize, self.chunk = normalize, chunk
        # Asked for by losses around this one: in backward the model runs again.
        self.uses_gradient_cache = chunk is not None

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:  # []
        """The loss of a batch: features of each column, and a label of each row."""
        columns = list(sentence_features)
        if self.chunk is None:
            parts = [self.model(column)["sentence_embedding"] for column in columns]
            rows, reps = [len(part) for part in parts], torch.cat(parts)
        else:
            wholes = [_with_rows(column) for column in columns]
            rows = [num_rows(column) for column in wholes]
            chunks = Chunks([part for column in wholes for part in cut(column, self.chunk)])
            reps = cached(chunk=1)(self._encode)(chunks)
        if len(set(rows)) > 1:
            raise ValueError(f"expected as many texts in each column, got {rows}")
        if self.normalize:
            reps = F.normalize(reps, dim=1)
        return self._loss(reps, rows, labels)

    @abstractmethod
    def _loss(self, reps: Tensor, rows: list[int], labels: Tensor | None) -> Tensor:
        """The loss of representations [sum(rows), D], one column after the other."""

    def _encode(self, **features: Any) -> Tensor:
        # Poolings that leave a prompt out write into the mask.
        if isinstance(features.get("attention_mask"), Tensor):
            features["attention_mask"] = features["attention_mask"].clone()
        rep: Tensor = self.model(features)["sentence_embedding"]
        return rep

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for a model card."""
        return {
            "scale": round(self.info_nce.scale.item(), 4),
            "learnable": self.info_nce.log_scale.requires_grad,
            "symmetric": self.info_nce.symmetric,
            "decoupled": self.info_nce.decoupled,
            "normalize": self.normalize,
            "chunk": self.chunk if isinstance(self.chunk, int | None) else str(self.chunk),
        }

    @property
    def citation(self) -> str:
        """The method's sources in BibTeX, for a model card."""
        return _TILES if self.chunk is None else f"{_TILES}\n{_CACHE}"


class TiledInBatchLoss(_TiledLoss):
    """Each anchor picks its positive among all positives and negatives of the batch.

    In the place of `MultipleNegativesRankingLoss`, and of its symmetric form, with the same result;
    with `chunk` in that of `CachedMultipleNegativesRankingLoss`. Columns are anchor, positive and
    any number of hard negatives; labels are not read. No matrix of scores exists, in neither pass.

    `normalize` compares by cosines, otherwise by dot products. `symmetric` takes the mean with the
    loss of positives that pick among anchors, `decoupled` leaves positives out of the denominator,
    `learnable` trains the scale (`xmc.losses.InfoNCE`). `chunk`, rows or a
    `xmc.training.chunks.TokenBudget`, runs the model by the gradient cache: any batch in the memory
    of one chunk, for a second forward pass. Such a loss cannot stand inside of `MatryoshkaLoss` or
    `AdaptiveLayerLoss`.

    Raises ValueError for less than two columns, for columns of different numbers of rows and, with
    `chunk`, for inputs that are not padded to rows of tokens.
    """

    def _loss(self, reps: Tensor, rows: list[int], labels: Tensor | None) -> Tensor:
        _check_columns(rows, 2)
        loss: Tensor = self.info_nce(reps[: rows[0]], reps[rows[0] :])
        return loss


class TiledLabelLoss(_TiledLoss):
    """Rows of one label are not each other's negatives: they are positives, or left out.

    Labels are integers, one of each row. With `equal="positives"` an anchor has the positives of
    all rows of its label, each of the same weight (arXiv 2004.11362, eq. 2); a single column of
    texts is enough for it: a row then picks the others of its label, and those without another
    count nothing. With `equal="masked"` it has its own positive, and those of other rows of its
    label enter no sum: no false negatives. Further columns are hard negatives of every row.

    Other options and errors as in `TiledInBatchLoss`; ValueError where labels are missing.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        equal: str = "positives",
        symmetric: bool = False,
        learnable: bool = False,
        decoupled: bool = False,
        normalize: bool = True,
        chunk: Chunk | None = None,
    ) -> None:
        if equal not in ("positives", "masked"):
            raise ValueError(f"expected equal='positives' or 'masked', got {equal!r}")
        super().__init__(
            model,
            scale,
            symmetric=symmetric,
            learnable=learnable,
            decoupled=decoupled,
            normalize=normalize,
            chunk=chunk,
        )
        self.equal = equal

    def _loss(self, reps: Tensor, rows: list[int], labels: Tensor | None) -> Tensor:
        _check_columns(rows, 1 if self.equal == "positives" else 2)
        num, is_single = rows[0], len(rows) == 1
        if labels is None or labels.shape != (num,) or labels.is_floating_point():
            got = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"expected integer labels of shape [{num}], got {got}")
        label = labels.to(reps.device).unique(return_inverse=True)[1]
        q, k = reps[:num], reps if is_single else reps[num:]
        loss: Tensor
        if self.equal == "masked":
            ids = torch.cat([label, label.new_full((len(k) - num,), -1)])
            loss = self.info_nce(q, k, query_ids=label, key_ids=ids)
        elif is_single:
            own = torch.arange(num, device=reps.device)
            others = rows_of_one_label(label, num, with_itself=False)
            loss = self.info_nce(q, k, positives=others, query_ids=own, key_ids=own)
        else:
            loss = self.info_nce(q, k, positives=rows_of_one_label(label, len(k)))
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for a model card."""
        return {**super().get_config_dict(), "equal": self.equal}

    @property
    def citation(self) -> str:
        """The method's sources in BibTeX, for a model card."""
        return f"{super().citation}\n{_SUPERVISED}"


def rows_of_one_label(
    label: Tensor,  # [B] int64, from 0 on
    num_keys: int,
    *,
    with_itself: bool = True,
) -> SparseLabels:
    """For each row the rows of its label, as positives among `num_keys` keys; one entry a pair."""
    rows = torch.arange(len(label), device=label.device)
    counts = torch.bincount(label)
    order = label.argsort(stable=True)  # by label, rising within one
    by_label = SparseLabels(F.pad(counts.cumsum(0), (1, 0)), order.int(), num_keys)
    same = by_label.rows(label)
    if with_itself:
        return same
    other = same.indices != rows.repeat_interleave(same.counts())
    return SparseLabels(same.indptr - F.pad(rows + 1, (1, 0)), same.indices[other], num_keys)


def _with_rows(column: Features) -> Features:
    """A column whose tensors all have a row for each text."""
    for name in _WITHOUT_ROWS:
        if name in column:
            raise ValueError(
                f"expected inputs padded to rows of tokens, to cut them into chunks, got {name}: "
                "leave out chunk"
            )
    whole = dict(column)
    if isinstance(whole.get("prompt_length"), Tensor):  # one number for the whole column
        whole["prompt_length"] = int(whole["prompt_length"].flatten()[0])
    return whole


def _check_columns(rows: list[int], least: int) -> None:
    if len(rows) < least:
        raise ValueError(f"expected at least {least} columns of texts, got {len(rows)}")
