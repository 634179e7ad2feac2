"""What operations on similarities expect of features, pairs, ids and targets."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels import checks
from xmc_kernels._reference.fan_in import compute_dtype
from xmc_kernels.pairs import Pairs


def check(q: Tensor, k: Tensor, pairs: Pairs, **scalars: Tensor) -> None:
    """Raise where shapes, dtypes and devices do not fit together."""
    if q.dim() != 2 or k.dim() != 2 or q.shape[1] != k.shape[1] or 0 in k.shape:
        raise ValueError(
            "expected q [Bq, D] and k [Bk, D] of the same D, with at least one key and feature, "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if q.dtype not in checks.FLOATS or k.dtype != q.dtype:
        raise TypeError(
            "expected q and k both of float32, bfloat16, float16 or float64, "
            f"got {q.dtype} and {k.dtype}"
        )
    if k.device != q.device:
        raise ValueError(f"expected k on {q.device} like q, got {k.device}")
    for name, value in scalars.items():
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"expected {name} as a number or a floating-point tensor of shape [], "
                f"got {value.dtype} {list(value.shape)}"
            )
        if value.device != q.device:
            raise ValueError(f"expected {name} on {q.device} like q, got {value.device}")
    checks.check_rows(pairs.indptr, pairs.indices, len(q), "positives")
    if (pairs.query_ids is None) != (pairs.key_ids is None):
        given, missing = ("key_ids", "query_ids")[:: 1 if pairs.query_ids is None else -1]
        raise ValueError(f"expected {missing} beside {given}, got None")
    for name, ids, size in (
        ("query_ids", pairs.query_ids, len(q)),
        ("key_ids", pairs.key_ids, len(k)),
    ):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            raise TypeError(f"expected {name} of int64, got {ids.dtype}")
        if ids.shape != (size,) or ids.device != q.device:
            raise ValueError(
                f"expected {name} of shape [{size}] on {q.device}, "
                f"got {list(ids.shape)} on {ids.device}"
            )


def check_numbers(name: str, values: Tensor | None, size: int, q: Tensor) -> None:
    """Raise where values are not [size] in the dtype that losses of q are computed in."""
    if values is None:
        return
    if values.shape != (size,) or values.device != q.device:
        raise ValueError(
            f"expected {name} of shape [{size}] on {q.device}, "
            f"got {list(values.shape)} on {values.device}"
        )
    if values.dtype != compute_dtype(q):
        raise TypeError(f"expected {name} of {compute_dtype(q)}, got {values.dtype}")


def check_values(q: Tensor, k: Tensor, indptr: Tensor, indices: Tensor, **scalars: Tensor) -> None:
    """Raise on numbers that are not finite, and on pairs out of range or order."""
    checks.check_finite(q, "q")
    checks.check_finite(k, "k")
    for name, value in scalars.items():
        if not bool(torch.isfinite(value)):
            raise ValueError(f"expected a finite {name}, got {float(value)}")
    checks.check_rows_values(indptr, indices, "positives")
    if indices.shape[0] == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= len(k):
        raise ValueError(f"expected positives in [0, {len(k)}), the keys, got {low} to {high}")
    falls = indices[1:] <= indices[:-1]
    starts = indptr[1:-1]
    falls[starts[(starts > 0) & (starts < len(indices))] - 1] = False
    if bool(falls.any()):
        entry = int(falls.nonzero()[0]) + 1
        row = int(torch.searchsorted(indptr, entry, right=True)) - 1
        raise ValueError(f"expected sorted, distinct positives in each row, row {row} has not")
