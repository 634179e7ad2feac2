"""Softmax and sigmoid losses of all similarities and their gradients, one part of S at a time.

In units of 2 Bq Bk D operations: the log-sum-exps of rows and columns, from the same tiles, take
one; then S is built again (one), its gradient G goes to a scratch of `tiles.SCRATCH_BYTES`, and
`dq += G @ k`, `dk += G.T @ q` take two. The sigmoid loss needs no log-sum-exps: three units.

Why G goes through memory, counted and not timed: one kernel for all of it would keep dq of a block
of queries in registers, and [64, 768] float32 numbers are 192 of a multiprocessor's 256 KB. In
pieces of 256 features, for dq and again for dk, S is built for each piece: 9 units at D = 768, 5 at
D = 256. If every tile of 128 x 128 sent its dq and dk to memory instead, that were `2048 D` bytes
through the second-level cache for `98304 D` operations: 48 a byte, where an H100 (990 TFLOP/s,
5.5 TB/s of that cache) needs 180; and the order of the sums would be the scheduler's. G in
bfloat16 is written once and read twice, 6 bytes for `6 D` operations: 768 a byte at D = 768, where
even its main memory needs 300, and a part's scratch stays in the cache for the most part.

Bytes beside inputs and results: the scratch; 16 MiB of log-sum-exps each way; float32 sums of dq
of a part's queries, at most 4,096, and of all of dk unless one part has all queries. With features
and results in bfloat16 and Bq = Bk, a feature element of q or k costs 2 for itself, 2 for its
gradient and 2 for those sums: 6, and the constant. Every number has one writer in a launch, so
results repeat bit for bit; sizes of parts follow from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_kernels._reference.similarity import blocks, row_sums
from xmc_kernels._triton import tiles as table
from xmc_kernels._triton.launch import cdiv
from xmc_kernels._triton.similarity_pairs import dots_launch, pair_grad_launch
from xmc_kernels._triton.similarity_products import (
    Products,
    stores_bfloat16,
    tiles_of_products,
    total,
)
from xmc_kernels._triton.similarity_scores import (
    Part,
    Weights,
    gradient_launch,
    statistics_launch,
)
from xmc_kernels._triton.tiles import ProductTiles, product_tiles
from xmc_kernels.pairs import Pairs

_PART_ROWS = 4096
_STATISTICS_ROWS = 8192
_STATISTICS_KEYS = 65536
"""Of a part of the statistics: 64 log-sum-exps per column, 16 MB, are merged at its end."""


def softmax_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    row_target: Tensor,  # [nnz] float32
    column_target: Tensor | None,  # [nnz] float32
    decoupled: bool,
    want_q: bool,
    want_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [Bq, D], [Bk, D], []
    """`sum of row_target * (r_i - S_ij) + column_target * (c_j - S_ij)` over designated pairs."""
    inputs = Inputs(q, k, scale, pairs, without_pairs=decoupled)
    row_lse, column_lse, dots = inputs.statistics(column_target is not None)
    rows, keys = inputs.queries, inputs.pairs.indices.long()
    score = inputs.scale * dots
    # Nothing is left of a row whose denominator is empty: no loss, no gradient.
    target = row_target.where(row_lse[rows] > -torch.inf, 0)
    row_lse.masked_fill_(row_lse == -torch.inf, 0)
    row_weight = row_sums(inputs.pairs, target)
    loss = (target.double() * (row_lse[rows] - score).double()).sum()
    share = row_weight[rows] * (score - row_lse[rows]).exp()
    column_weight = None
    if column_target is not None and column_lse is not None:
        other = column_target.where(column_lse[keys] > -torch.inf, 0)
        column_lse.masked_fill_(column_lse == -torch.inf, 0)
        column_weight = _key_sums(inputs.pairs, other, len(k))
        loss += (other.double() * (column_lse[keys] - score).double()).sum()
        share += column_weight[keys] * (score - column_lse[keys]).exp()
        target = target + other
    pair_grad = -target if decoupled else share - target
    if not (want_q or want_k):
        return (
            loss.float(),
            q.new_empty(0, q.shape[1]),
            k.new_empty(0, k.shape[1]),
            torch.zeros_like(loss.float()),
        )
    weights = Weights(row_weight, row_lse, column_weight, column_lse)
    dq, dk, sums = inputs.gradients(weights, pair_grad, want_q, want_k)
    d_scale = sums[0] - (target.double() * dots.double()).sum()
    return loss.float(), dq, dk, d_scale.float()


def sigmoid_loss(
    q: Tensor,  # [Bq, D]
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    pairs: Pairs,
    row_weight: Tensor,  # [Bq] float32
    want_q: bool,
    want_k: bool,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [], [Bq, D], [Bk, D], [], []
    """`sum of row_weight_i * softplus(-y_ij * (S_ij + bias))`, y = 1 if designated, else -1.

    One sweep: scores, their loss and G from the same tile. Three units.
    """
    inputs = Inputs(q, k, scale, pairs, without_pairs=True)
    dots, weight = inputs.dots(), row_weight[inputs.queries]
    logit = inputs.scale * dots + bias.float()
    pair_grad = -weight * torch.sigmoid(-logit)
    weights = Weights(row_weight.contiguous(), bias=bias.float())
    dq, dk, sums = inputs.gradients(weights, pair_grad, want_q, want_k, wide=wide)
    loss = sums[2] - (weight * F.logsigmoid(logit)).sum(dtype=torch.float64)
    d_bias = sums[1] + pair_grad.sum(dtype=torch.float64)
    d_scale = sums[0] + (pair_grad.double() * dots.double()).sum()
    if not (want_q or want_k):
        d_scale = torch.zeros_like(d_scale)
    return loss.float(), dq, dk, d_scale.float(), d_bias.float()


def _key_sums(pairs: Pairs, values: Tensor, num_keys: int) -> Tensor:  # [nnz] -> [Bk]
    """Sum of a value per designated pair over each key's pairs, in the order of the rows."""
    keys, order = pairs.indices.sort(stable=True)
    bounds = torch.arange(num_keys + 1, dtype=keys.dtype, device=keys.device)
    offsets = torch.searchsorted(keys, bounds)
    return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)


