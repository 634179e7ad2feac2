"""Losses of all similarities on the CPU: products by torch, everything between them by numba.

A tile of S takes one product, its sweeps (`similarity_tiles.py`) a tenth of that time, and what
its gradient gives two products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from xmc_kernels._cpu import similarity_tiles as sweeps
from xmc_kernels._cpu import threads
from xmc_kernels._cpu.similarity_tiles import ARGUMENTS, LANES, LOW, STRIP
from xmc_kernels._reference.similarity import Gradients, blocks, key_sums, row_sums
from xmc_kernels.pairs import Pairs

TILE = 1024
KEPT = 2**21  # numbers of S kept from the first pass for the second, 8 MB
KEPT_SHARE = 16  # where that is at least a sixteenth of them: less saves no time worth its memory


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` in float32.

    oneDNN's, where torch has it: twice as fast as MKL's on processors that MKL does not know (430
    against 200 GFLOP/s on two cores of an EPYC of family 26, [1024, 256] x [256, 1024]).
    """
    linear = _linear()
    if linear is None:
        return a @ b.T
    out: Tensor = linear(a, b, None, "none", [], "")
    return out


@functools.cache
def _linear() -> Any:
    """The `nn.Linear` of oneDNN, without a bias."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16, at twice the rate of float32 or more."""
    features = get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))


