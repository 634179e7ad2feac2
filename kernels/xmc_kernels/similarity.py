"""Losses of all similarities `S = scale * q @ k.T` with their gradients: [Bq, Bk] never exists.

One loop over tiles of S; losses differ in the gradient tile `G = dL/dS` alone. The operations
return loss and gradients together, for they come from the same tiles; `xmc.losses` makes
differentiable functions of them. Autocast changes nothing: products are as wide as said here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xmc_kernels import checks
from xmc_kernels._reference import similarity as reference
from xmc_kernels._reference.fan_in import compute_dtype
from xmc_kernels.pairs import Pairs

__all__ = ["Pairs", "recall_loss", "sigmoid_loss", "softmax_loss"]


@torch.no_grad()
def softmax_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    row_target: Tensor,  # [nnz]
    column_target: Tensor | None = None,  # [nnz]
    *,
    decoupled: bool = False,
    want_q: bool = True,
    want_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss [], dq [Bq, D], dk [Bk, D], dscale []
    """`sum over designated (i, j) of row_target * (r_i - S_ij) + column_target * (c_j - S_ij)`.

    `r_i = logsumexp_j S_ij` and `c_j = logsumexp_i S_ij` (only with a column_target) leave out
    masked pairs, and with `decoupled` the designated ones. A row or column whose denominator is
    left empty adds nothing, in value or gradient. Targets carry all weights: `1 / B` each is the
    mean. Loss and dscale are float32 (float64 where q is), dq and dk have the inputs' dtype and no
    rows where not wanted; dscale is 0 if neither is. Four products of B^2 D multiply-adds where
    both gradients are wanted, tiles of S and a few numbers per row beside the results.

    Raises ValueError or TypeError where arguments do not fit together, on features that are not
    finite and on keys of pairs out of range.
    """
    _check(q, k, pairs, scale=scale)
    for name, target in (("row_target", row_target), ("column_target", column_target)):
        _check_numbers(name, target, pairs.num_pairs, q)
    with torch.autocast(q.device.type, enabled=False):
        return _softmax_loss(
            *(q, k, scale, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids),
            *(row_target, column_target, decoupled, want_q, want_k),
        )


@torch.no_grad()
def sigmoid_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    pairs: Pairs,
    row_weight: Tensor,  # [Bq]
    *,
    want_q: bool = True,
    want_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, dq, dk, dscale, dbias
    """`sum over i, j of row_weight_i * softplus(-y_ij * (S_ij + bias))`; masked pairs add nothing.

    y is 1 for a designated pair, -1 otherwise (SigLIP, arXiv 2303.15343). Dtypes and wanted
    gradients as in `softmax_loss`; dbias is always there. Three products: S is built once.
    """
    _check(q, k, pairs, scale=scale, bias=bias)
    _check_numbers("row_weight", row_weight, len(q), q)
    with torch.autocast(q.device.type, enabled=False):
        return _sigmoid_loss(
            *(q, k, scale, bias, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids),
            *(row_weight, want_q, want_k),
        )


@torch.no_grad()
def recall_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    pairs: Pairs,
    row_weight: Tensor,  # [Bq]
    *,
    ks: tuple[int, ...] = (1, 2, 4, 8, 16),
    rank_temperature: float = 0.01,
    cut_temperature: float = 1.0,
    want_q: bool = True,
    want_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # loss, dq, dk
    """`sum over i of row_weight_i * (1 - smooth recall of i at ks)`: arXiv 2108.11179, eq. 4 - 8.

    A positive x of query i has the smooth rank `1 + sum over z != x of sigmoid((S_iz - S_ix) /
    rank_temperature)` with `S = q @ k.T`; it counts `sigmoid((k - rank) / cut_temperature)`, the
    sum is cut at k and divided by `min(k, positives of i)`, and the mean over ks is the recall.
    Rows without positives and masked pairs add nothing. Constants are the paper's. S is built
    twice, and every designated pair costs a sigmoid per key each time.
    """
    _check(q, k, pairs)
    _check_numbers("row_weight", row_weight, len(q), q)
    if not ks or min(ks) < 1:
        raise ValueError(f"expected ks of at least one cut-off from 1 on, got {list(ks)}")
    for name, value in (
        ("rank_temperature", rank_temperature),
        ("cut_temperature", cut_temperature),
    ):
        if not value > 0:
            raise ValueError(f"expected {name} above 0, got {value}")
    with torch.autocast(q.device.type, enabled=False):
        return _recall_loss(
            *(q, k, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids, row_weight),
            *(list(ks), rank_temperature, cut_temperature, want_q, want_k),
        )


def _check(q: Tensor, k: Tensor, pairs: Pairs, **scalars: Tensor) -> None:
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


def _check_numbers(name: str, values: Tensor | None, size: int, q: Tensor) -> None:
    if values is None:
        return
    if values.shape != (size,) or values.device != q.device:
        raise ValueError(
            f"expected {name} of shape [{size}] on {q.device}, "
            f"got {list(values.shape)} on {values.device}"
        )
    if values.dtype != compute_dtype(q):
        raise TypeError(f"expected {name} of {compute_dtype(q)}, got {values.dtype}")


def _check_values(q: Tensor, k: Tensor, indptr: Tensor, indices: Tensor, **scalars: Tensor) -> None:
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


def _on_cpu(q: Tensor) -> Any:
    """The backend for tensors on the CPU: compiled sweeps for float32 and bfloat16."""
    if q.dtype not in (torch.float32, torch.bfloat16):
        return reference
    from xmc_kernels._cpu import similarity as cpu

    return cpu


def _room(
    q: Tensor, k: Tensor, want_q: bool, want_k: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an operation returns, without values: loss, dq, dk, dscale."""
    number = q.new_empty((), dtype=compute_dtype(q))
    dq = q.new_empty(q.shape if want_q else (0, q.shape[1]))
    dk = k.new_empty(k.shape if want_k else (0, k.shape[1]))
    return number, dq, dk, torch.empty_like(number)


