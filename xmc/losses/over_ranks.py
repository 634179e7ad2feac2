"""Contrastive losses of the rows of all ranks: each has queries of its own, keys visit them.

Notation: S = scale * q @ k.T of this rank's queries and all keys, v the weights of positives and w
those of queries. What a rank cannot know alone are the sums of columns, over the queries of all
ranks: they travel with the keys in a first walk, and in a second one the gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xmc.distributed.collectives import World, sum_
from xmc.losses.agreement import check_same, told
from xmc.losses.exchange import WAYS, Exchange, pairs_of_keys
from xmc.losses.targets import Given, rows_of
from xmc_kernels import checks, similarity, similarity_passes
from xmc_kernels._reference.fan_in import compute_dtype
from xmc_kernels._reference.similarity import row_sums
from xmc_kernels.pairs import Pairs
from xmc_kernels.similarity_checks import check


@dataclass(frozen=True)
class Rows:
    """The pairs of this rank's queries with keys of all ranks."""

    pairs: Pairs  # indices over the keys of all ranks, key_ids those of this one
    counts: list[int]  # keys of each rank
    exchange: Exchange

    @property
    def world(self) -> World:
        return self.exchange.world


def agree(
    q: Tensor,
    k: Tensor,
    given: Given,
    exchange: Exchange,
    numbers: Mapping[str, Tensor],  # [] each: scale, bias
    options: Mapping[str, bool],
    weights: Callable[[], Tensor],  # checks and makes them, any shape
) -> tuple[Rows, Tensor, float]:
    """Check this rank's arguments and that all have the same; its weights, and the sum of all's."""

    def prepare() -> tuple[tuple[Pairs, Tensor], dict[str, float]]:
        pairs = given.pairs(q, k, check_keys=False)
        keys = k if len(k) else k.new_zeros((1, *k.shape[1:]))
        check(q, keys, pairs if len(k) else Pairs(pairs.indptr, pairs.indices), **numbers)
        checks.check_finite(q, "q")
        checks.check_finite(k, "k")
        if given.positives is not None:
            given.positives.validate()
        for name, value in numbers.items():
            if not bool(torch.isfinite(value)):
                raise ValueError(f"expected a finite {name}, got {float(value)}")
        grad = torch.is_grad_enabled()
        wire = exchange.wire_dtype is not None
        own: dict[str, float] = {
            "keys": len(k),
            "columns": -1 if given.positives is None else given.positives.num_labels,
            "number of features": q.shape[1],
            "dtype (by its number)": checks.FLOATS.index(q.dtype),
            "exchange (by its number)": WAYS.index(exchange.way),
            "wire_dtype (1: bfloat16)": wire,
            "use of ids": given.query_ids is not None,
            "need of gradients of q": grad and q.requires_grad,
            "need of gradients of k": grad and k.requires_grad,
        }
        own |= {name: float(value.detach()) for name, value in numbers.items()}
        made = weights()
        own["weight"] = float(made.sum(dtype=torch.float64))
        return (pairs, made), own | {name: float(option) for name, option in options.items()}

    (pairs, made), everyone = told(prepare, exchange.world, q.device)
    counts = [int(count) for count in everyone.pop("keys")]
    columns = everyone.pop("columns")
    weight = sum(everyone.pop("weight"))
    for name, values in everyone.items():
        check_same(name, values, within=1e-6 if name in numbers else 0.0)
    total = sum(counts)
    if total == 0:
        raise ValueError("expected at least one key on some rank, got none on any")
    if any(number not in (-1, total) for number in columns):
        raise ValueError(
            f"expected positives among the {total} keys of all ranks (of {counts}), "
            f"got {[int(number) for number in columns]}, -1 for none"
        )
    if given.positives is None:
        # Key i of this rank for its query i.
        first = sum(counts[: exchange.world.rank])
        pairs = replace(pairs, indices=pairs.indices + first)
    return Rows(pairs, counts, exchange), made, weight


