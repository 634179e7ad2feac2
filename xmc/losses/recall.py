"""A smooth recall at k, and mixtures of positives as further keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from xmc.losses.gradient import differentiable
from xmc.losses.targets import checked_weights, designated, mean_weights
from xmc.types import SparseLabels
from xmc_kernels import similarity
from xmc_kernels.pairs import Pairs

KS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Mixup:
    """Further keys `share * k[first] + (1 - share) * k[second]`, of positives of the same query."""

    first: Tensor  # [V] int64, keys
    second: Tensor  # [V] int64, keys
    share: Tensor  # [V] in [0, 1]

    def __len__(self) -> int:
        return self.first.shape[0]


def draw_mixup(
    positives: SparseLabels, num: int, *, generator: torch.Generator | None = None
) -> Mixup:
    """Up to `num` pairs of two positives of a random query, with shares uniform in [0, 1].

    On the CPU. Queries with less than two positives have none to mix.
    """
    counts = positives.counts()
    rows = (counts > 1).nonzero()[:, 0]
    if len(rows) == 0:
        none = torch.zeros(0, dtype=torch.int64)
        return Mixup(none, none.clone(), torch.zeros(0))
    row = rows[torch.randint(len(rows), (num,), generator=generator)]
    count, start = counts[row], positives.indptr[row]
    first = (torch.rand(num, generator=generator, dtype=torch.float64) * count).long()
    step = 1 + (torch.rand(num, generator=generator, dtype=torch.float64) * (count - 1)).long()
    second = (first + step) % count
    keys = positives.indices.long()
    return Mixup(keys[start + first], keys[start + second], torch.rand(num, generator=generator))


def recall_at_k(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    *,
    positives: SparseLabels | None = None,
    ks: Sequence[int] = KS,
    query_ids: Tensor | None = None,  # [Bq] int64
    key_ids: Tensor | None = None,  # [Bk] int64
    weights: Tensor | None = None,  # [Bq]
    mixup: Mixup | None = None,
    rank_temperature: float = 0.01,
    cut_temperature: float = 1.0,
) -> Tensor:  # [] float32, float64 where q is
    """One minus the mean smooth recall at ks: arXiv 2108.11179, eq. 4 - 8, with its constants.

    The rank of a positive x of query i is `1 + sum over keys z != x of sigmoid((S_iz - S_ix) /
    rank_temperature)`, `S = q @ k.T`; it counts `sigmoid((k - rank) / cut_temperature)` towards the
    hits, which are cut at k and divided by `min(k, positives of i)`. The mean over rows with
    positives is weighted by `weights`. Positives, masks by ids (equal ids of all queries and keys
    take out a query itself), errors and memory as in `info_nce`; a positive costs a sigmoid for
    each key, twice. Differentiable once, in q and k.

    `mixup` adds mixtures of keys as further keys (section 3.3). Similarities of a mixture are
    mixtures of similarities, so no more than V rows are added to k. A mixture is a positive of
    the queries that both its keys are positives of; its id is that of the first.
    """
    pairs = designated(q, k, positives, query_ids, key_ids)
    if mixup is not None:
        pairs = _with_mixtures(pairs, mixup, len(k))
        share = mixup.share.to(k.dtype)[:, None]
        mixed = share * k[mixup.first] + (1 - share) * k[mixup.second]
        k = torch.cat([k, mixed])
    row_weight = checked_weights(weights, len(q), q)
    row_weight = mean_weights(torch.where(pairs.indptr.diff() > 0, row_weight, 0))

    def compute(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        q, k = tensors
        return similarity.recall_loss(
            q,
            k,
            pairs,
            row_weight,
            ks=tuple(ks),
            rank_temperature=rank_temperature,
            cut_temperature=cut_temperature,
            want_q=wanted[0],
            want_k=wanted[1],
        )

    return differentiable(compute, q, k)


def _with_mixtures(pairs: Pairs, mixup: Mixup, num_keys: int) -> Pairs:
    """The pairs with those of the mixtures, which are keys from num_keys on."""
    for name, keys in (("first", mixup.first), ("second", mixup.second)):
        if len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < num_keys:
            raise ValueError(
                f"expected mixup.{name} in [0, {num_keys}), the keys, "
                f"got {int(keys.min())} to {int(keys.max())}"
            )
    device = pairs.indices.device
    indptr, indices, first, second = (
        t.cpu().numpy() for t in (pairs.indptr, pairs.indices, mixup.first, mixup.second)
    )
    shape = (len(indptr) - 1, num_keys)
    given = scipy.sparse.csr_array((np.ones(len(indices), np.int8), indices, indptr), shape=shape)
    by_key = given.tocsc()
    both = by_key[:, first].multiply(by_key[:, second])
    joined = scipy.sparse.csr_array(scipy.sparse.hstack([given, both], format="csr"))
    joined.sort_indices()
    key_ids = pairs.key_ids
    return Pairs(
        torch.from_numpy(joined.indptr.astype(np.int64)).to(device),
        torch.from_numpy(joined.indices.astype(np.int32)).to(device),
        pairs.query_ids,
        None if key_ids is None else torch.cat([key_ids, key_ids[mixup.first]]),
    )


class RecallAtK(nn.Module):
    """`recall_at_k` with its constants; in training `num_mixtures` mixtures are drawn each time."""

    def __init__(
        self,
        ks: Sequence[int] = KS,
        *,
        num_mixtures: int = 0,
        rank_temperature: float = 0.01,
        cut_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.ks, self.num_mixtures = tuple(ks), num_mixtures
        self.rank_temperature, self.cut_temperature = rank_temperature, cut_temperature

    def forward(
        self,
        q: Tensor,  # [Bq, D]
        k: Tensor,  # [Bk, D]
        *,
        positives: SparseLabels | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:  # []
        """The loss; arguments as in `recall_at_k`."""
        mixup = None
        if self.training and self.num_mixtures and positives is not None:
            drawn = draw_mixup(positives.to("cpu"), self.num_mixtures)
            mixup = Mixup(*(t.to(k.device) for t in (drawn.first, drawn.second, drawn.share)))
        return recall_at_k(
            q,
            k,
            positives=positives,
            ks=self.ks,
            query_ids=query_ids,
            key_ids=key_ids,
            weights=weights,
            mixup=mixup,
            rank_temperature=self.rank_temperature,
            cut_temperature=self.cut_temperature,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"ks={self.ks}, num_mixtures={self.num_mixtures}"
