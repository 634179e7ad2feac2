"""The softmax loss of all similarities in two passes, for keys that come block by block.

Ranks that share out the keys of a loss know the logsumexps of all of them only after every block
was seen. So `similarity.softmax_loss` is taken apart: statistics of a block first, which merge with
those of others by `logaddexp`, and what the block's gradient gives once they are complete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xmc_kernels._reference import similarity as reference
from xmc_kernels._reference.fan_in import compute_dtype
from xmc_kernels.pairs import Pairs
from xmc_kernels.similarity_checks import check, check_numbers, check_values


@torch.no_grad()
def softmax_statistics(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    *,
    columns: bool = False,
    decoupled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [Bq], [Bk], [nnz]
    """Logsumexps of the rows and columns of S, and S at designated pairs, all float32 (64 for 64).

    Pairs that are left out of sums, and errors, are those of `similarity.softmax_loss`; the
    logsumexp of nothing is -inf. Without `columns` theirs has no elements. One product of B^2 D
    multiply-adds.
    """
    check(q, k, pairs, scale=scale)
    with torch.autocast(q.device.type, enabled=False):
        return _softmax_statistics(
            *(q, k, scale, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids),
            *(columns, decoupled),
        )


@torch.no_grad()
def softmax_gradients(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    target: Tensor,  # [nnz]
    scores: Tensor,  # [nnz], S at designated pairs as `softmax_statistics` gave it
    row_lse: Tensor,  # [Bq], 0 where there is none
    row_weight: Tensor,  # [Bq]
    column_lse: Tensor | None = None,  # [Bk]
    column_weight: Tensor | None = None,  # [Bk]
    *,
    decoupled: bool = False,
    want_q: bool = True,
    want_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # dq [Bq, D], dk [Bk, D], dscale []
    """What the gradient in S gives: `dq = scale * G @ k`, `dk = scale * G.T @ q`, `dscale`.

    `G_ij = row_weight_i exp(S_ij - row_lse_i) + column_weight_j exp(S_ij - column_lse_j)`, minus
    `target_ij` at designated pairs, where `decoupled` leaves this target alone; masked pairs have
    none. All are float32 (64 for 64), so that blocks add up unrounded; what is not wanted has no
    rows, and dscale is 0 if neither is. Three products where both are.
    """
    check(q, k, pairs, scale=scale)
    for name, values, size in (
        ("target", target, pairs.num_pairs),
        ("scores", scores, pairs.num_pairs),
        ("row_lse", row_lse, len(q)),
        ("row_weight", row_weight, len(q)),
        ("column_lse", column_lse, len(k)),
        ("column_weight", column_weight, len(k)),
    ):
        check_numbers(name, values, size, q)
    if (column_lse is None) != (column_weight is None):
        raise ValueError("expected column_lse and column_weight both or neither, got one")
    with torch.autocast(q.device.type, enabled=False):
        return _softmax_gradients(
            *(q, k, scale, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids),
            *(target, scores, row_lse, row_weight, column_lse, column_weight),
            *(decoupled, want_q, want_k),
        )


def _on_cpu(q: Tensor) -> Any:
    """The backend for tensors on the CPU: compiled sweeps for float32 and bfloat16."""
    if q.dtype not in (torch.float32, torch.bfloat16):
        return reference
    from xmc_kernels._cpu import similarity_passes as cpu

    return cpu


def _on_cuda(q: Tensor) -> Any:
    """The backend for tensors on a GPU: Triton but for float64."""
    if q.dtype == torch.float64:
        return reference
    from xmc_kernels._triton import similarity_passes as triton

    return triton


@torch.library.custom_op("xmc::similarity_softmax_statistics", mutates_args=())
def _softmax_statistics(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    indptr: Tensor,
    indices: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    columns: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _own(reference.softmax_statistics(q, k, scale, pairs, columns, decoupled), columns)


@_softmax_statistics.register_kernel("cpu")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _own(_on_cpu(q).softmax_statistics(q, k, scale, pairs, *options), options[0])


@_softmax_statistics.register_kernel("cuda")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _own(_on_cuda(q).softmax_statistics(q, k, scale, pairs, *options), options[0])


@_softmax_statistics.register_fake
def _(q, k, scale, indptr, indices, query_ids, key_ids, columns, decoupled):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(q)
    sizes = (len(q), len(k) if columns else 0, indices.shape[0])
    return tuple(q.new_empty(size, dtype=dtype) for size in sizes)


def _own(results: tuple[Tensor, Tensor, Tensor], columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Those of columns only where they are wanted."""
    rows, of_columns, scores = results
    return rows, of_columns if columns else rows.new_empty(0), scores


@torch.library.custom_op("xmc::similarity_softmax_gradients", mutates_args=())
def _softmax_gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    indptr: Tensor,
    indices: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    target: Tensor,
    scores: Tensor,
    row_lse: Tensor,
    row_weight: Tensor,
    column_lse: Tensor | None,
    column_weight: Tensor | None,
    decoupled: bool,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    numbers = (target, scores, row_lse, row_weight, column_lse, column_weight)
    options = (decoupled, want_q, want_k)
    return reference.softmax_gradients(q, k, scale, pairs, *numbers, *options)


@_softmax_gradients.register_kernel("cpu")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *rest):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cpu(q).softmax_gradients(q, k, scale, pairs, *rest)


@_softmax_gradients.register_kernel("cuda")
def _(q, k, scale, indptr, indices, query_ids, key_ids, *rest):  # type: ignore[no-untyped-def]
    check_values(q, k, indptr, indices, scale=scale)
    pairs = Pairs(indptr, indices, query_ids, key_ids)
    return _on_cuda(q).softmax_gradients(q, k, scale, pairs, *rest)


@_softmax_gradients.register_fake
def _(q, k, scale, *rest):  # type: ignore[no-untyped-def]
    wide, (want_q, want_k) = compute_dtype(q), rest[-2:]
    dq = q.new_empty(q.shape if want_q else (0, q.shape[1]), dtype=wide)
    dk = k.new_empty(k.shape if want_k else (0, k.shape[1]), dtype=wide)
    return dq, dk, q.new_empty((), dtype=wide)