def softmax_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    rows: Rows,
    row_target: Tensor,  # [nnz], all ranks' sum to the weight of rows in the loss
    values: Tensor,  # [nnz], v
    weights: Tensor | None,  # [Bq], w, where columns are half of the loss
    *,
    decoupled: bool,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss, dq, dk, dscale
    """`similarity.softmax_loss` of all ranks: gradients of its value, the same on every rank.

    dscale is what this rank's queries add to it.
    """
    columns_too = weights is not None
    keys, walk = rows.exchange.sent(k), rows.exchange.walk(rows.counts, k)
    sent = [keys] if rows.pairs.key_ids is None else [keys, rows.pairs.key_ids]
    queries, wide = rows_of(rows.pairs), compute_dtype(q)
    row_lse = torch.full((len(q),), -torch.inf, dtype=wide, device=q.device)
    scores = torch.zeros_like(row_target)
    pair_weights = values if weights is None else weights[queries] * values

    def statistics(which: slice, visiting: list[Tensor]) -> Tensor | None:
        part, here = pairs_of_keys(rows.pairs, which, visiting[1] if sent[1:] else None)
        num_keys = which.stop - which.start
        column_lse = row_lse.new_full((num_keys,), -torch.inf)
        if num_keys and len(q):
            lse, of_columns, scores[here] = similarity_passes.softmax_statistics(
                *(q, visiting[0].to(q.dtype), scale, part),
                columns=columns_too,
                decoupled=decoupled,
            )
            torch.logaddexp(row_lse, lse, out=row_lse)
            column_lse = of_columns if columns_too else column_lse
        if not columns_too:
            return None
        of_pairs = [values[here], pair_weights[here], (pair_weights * scores)[here]]
        sums = row_lse.new_zeros(num_keys, 3)
        sums.index_add_(0, part.indices.long(), torch.stack(of_pairs, 1))
        return torch.cat([column_lse[:, None], sums], 1)

    statistics_of_columns = walk.visit(sent, statistics, _merged)
    # Nothing is left of a row whose denominator is empty: no loss, no gradient.
    target = row_target.where(row_lse[queries] > -torch.inf, 0)
    row_lse.masked_fill_(row_lse == -torch.inf, 0)
    loss = (target.double() * (row_lse[queries] - scores).double()).sum()
    column = None
    if statistics_of_columns is not None:
        column, of_columns = _columns(statistics_of_columns, rows.world)
        loss += of_columns
    sum_(loss, rows.world)

    dq = torch.zeros_like(q if want_q else q[:0], dtype=wide)
    d_scale = torch.zeros((), dtype=torch.float64, device=q.device)
    if not (want_q or want_k):
        return loss.to(wide), dq, k.new_empty(0, k.shape[1]), d_scale.to(wide)
    row_weight = row_sums(rows.pairs, target)

    def gradients(which: slice, visiting: list[Tensor]) -> Tensor | None:
        part, here = pairs_of_keys(rows.pairs, which, visiting[1] if sent[1:] else None)
        if which.start == which.stop or len(q) == 0:
            return dq.new_zeros(which.stop - which.start, q.shape[1]) if want_k else None
        of_pairs, of_keys = target[here], (None, None)
        if column is not None:
            lse, weight, unit = visiting[-1].T.contiguous()
            of_pairs, of_keys = of_pairs + pair_weights[here] * unit[part.indices], (lse, weight)
        new = similarity_passes.softmax_gradients(
            *(q, visiting[0].to(q.dtype), scale, part, of_pairs, scores[here]),
            *(row_lse, row_weight, *of_keys),
            decoupled=decoupled,
            want_q=want_q,
            want_k=want_k,
        )
        if want_q:
            dq.add_(new[0])
        d_scale.add_(new[2])
        return new[1] if want_k else None

    dk = walk.visit(sent if column is None else [*sent, column], gradients)
    return loss.to(wide), dq, k.new_empty(0, k.shape[1]) if dk is None else dk, d_scale.to(wide)


def _merged(earlier: Tensor, later: Tensor) -> Tensor:  # [b, 4] each
    """Logsumexps in the first column, sums in the others."""
    lse = torch.logaddexp(earlier[:, :1], later[:, :1])
    return torch.cat([lse, earlier[:, 1:] + later[:, 1:]], 1)


def _columns(statistics: Tensor, world: World) -> tuple[Tensor, Tensor]:  # [b, 4] -> [b, 3], []
    """What gradients need to know of this rank's keys, and their part of the loss.

    The loss of key j is `c_j - P_j / U_j`, and its weight half of its share of all `U_j / V_j`: c
    its logsumexp, V and U the sums of `v` and `w v` over its positives, P that of `w v S`. Half,
    because rows are the other one. Sends one number.
    """
    lse, values, weighted, scored = statistics.double().T
    share = torch.where(values > 0, weighted / values, 0)
    total = sum_(share.sum(), world)
    filled = (values > 0) & (lse > -torch.inf) & (total > 0)
    unit = torch.where(filled, 0.5 / (values * total), 0)
    weight, lse = unit * weighted, torch.where(lse > -torch.inf, lse, 0)
    loss = (weight * lse - unit * scored).sum()
    return torch.stack([lse, weight, unit], 1).to(statistics.dtype), loss


def sigmoid_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    rows: Rows,
    row_weight: Tensor,  # [Bq]
    *,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # loss, dq, dk, dscale, dbias
    """`similarity.sigmoid_loss` of all ranks; dscale and dbias are what this rank adds."""
    keys, walk = rows.exchange.sent(k), rows.exchange.walk(rows.counts, k)
    sent = [keys] if rows.pairs.key_ids is None else [keys, rows.pairs.key_ids]
    wide = compute_dtype(q)
    dq = torch.zeros_like(q if want_q else q[:0], dtype=wide)
    loss, d_scale, d_bias = torch.zeros(3, dtype=torch.float64, device=q.device)

    def visit(which: slice, visiting: list[Tensor]) -> Tensor | None:
        part, _ = pairs_of_keys(rows.pairs, which, visiting[1] if sent[1:] else None)
        if which.start == which.stop or len(q) == 0:
            return dq.new_zeros(which.stop - which.start, q.shape[1]) if want_k else None
        new = similarity.sigmoid_loss(
            *(q, visiting[0].to(q.dtype), scale, bias, part, row_weight),
            wide=True,
            want_q=want_q,
            want_k=want_k,
        )
        if want_q:
            dq.add_(new[1])
        for total, number in zip((loss, d_scale, d_bias), (new[0], *new[3:]), strict=True):
            total.add_(number)
        return new[2] if want_k else None

    dk = walk.visit(sent, visit)
    sum_(loss, rows.world)
    numbers: Sequence[Tensor] = [number.to(wide) for number in (d_scale, d_bias)]
    return loss.to(wide), dq, k.new_empty(0, k.shape[1]) if dk is None else dk, *numbers