@dataclass(frozen=True)
class Place:
    """Rows and columns [start, stop) of a tile."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.last_row)

    @property
    def columns(self) -> slice:
        return slice(self.first_column, self.last_column)

    @property
    def num_rows(self) -> int:
        return self.last_row - self.first_row

    @property
    def num_columns(self) -> int:
        return self.last_column - self.first_column

    @property
    def stride(self) -> int:
        """Columns with padding."""
        return padded(self.num_columns)


def padded(columns: int) -> int:
    """The next multiple of a vector's width."""
    return -(-columns // LANES) * LANES


class Engine:
    """Tiles of S, what sweeps over them need, and sums of what their gradients give."""

    def __init__(
        self, q: Tensor, k: Tensor, scale: Tensor, pairs: Pairs, want_q: bool, want_k: bool
    ) -> None:
        self.q, self.k, self.scale, self.pairs = q, k, float(scale), pairs
        self.gradients = Gradients(q, k, scale, want_q, want_k)
        self.positive = torch.zeros(pairs.num_pairs)  # scores of designated pairs
        # Records hold addresses: the engine keeps what they point to.
        self.fields: dict[str, Any] = {
            "indptr": pairs.indptr.contiguous(),
            "indices": pairs.indices.contiguous(),
            "positive": self.positive,
        }
        if pairs.query_ids is not None and pairs.key_ids is not None:
            # The keys of one id, rising, are a range of `same`.
            ids, same = pairs.key_ids.sort(stable=True)
            wanted = pairs.query_ids.contiguous()
            self.fields |= {
                "same": same.int(),
                "first_same": torch.searchsorted(ids, wanted),
                "last_same": torch.searchsorted(ids, wanted, right=True),
            }

    def places(self, height: int, width: int) -> Iterator[Place]:
        """All tiles, row by row."""
        for rows in blocks(len(self.q), height):
            for columns in blocks(len(self.k), width):
                yield Place(rows.start, rows.stop, columns.start, columns.stop)

    def keys(self, place: Place) -> Tensor:  # [stride, D]
        """The keys of a tile in float32, zeros in its padding."""
        keys = self.k[place.columns].float()
        padding = place.stride - place.num_columns
        return torch.nn.functional.pad(keys, (0, 0, 0, padding)) if padding else keys

    def scores(self, place: Place) -> Tensor:  # [rows, stride]
        """A tile of S."""
        return product(self.q[place.rows].float() * self.scale, self.keys(place))

    def sweep(self, kernel: Any, place: Place, tile: Tensor, **fields: Any) -> None:
        """Run a sweep over a tile on all threads."""
        strips = -(-place.num_rows // STRIP)
        arguments = threads.record(
            ARGUMENTS,
            **self.fields,
            **fields,
            tile=tile,
            num_shares=min(torch.get_num_threads(), strips),
            num_rows=place.num_rows,
            num_columns=place.num_columns,
            stride=place.stride,
            first_row=place.first_row,
            first_column=place.first_column,
        )
        threads.launch(kernel, arguments)

    def add(self, place: Place, g: Tensor) -> None:
        """Add what one tile of G contributes."""
        sums = self.gradients
        if self.q.dtype == torch.bfloat16 and multiplies_bfloat16():
            g = g[:, : place.num_columns].bfloat16()
            if sums.want_q:
                sums.dq[place.rows] += g @ self.k[place.columns]
            if sums.want_k:
                sums.dk[place.columns] += g.T @ self.q[place.rows]
            return
        if sums.want_q:
            sums.dq[place.rows] += product(g, self.keys(place).T)
        if sums.want_k:
            dk = product(g.T, self.q[place.rows].float().T)
            sums.dk[place.columns] += dk[: place.num_columns]


@dataclass(frozen=True)
class Sums:
    """Sums of exponentials, each relative to its largest term: of rows or of columns."""

    top: Tensor  # [B] float32
    total: Tensor  # [B] float64

    @classmethod
    def nothing(cls, size: int) -> Sums:
        """Of no terms."""
        return cls(torch.full((size,), float(LOW)), torch.zeros(size, dtype=torch.float64))

    def __getitem__(self, part: slice) -> Sums:
        return Sums(self.top[part], self.total[part])

    def loss(self, target: Tensor, group: Tensor, positive: Tensor) -> float:
        """`sum of target * (logsumexp[group] - positive)`; zeroes the targets of empty sums."""
        target.masked_fill_(self.total[group] == 0, 0)
        above = (self.top[group] - positive).double() + self.total[group].log()
        # numpy adds on one thread: in the same order for any number of torch's.
        return float((target.double() * above.masked_fill_(target == 0, 0)).numpy().sum())

    def reference(self) -> Tensor:
        """What to subtract from scores; where there are none, so much that exp gives 0."""
        return torch.where(self.total == 0, -float(LOW), self.top)

    def weight(self, weight: Tensor) -> Tensor:
        """What to multiply exponentials with to get `weight * exp(S - logsumexp)`."""
        return torch.where(self.total == 0, 0, weight / self.total).float()


def softmax_loss(
    q: Tensor,  # [Bq, D] float32 or bfloat16
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.softmax_loss`; the same bits for any number of threads."""
    engine = Engine(q, k, scale, pairs, want_q, want_k)
    columns_too = column_target is not None
    engine.fields |= {"decoupled": decoupled, "columns_too": columns_too}
    rows, columns = Sums.nothing(len(q)), Sums.nothing(padded(len(k)))
    queries = torch.arange(len(q)).repeat_interleave(pairs.indptr.diff())
    target, value = row_target.clone(), 0.0
    # Only columns need all tiles before the first gradient. Without them a row of tiles is done
    # at a time, so low that most of it is still at hand and not computed again.
    height = tile if columns_too else max(tile // 4, min(tile, KEPT // len(k)), 1)
    places, kept = list(engine.places(height, tile)), dict[Place, Tensor]()
    group = len(places) if columns_too else -(-len(k) // tile)
    numbers = (len(q) if columns_too else min(len(q), tile)) * len(k)
    room = KEPT if (want_q or want_k) and numbers <= KEPT_SHARE * KEPT else 0
    for start in range(0, len(places), max(group, 1)):
        own = places[start : start + group]
        for place in own:
            kept[place] = s = engine.scores(place)
            add_statistics(engine, place, s, rows, columns)
            while kept and len(kept) * s.numel() > room:
                del kept[next(iter(kept))]

        part = slice(own[0].first_row, own[-1].last_row)
        entries = slice(int(pairs.indptr[part.start]), int(pairs.indptr[part.stop]))
        positive = engine.positive[entries]
        value += rows.loss(target[entries], queries[entries], positive)
        fields = _references(rows, row_sums(pairs, target), "row")
        if column_target is not None:
            other, keys = column_target.clone(), pairs.indices.long()
            value += columns.loss(other, keys, positive)
            fields |= _references(columns, key_sums(pairs, other, len(columns.top)), "column")
            target += other
        if not (want_q or want_k):
            continue
        for place in reversed(own):
            s = kept.pop(place) if place in kept else engine.scores(place)
            here = {
                name: t[place.first_column :] if name.startswith("column") else t
                for name, t in fields.items()
            }
            engine.sweep(sweeps.gradients(), place, s, **here, target=target)
            engine.add(place, s)
    return torch.tensor(value, dtype=torch.float32), *engine.gradients.finish_as_inputs()


def _references(sums: Sums, weight: Tensor, name: str) -> dict[str, Tensor]:
    """What a sweep needs to know of all rows or columns."""
    return {f"{name}_reference": sums.reference(), f"{name}_weight": sums.weight(weight)}


def add_statistics(engine: Engine, place: Place, s: Tensor, rows: Sums, columns: Sums) -> None:
    """Add the terms of a tile to the sums of rows and, where wanted, of columns."""
    fields = {"row_max": rows.top, "row_sum": rows.total}
    if not engine.fields["columns_too"]:
        engine.sweep(sweeps.statistics(), place, s, **fields)
        return
    strips = -(-place.num_rows // STRIP)
    top, total = np.empty((2, strips, place.stride), np.float32)
    engine.sweep(sweeps.statistics(), place, s, **fields, strip_max=top, strip_sum=total)
    part = columns[place.columns]
    sweeps.merge_strips(top, total, part.top.numpy(), part.total.numpy())


def sigmoid_loss(
    q: Tensor,  # [Bq, D] float32 or bfloat16
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.sigmoid_loss`; the same bits for any number of threads."""
    engine = Engine(q, k, scale, pairs, want_q, want_k)
    engine.fields["decoupled"] = True
    row_loss, row_bias = (torch.zeros(len(q), dtype=torch.float64) for _ in range(2))
    fields = {"row_weight": row_weight.contiguous(), "row_loss": row_loss, "row_bias": row_bias}
    for place in engine.places(tile, tile):
        s = engine.scores(place)
        engine.sweep(sweeps.sigmoid_gradients(), place, s, **fields, bias=float(bias))
        if want_q or want_k:
            engine.add(place, s)
    loss, d_bias = (
        torch.tensor(float((row_weight.double() * sums).numpy().sum()), dtype=torch.float32)
        for sums in (row_loss, row_bias)
    )
    sums = engine.gradients
    return loss, *(sums.finish() if wide else sums.finish_as_inputs()), d_bias
