"""Losses of all similarities of queries and keys in plain torch, tile by tile.

`S = scale * q @ k.T`. Only the gradient tile `G = dL/dS` differs between losses; what it gives is
`dq = scale * G @ k`, `dk = scale * G.T @ q`, `dscale = <q, G @ k>`. At most [TILE, TILE] numbers of
S exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_kernels._reference.fan_in import compute_dtype
from xmc_kernels.pairs import Pairs

TILE = 1024


@dataclass(frozen=True)
class Tile:
    """Scores of some queries and keys, and where the designated pairs among them lie."""

    rows: slice
    columns: slice
    scores: Tensor  # [rows, columns]; -inf where a pair is masked
    at: tuple[Tensor, Tensor]  # rows and columns of designated pairs within the tile
    entries: Tensor  # which pairs of the CSR those are
    positive: Tensor  # their scores


def blocks(size: int, tile: int) -> Iterator[slice]:
    """Consecutive ranges of at most `tile`."""
    for start in range(0, size, tile):
        yield slice(start, min(start + tile, size))


def tiles(q: Tensor, k: Tensor, scale: Tensor, pairs: Pairs, tile: int) -> Iterator[Tile]:
    """All tiles of S, row by row, masked by ids."""
    dtype = compute_dtype(q, k)
    for rows in blocks(len(q), tile):
        bounds = pairs.indptr[rows.start : rows.stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        keys = pairs.indices[first:last].long()
        queries = torch.repeat_interleave(
            torch.arange(len(bounds) - 1, device=q.device), bounds.diff()
        )
        for columns in blocks(len(k), tile):
            scores = (q[rows].to(dtype) @ k[columns].to(dtype).T) * scale.to(dtype)
            here = ((keys >= columns.start) & (keys < columns.stop)).nonzero()[:, 0]
            at = queries[here], keys[here] - columns.start
            positive = scores[at]
            if pairs.query_ids is not None and pairs.key_ids is not None:
                same = pairs.query_ids[rows, None] == pairs.key_ids[None, columns]
                scores.masked_fill_(same, -torch.inf)
                scores[at] = positive
            yield Tile(rows, columns, scores, at, here + first, positive)


class Gradients:
    """Sums of `G @ k` and `G.T @ q` over tiles."""

    def __init__(self, q: Tensor, k: Tensor, scale: Tensor, want_q: bool, want_k: bool) -> None:
        self.q, self.k, self.scale, self.dtype = q, k, scale, compute_dtype(q, k)
        self.dq = torch.zeros_like(q if want_q else q[:0], dtype=self.dtype)
        self.dk = torch.zeros_like(k if want_k else k[:0], dtype=self.dtype)
        self.want_q, self.want_k = want_q, want_k

    def add(self, tile: Tile, g: Tensor) -> None:
        """Add what one tile of G contributes."""
        if self.want_q:
            self.dq[tile.rows] += g @ self.k[tile.columns].to(self.dtype)
        if self.want_k:
            self.dk[tile.columns] += g.T @ self.q[tile.rows].to(self.dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk (no rows where not wanted) and dscale, as wide as they were summed."""
        inputs, sums = (self.q, self.dq) if self.want_q else (self.k, self.dk)
        d_scale = torch.zeros((), dtype=torch.float64, device=self.q.device)
        for rows in blocks(len(sums), TILE):
            products = inputs[rows].to(self.dtype) * sums[rows]
            d_scale += products.sum(1, dtype=torch.float64).sum()
        scale = self.scale.to(self.dtype)
        return self.dq.mul_(scale), self.dk.mul_(scale), d_scale.to(self.dtype)

    def finish_as_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, dq and dk in the inputs' dtypes."""
        dq, dk, d_scale = self.finish()
        return dq.to(self.q.dtype), dk.to(self.k.dtype), d_scale


def row_sums(pairs: Pairs, values: Tensor) -> Tensor:  # [nnz] -> [Bq]
    """Sum of a value per designated pair over each query's pairs."""
    return torch.segment_reduce(values, "sum", offsets=pairs.indptr, initial=0)


def key_sums(pairs: Pairs, values: Tensor, num_keys: int) -> Tensor:  # [nnz] -> [Bk]
    """Sum of a value per designated pair over each key's pairs."""
    return values.new_zeros(num_keys).scatter_add_(0, pairs.indices.long(), values)