class Inputs:
    """Queries, keys and pairs as kernels take them, and what goes through them part by part."""

    def __init__(
        self, q: Tensor, k: Tensor, scale: Tensor, pairs: Pairs, *, without_pairs: bool
    ) -> None:
        self.q, self.k = q, k
        self.scale = scale.float()
        self.pairs = Pairs(
            pairs.indptr.contiguous(),
            pairs.indices.contiguous(),
            None if pairs.query_ids is None else pairs.query_ids.contiguous(),
            None if pairs.key_ids is None else pairs.key_ids.contiguous(),
        )
        self.without_pairs = without_pairs
        numbers = torch.arange(len(q), device=q.device)
        counts = self.pairs.indptr.diff()
        self.queries = numbers.repeat_interleave(counts, output_size=pairs.num_pairs)
        self.aligned_q, self.aligned_k = _aligned(q), _aligned(k)
        self.features = self.aligned_q.shape[1]

    def tiles(self, kernel: str) -> ProductTiles:
        """Of scores: the number of keys and features cuts them."""
        wide = self.q.dtype == torch.float32
        return product_tiles(kernel, wide, self.q.device, len(self.q), len(self.k), self.features)

    def parts(self, num_rows: int, num_keys: int) -> Iterator[tuple[slice, slice, Part]]:
        """All of S, row by row of parts."""
        tensors = (self.aligned_q, self.aligned_k, self.scale, self.pairs)
        for rows, keys in product(blocks(len(self.q), num_rows), blocks(len(self.k), num_keys)):
            yield rows, keys, Part.of(*tensors, rows, keys)

    def dots(self) -> Tensor:  # [nnz]
        """`q @ k.T` at designated pairs."""
        dots = torch.empty(self.pairs.num_pairs, device=self.q.device)
        tensors = (self.aligned_q, self.aligned_k, self.queries, self.pairs.indices)
        dots_launch(*tensors, dots).run()
        return dots

    def statistics(self, columns_too: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-sum-exps of rows [Bq] and columns [Bk], `q @ k.T` at designated pairs [nnz]."""
        tiles = self.tiles("statistics")
        device = self.q.device
        row_lse = torch.full((len(self.q),), -torch.inf, device=device)
        column_lse = torch.full((len(self.k),), -torch.inf, device=device) if columns_too else None
        dots = torch.empty(self.pairs.num_pairs, device=device)
        for rows, keys, part in self.parts(_STATISTICS_ROWS, _STATISTICS_KEYS):
            num_rows, num_keys = len(part.q), len(part.k)
            of_rows = torch.empty(cdiv(num_keys, tiles.n), num_rows, device=device)
            of_columns = None
            if column_lse is not None:
                of_columns = torch.empty(cdiv(num_rows, tiles.m), num_keys, device=device)
            sums = (of_rows, of_columns, dots)
            statistics_launch(part, tiles, self.without_pairs, *sums).run()
            _merge_(row_lse[rows], of_rows)
            if column_lse is not None and of_columns is not None:
                _merge_(column_lse[keys], of_columns)
        return row_lse, column_lse, dots

    def gradients(
        self,
        weights: Weights,
        pair_grad: Tensor,
        want_q: bool,
        want_k: bool,
        *,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk (`wide`: float32), the sums of `gradient_launch` over all tiles, [3] float64."""
        tiles = self.tiles("gradient" if weights.bias is None else "sigmoid")
        of_products = tiles_of_products(self.aligned_q, self.aligned_k, tiles)
        unit = max(tiles.m, tiles.n, of_products.m)
        num_rows, num_keys = size = part_size(self.q, self.k, unit)
        weights = weights.padded(unit)
        products = Products(self.aligned_q, self.aligned_k, size, of_products, want_q, want_k)
        dtype = torch.float32 if wide else self.q.dtype
        dq = self.q.new_empty(self.q.shape if want_q else (0, self.q.shape[1]), dtype=dtype)
        programs = cdiv(num_rows, tiles.m) * cdiv(num_keys, tiles.n)
        sums = torch.zeros(programs, 3, dtype=torch.float64, device=self.q.device)
        bounds = [*self.pairs.indptr[::num_rows].tolist(), self.pairs.num_pairs]
        for rows, keys, part in self.parts(num_rows, num_keys):
            padded = [cdiv(len(x), unit) * unit for x in (part.q, part.k)]
            grad = products.gradient(*padded)
            mine = weights.of_part(rows, keys)
            gradient_launch(part, tiles, self.without_pairs, mine, grad, sums).run()
            if grad is None:
                continue
            entries = slice(*bounds[rows.start // num_rows :][:2])
            of_pairs = (pair_grad, self.queries, self.pairs.indices, self.scale)
            pair_grad_launch(*of_pairs, grad, entries, rows.start, keys).run()
            products.add(grad, part.q, part.k, keys)
            if products.d_q is not None and keys.stop == len(self.k):
                dq[rows] = total(products.d_q, len(part.q), dq)
        dk = self.k.new_empty((0, self.k.shape[1]), dtype=dtype)
        if products.d_k is not None:
            dk = total(products.d_k, len(self.k), dk)
        return dq, dk, sums.sum(0)


def part_size(q: Tensor, k: Tensor, unit: int) -> tuple[int, int]:
    """Queries and keys of a part, multiples of unit: its gradient fits SCRATCH_BYTES."""
    num_rows = min(cdiv(_PART_ROWS, unit), max(1, cdiv(len(q), unit))) * unit
    key_bytes = num_rows * (2 if stores_bfloat16(q) else 4)
    most = max(1, table.SCRATCH_BYTES // (key_bytes * unit))
    return num_rows, min(most, cdiv(len(k), unit)) * unit


def _aligned(x: Tensor) -> Tensor:
    """[B, D] contiguous, D a multiple of 16 by zeros: loads of 16 bytes."""
    padding = -x.shape[1] % 16
    return F.pad(x, (0, padding)) if padding else x.contiguous()


def _merge_(lse: Tensor, parts: Tensor) -> None:  # [n], [parts, n]
    """`lse = log(exp(lse) + sum of exp(parts))`."""
    lse.copy_(torch.logaddexp(lse, parts.logsumexp(0)))