def _on_cuda(q: Tensor) -> Any:
    """The backend for tensors on a GPU: Triton but for float64."""
    if q.dtype == torch.float64:
        return reference
    from xmc_kernels._triton import similarity as triton

    return triton


@torch.library.custom_op("xmc::similarity_softmax", mutates_args=())
def _softmax_loss(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    indptr: Tensor,
    indices: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    decoupled: bool,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    options = (row_target, column_target, decoupled, want_q, want_k)
    return reference.softmax_loss(q, k, scale, pairs, *options)


@_softmax_loss.register_kernel("cpu")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    _check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cpu(q).softmax_loss(q, k, scale, pairs, *options)


@_softmax_loss.register_kernel("cuda")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    _check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cuda(q).softmax_loss(q, k, scale, pairs, *options)


@_softmax_loss.register_fake
def _(q, k, scale, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return _room(q, k, *rest[-2:])


@torch.library.custom_op("xmc::similarity_sigmoid", mutates_args=())
def _sigmoid_loss(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    indptr: Tensor,
    indices: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_weight: Tensor,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_values(q, k, indptr, indices, scale=scale, bias=bias)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return reference.sigmoid_loss(q, k, scale, bias, pairs, row_weight, want_q, want_k)


@_sigmoid_loss.register_kernel("cpu")
def _(q, k, scale, bias, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    _check_values(q, k, indptr, indices, scale=scale, bias=bias)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cpu(q).sigmoid_loss(q, k, scale, bias, pairs, *options)


@_sigmoid_loss.register_kernel("cuda")
def _(q, k, scale, bias, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    _check_values(q, k, indptr, indices, scale=scale, bias=bias)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cuda(q).sigmoid_loss(q, k, scale, bias, pairs, *options)


@_sigmoid_loss.register_fake
def _(q, k, scale, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    room = _room(q, k, *rest[-2:])
    return *room, torch.empty_like(room[0])


@torch.library.custom_op("xmc::similarity_recall", mutates_args=())
def _recall_loss(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    indices: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_weight: Tensor,
    ks: list[int],
    rank_temperature: float,
    cut_temperature: float,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_values(q, k, indptr, indices)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    options = (row_weight, ks, rank_temperature, cut_temperature, want_q, want_k)
    return reference.recall_loss(q, k, pairs, *options)


@_recall_loss.register_fake
def _(q, k, *rest) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return _room(q, k, *rest[-2:])[:3]