def softmax_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    row_target: Tensor,  # [nnz]
    column_target: Tensor | None,  # [nnz]
    decoupled: bool,
    want_q: bool,
    want_k: bool,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [Bq, D], [Bk, D], []
    """`sum of row_target * (r_i - S_ij) + column_target * (c_j - S_ij)` over designated pairs."""
    dtype = compute_dtype(q, k)
    columns_too = column_target is not None
    row_lse, column_lse, positive = softmax_statistics(
        q, k, scale, pairs, columns_too, decoupled, tile=tile
    )
    # Nothing is left of a row whose denominator is empty: no loss, no gradient.
    queries = torch.repeat_interleave(torch.arange(len(q), device=q.device), pairs.indptr.diff())
    keys = pairs.indices.long()
    target = row_target.to(dtype).where(row_lse[queries] > -torch.inf, 0)
    row_weight, column_weight = row_sums(pairs, target), None
    row_lse.masked_fill_(row_lse == -torch.inf, 0)
    loss = (target.double() * (row_lse[queries] - positive).double()).sum()
    if column_target is not None:
        other = column_target.to(dtype).where(column_lse[keys] > -torch.inf, 0)
        column_weight = key_sums(pairs, other, len(k))
        column_lse.masked_fill_(column_lse == -torch.inf, 0)
        loss += (other.double() * (column_lse[keys] - positive).double()).sum()
        target = target + other
    dq, dk, d_scale = softmax_gradients(
        *(q, k, scale, pairs, target, positive, row_lse, row_weight),
        column_lse,
        column_weight,
        decoupled,
        want_q,
        want_k,
        tile=tile,
    )
    return loss.to(dtype), dq.to(q.dtype), dk.to(k.dtype), d_scale


