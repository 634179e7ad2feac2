"""Losses of all similarities `S = scale * q @ k.T` with their gradients: [Bq, Bk] never exists.

One loop over tiles of S; losses differ in the gradient tile `G = dL/dS` alone. The operations
return loss and gradients together, for they come from the same tiles; `xmc.losses` makes
differentiable functions of them. Autocast changes nothing: products are as wide as said here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xmc_kernels._reference import similarity as reference
from xmc_kernels._reference.fan_in import compute_dtype
from xmc_kernels.pairs import Pairs
from xmc_kernels.similarity_checks import check, check_numbers, check_values

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
    check(q, k, pairs, scale=scale)
    for name, target in (("row_target", row_target), ("column_target", column_target)):
        check_numbers(name, target, pairs.num_pairs, q)
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
    wide: bool = False,
    want_q: bool = True,
    want_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, dq, dk, dscale, dbias
    """`sum over i, j of row_weight_i * softplus(-y_ij * (S_ij + bias))`; masked pairs add nothing.

    y is 1 for a designated pair, -1 otherwise (SigLIP, arXiv 2303.15343). Dtypes and wanted
    gradients as in `softmax_loss`, but with `wide` dq and dk are as wide as the loss, to be added
    up over blocks of keys; dbias is always there. Three products: S is built once.
    """
    check(q, k, pairs, scale=scale, bias=bias)
    check_numbers("row_weight", row_weight, len(q), q)
    with torch.autocast(q.device.type, enabled=False):
        return _sigmoid_loss(
            *(q, k, scale, bias, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids),
            *(row_weight, want_q, want_k, wide),
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
    check(q, k, pairs)
    check_numbers("row_weight", row_weight, len(q), q)
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
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    options = (row_target, column_target, decoupled, want_q, want_k)
    return reference.softmax_loss(q, k, scale, pairs, *options)


@_softmax_loss.register_kernel("cpu")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cpu(q).softmax_loss(q, k, scale, pairs, *options)


@_softmax_loss.register_kernel("cuda")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale)
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
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_values(q, k, indptr, indices, scale=scale, bias=bias)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return reference.sigmoid_loss(q, k, scale, bias, pairs, row_weight, want_q, want_k, wide)


@_sigmoid_loss.register_kernel("cpu")
def _(q, k, scale, bias, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale, bias=bias)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cpu(q).sigmoid_loss(q, k, scale, bias, pairs, *options)


@_sigmoid_loss.register_kernel("cuda")
def _(q, k, scale, bias, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale, bias=bias)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cuda(q).sigmoid_loss(q, k, scale, bias, pairs, *options)


@_sigmoid_loss.register_fake
def _(q, k, scale, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    number, dq, dk, d_scale = _room(q, k, *rest[-3:-1])
    if rest[-1]:
        dq, dk = dq.to(number.dtype), dk.to(number.dtype)
    return number, dq, dk, d_scale, torch.empty_like(number)


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
    check_values(q, k, indptr, indices)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    options = (row_weight, ks, rank_temperature, cut_temperature, want_q, want_k)
    return reference.recall_loss(q, k, pairs, *options)


@_recall_loss.register_fake
def _(q, k, *rest) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return _room(q, k, *rest[-2:])[:3]
