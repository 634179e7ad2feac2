"""What a loss is given beside features: positives, ids that mask pairs, weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xmc.types import SparseLabels
from xmc_kernels.pairs import Pairs


@dataclass(frozen=True)
class Given:
    """What comes with queries and keys, as `info_nce` takes it."""

    positives: SparseLabels | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    weights: Tensor | None

    def pairs(self, q: Tensor, k: Tensor, *, check_keys: bool = True) -> Pairs:
        """`designated` of these."""
        return designated(q, k, self.positives, self.query_ids, self.key_ids, check_keys=check_keys)


def number(value: float | Tensor, q: Tensor) -> Tensor:
    """A scale or bias as a tensor [] on q's device; a tensor is returned as it is."""
    if isinstance(value, Tensor):
        return value
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=wide, device=q.device)


def designated(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    positives: SparseLabels | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    check_keys: bool = True,  # False: positives are of more keys than these
) -> Pairs:
    """The positive pairs: key i of query i unless given. Checks how sizes fit together."""
    num_queries, num_keys = len(q), len(k)
    if positives is None:
        if num_keys < num_queries:
            raise ValueError(
                f"expected at least {num_queries} keys for as many queries, got {num_keys}: key i "
                "is the positive of query i where no positives are given"
            )
        indptr = torch.arange(num_queries + 1, device=q.device)
        indices = torch.arange(num_queries, dtype=torch.int32, device=q.device)
        return Pairs(indptr, indices, query_ids, key_ids)
    if not check_keys:
        num_keys = positives.num_labels
    if (len(positives), positives.num_labels) != (num_queries, num_keys):
        raise ValueError(
            f"expected positives of {num_queries} queries among {num_keys} keys, "
            f"got {len(positives)} among {positives.num_labels}"
        )
    if positives.device != q.device:
        raise ValueError(f"expected positives on {q.device} like q, got {positives.device}")
    return Pairs(positives.indptr, positives.indices, query_ids, key_ids)


def checked_weights(
    weights: Tensor | None, size: int, q: Tensor, name: str = "weights"
) -> Tensor:  # [size]
    """Weights in float32 (float64 where q is), ones where None; none may be negative or NaN."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if weights is None:
        return torch.ones(size, dtype=wide, device=q.device)
    if weights.shape != (size,) or weights.device != q.device:
        raise ValueError(
            f"expected {name} of shape [{size}] on {q.device}, "
            f"got {list(weights.shape)} on {weights.device}"
        )
    if weights.requires_grad:
        raise ValueError(f"expected {name} without a gradient, got a tensor that requires one")
    wrong = ~((weights >= 0) & (weights < torch.inf))
    if bool(wrong.any()):
        entry = int(wrong.nonzero()[0])
        raise ValueError(
            f"expected finite {name} of at least 0, got {float(weights[entry])} at {entry}"
        )
    return weights.to(wide)


def mean_weights(weights: Tensor) -> Tensor:
    """Weights divided by their sum; zeros where that is zero."""
    total = weights.sum(dtype=torch.float64)
    return torch.where(total > 0, weights / total, 0).to(weights.dtype)


def rows_of(pairs: Pairs) -> Tensor:  # [nnz] int64
    """The query of each designated pair."""
    queries = torch.arange(len(pairs.indptr) - 1, device=pairs.indptr.device)
    return queries.repeat_interleave(pairs.indptr.diff())


def normalised(values: Tensor, group: Tensor, num_groups: int) -> Tensor:  # [nnz]
    """Values divided by the sum of their group; zeros where that is zero."""
    total = values.new_zeros(num_groups).scatter_add_(0, group, values)[group]
    return torch.where(total > 0, values / total, 0)