def softmax_statistics(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    columns_too: bool,
    decoupled: bool,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:  # [Bq], [Bk], [nnz]
    """Logsumexps of rows and (else -inf) of columns; scores of designated pairs."""
    dtype = compute_dtype(q, k)
    row_lse = torch.full((len(q),), -torch.inf, dtype=dtype, device=q.device)
    column_lse = torch.full((len(k),), -torch.inf, dtype=dtype, device=q.device)
    positive = torch.empty(pairs.num_pairs, dtype=dtype, device=q.device)
    for t in tiles(q, k, scale, pairs, tile):
        positive[t.entries] = t.positive
        if decoupled:
            t.scores[t.at] = -torch.inf
        row_lse[t.rows] = torch.logaddexp(row_lse[t.rows], t.scores.logsumexp(1))
        if columns_too:
            column_lse[t.columns] = torch.logaddexp(column_lse[t.columns], t.scores.logsumexp(0))
    return row_lse, column_lse, positive


def softmax_gradients(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    target: Tensor,  # [nnz]
    positive: Tensor,  # [nnz], not needed here
    row_lse: Tensor,  # [Bq]
    row_weight: Tensor,  # [Bq]
    column_lse: Tensor | None,  # [Bk]
    column_weight: Tensor | None,  # [Bk]
    decoupled: bool,
    want_q: bool,
    want_k: bool,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:  # [Bq, D], [Bk, D], []
    """What `G = row_weight exp(S - row_lse) + column_weight exp(S - column_lse) - target` gives."""
    gradients = Gradients(q, k, scale, want_q, want_k)
    if not (want_q or want_k):
        return gradients.finish()
    for t in tiles(q, k, scale, pairs, tile):
        if decoupled:
            t.scores[t.at] = -torch.inf
        g = torch.exp(t.scores - row_lse[t.rows, None]) * row_weight[t.rows, None]
        if column_lse is not None and column_weight is not None:
            g += torch.exp(t.scores - column_lse[None, t.columns]) * column_weight[None, t.columns]
        g[t.at] -= target[t.entries]
        gradients.add(t, g)
    return gradients.finish()


def sigmoid_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    pairs: Pairs,
    row_weight: Tensor,  # [Bq]
    want_q: bool,
    want_k: bool,
    wide: bool = False,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [], [Bq, D], [Bk, D], [], []
    """`sum of row_weight_i * softplus(-y_ij * (S_ij + bias))`, y = 1 if designated, else -1."""
    dtype = compute_dtype(q, k)
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    d_bias = torch.zeros_like(loss)
    gradients = Gradients(q, k, scale, want_q, want_k)
    for t in tiles(q, k, scale, pairs, tile):
        weight = row_weight[t.rows, None].to(dtype)
        logits = t.scores + bias.to(dtype)
        logits[t.at] = -logits[t.at]
        loss += (weight * -F.logsigmoid(-logits)).sum(dtype=torch.float64)
        g = weight * torch.sigmoid(logits)
        g[t.at] = -g[t.at]
        d_bias += g.sum(dtype=torch.float64)
        if want_q or want_k:
            gradients.add(t, g)
    finish = gradients.finish if wide else gradients.finish_as_inputs
    return loss.to(dtype), *finish(), d_bias.to(dtype)


def recall_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    pairs: Pairs,
    row_weight: Tensor,  # [Bq]
    ks: list[int],
    rank_temperature: float,
    cut_temperature: float,
    want_q: bool,
    want_k: bool,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [Bq, D], [Bk, D]
    """`sum of row_weight_i * (1 - mean over k of min(k, sum of h_k) / min(k, positives))`.

    `h_k = sigmoid((k - rho) / cut_temperature)` of each positive x, where `rho` is a smooth rank:
    `1 + sum over z != x of sigmoid((S_iz - S_ix) / rank_temperature)`. arXiv 2108.11179, eq. 4 - 8.
    """
    dtype = compute_dtype(q, k)
    scale = torch.ones((), dtype=dtype, device=q.device)
    queries = torch.repeat_interleave(torch.arange(len(q), device=q.device), pairs.indptr.diff())
    positive = torch.empty(pairs.num_pairs, dtype=dtype, device=q.device)
    for part in blocks(pairs.num_pairs, tile):
        mine, theirs = q[queries[part]].to(dtype), k[pairs.indices[part].long()].to(dtype)
        positive[part] = (mine * theirs).sum(1)

    def ranked(t: Tile) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For some positives of the tile's rows: which, their rows, what ranks above."""
        first, last = int(pairs.indptr[t.rows.start]), int(pairs.indptr[t.rows.stop])
        inside = torch.full((last - first,), -1, device=q.device)
        inside[t.entries - first] = t.at[1]
        for part in blocks(last - first, tile):
            entries = slice(first + part.start, first + part.stop)
            rows = queries[entries] - t.rows.start
            difference = t.scores[rows] - positive[entries, None]
            own = (inside[part] >= 0).nonzero()[:, 0]
            difference[own, inside[part][own]] = -torch.inf
            yield entries, rows, torch.sigmoid(difference / rank_temperature)

    rank, slope = torch.ones_like(positive), torch.zeros_like(positive)
    for t in tiles(q, k, scale, pairs, tile):
        for entries, _, above in ranked(t):
            rank[entries] += above.sum(1)
            slope[entries] += (above * (1 - above)).sum(1) / rank_temperature

    counts = pairs.indptr.diff()
    recall = torch.zeros(len(q), dtype=dtype, device=q.device)
    d_rank = torch.zeros_like(rank)  # of the recall
    for cut in ks:
        hit = torch.sigmoid((cut - rank) / cut_temperature)
        hits, most = row_sums(pairs, hit), counts.clamp(min=1, max=cut).to(dtype)
        recall += hits.clamp(max=cut) / most / len(ks)
        share = torch.where(hits < cut, 1 / most, 0)[queries] / len(ks)
        d_rank -= share * hit * (1 - hit) / cut_temperature
    weight = row_weight.to(dtype).where(counts > 0, 0)
    loss = (weight.double() * (1 - recall).double()).sum()
    gradients = Gradients(q, k, scale, want_q, want_k)
    if not (want_q or want_k):
        return loss.to(dtype), *gradients.finish_as_inputs()[:2]

    d_rank *= -weight[queries]
    for t in tiles(q, k, scale, pairs, tile):
        g = torch.zeros_like(t.scores)
        for entries, rows, above in ranked(t):
            g.index_add_(0, rows, above * (1 - above) * (d_rank[entries, None] / rank_temperature))
        g[t.at] -= (d_rank * slope)[t.entries]
        gradients.add(t, g)
    return loss.to(dtype), *gradients.finish_as_inputs()[:2]
