"""The two passes of the softmax loss of all similarities on the CPU: `similarity.py` in parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_kernels._cpu import similarity_tiles as sweeps
from xmc_kernels._cpu.similarity import TILE, Engine, Sums, add_statistics, padded
from xmc_kernels.pairs import Pairs


def softmax_statistics(
    q: Tensor,  # [Bq, D] float32 or bfloat16
    k: Tensor,  # [Bk, D]
    scale: Tensor,  # []
    pairs: Pairs,
    columns_too: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.softmax_statistics`; the same bits for any number of threads."""
    engine = Engine(q, k, scale, pairs, False, False)
    engine.fields |= {"decoupled": decoupled, "columns_too": columns_too}
    rows, columns = Sums.nothing(len(q)), Sums.nothing(padded(len(k)))
    for place in engine.places(TILE, TILE):
        add_statistics(engine, place, engine.scores(place), rows, columns)
    return _lse(rows), _lse(columns[: len(k)]), engine.positive


def _lse(sums: Sums) -> Tensor:
    """Logsumexps; -inf of nothing, which has no meaningful top."""
    lse = (sums.top.double() + sums.total.log()).float()
    return lse.masked_fill_(sums.total == 0, -torch.inf)


def softmax_gradients(
    q: Tensor,  # [Bq, D] float32 or bfloat16
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.softmax_gradients`; the same bits for any number of threads."""
    engine = Engine(q, k, scale, pairs, want_q, want_k)
    if not (want_q or want_k):
        return engine.gradients.finish()
    columns_too = column_lse is not None
    engine.fields |= {
        "decoupled": decoupled,
        "columns_too": columns_too,
        "row_reference": row_lse.contiguous(),
        "row_weight": row_weight.contiguous(),
        "target": target.contiguous(),
    }
    of_columns: dict[str, Tensor] = {}
    if column_lse is not None and column_weight is not None:
        room = padded(len(k)) - len(k)
        of_columns["column_reference"] = F.pad(column_lse, (0, room))
        of_columns["column_weight"] = F.pad(column_weight, (0, room))
    for place in engine.places(TILE, TILE):
        s = engine.scores(place)
        here = {name: values[place.first_column :] for name, values in of_columns.items()}
        engine.sweep(sweeps.gradients(), place, s, **here)
        engine.add(place, s)
    return engine.gradients.finish()
