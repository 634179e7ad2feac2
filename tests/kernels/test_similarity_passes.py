"""The softmax loss in two passes over blocks of keys against the loss of all keys at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xmc_kernels import similarity, similarity_passes
from xmc_kernels.pairs import Pairs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def cut(pairs: Pairs, keys: slice) -> tuple[Pairs, Tensor]:
    """The pairs of some keys, counted from the first of them, and which ones they are."""
    here = (pairs.indices >= keys.start) & (pairs.indices < keys.stop)
    indptr = torch.nn.functional.pad(here.cumsum(0), (1, 0))[pairs.indptr]
    ids = None if pairs.key_ids is None else pairs.key_ids[keys]
    part = Pairs(indptr, pairs.indices[here] - keys.start, pairs.query_ids, ids)
    return part, here.nonzero()[:, 0]


@pytest.fixture
def data(contrastive_oracle) -> Callable[..., tuple]:
    """`data(Bq, Bk, D, ids)`: features, pairs with some rows empty, targets of rows and columns."""

    def make(num_queries: int, num_keys: int, dim: int, with_ids: bool) -> tuple:
        g = torch.Generator().manual_seed(num_queries)
        q, k = contrastive_oracle.features(num_queries, num_keys, dim)
        positive = torch.rand(num_queries, num_keys, generator=g) < 0.1
        ids = (None, None)
        if with_ids:
            ids = tuple(torch.randint(5, (n,), generator=g) for n in (num_queries, num_keys))
        indptr = torch.zeros(num_queries + 1, dtype=torch.int64)
        indptr[1:] = positive.sum(1).cumsum(0)
        pairs = Pairs(indptr, positive.nonzero()[:, 1].int(), *ids)
        return q, k, pairs, torch.rand(2, pairs.num_pairs, generator=g, dtype=torch.float64)

    return make


def by_blocks(q, k, scale, pairs, row_target, column_target, bounds, *, decoupled, device="cpu"):
    """`similarity.softmax_loss`'s loss and gradients, keys block by block; all rows have terms."""
    blocks = [slice(*b) for b in itertools.pairwise(bounds)]
    columns = column_target is not None
    row_lse = torch.full((len(q),), -torch.inf, dtype=row_target.dtype, device=device)
    scores, column_lse = torch.empty_like(row_target), []
    for keys in blocks:
        part, entries = cut(pairs, keys)
        rows, of_columns, scores[entries] = similarity_passes.softmax_statistics(
            q, k[keys], scale, part, columns=columns, decoupled=decoupled
        )
        assert len(of_columns) == (keys.stop - keys.start) * columns
        row_lse = torch.logaddexp(row_lse, rows)
        column_lse.append(of_columns)
    queries = torch.arange(len(q), device=device).repeat_interleave(pairs.indptr.diff())
    keys_of = pairs.indices.long()
    row_weight = row_lse.new_zeros(len(q)).index_add_(0, queries, row_target)
    loss = (row_target * (row_lse[queries] - scores)).sum()
    target, lse, weight = row_target, None, None
    if columns:
        lse = torch.cat(column_lse)
        weight = lse.new_zeros(len(k)).index_add_(0, keys_of, column_target)
        loss = loss + (column_target * (lse[keys_of] - scores)).sum()
        target = row_target + column_target
    dq, d_scale, dk = 0, 0, []
    for keys in blocks:
        part, entries = cut(pairs, keys)
        of_columns = (None, None) if lse is None else (lse[keys], weight[keys])
        numbers = (target[entries], scores[entries], row_lse, row_weight, *of_columns)
        added = similarity_passes.softmax_gradients(
            q, k[keys], scale, part, *numbers, decoupled=decoupled
        )
        assert [t.dtype for t in added] == [row_target.dtype] * 3
        dq, d_scale = dq + added[0], d_scale + added[2]
        dk.append(added[1])
    return loss, dq, torch.cat(dk), d_scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "columns"), [("rows", False), ("symmetric", True), ("decoupled ids", True)]
)
def test_blocks_of_keys_add_up_to_the_loss_of_all(data, dtype, kind, columns, poisoned) -> None:
    q, k, pairs, targets = data(45, 70, 17, "ids" in kind)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, decoupled = q.to(dtype), k.to(dtype), "decoupled" in kind
    row, column = targets.to(wide)
    scale = torch.tensor(30.0, dtype=wide)
    options = (row, column if columns else None)
    ours = by_blocks(q, k, scale, pairs, *options, [0, 1, 40, 70], decoupled=decoupled)
    doubles = (None if t is None else t.double() for t in options)
    whole = similarity.softmax_loss(
        q.double(), k.double(), scale.double(), pairs, *doubles, decoupled=decoupled
    )
    # The CPU may multiply a bfloat16 gradient tile with bfloat16 features.
    limit = {torch.float64: 1e-12, torch.bfloat16: 6e-3}.get(dtype, 2e-5)
    for got, want in zip(ours, whole, strict=True):
        assert (got.double() - want).norm() <= limit * want.norm().clamp(min=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["rows", "symmetric", "decoupled ids"])
def test_blocks_on_a_gpu_add_up_to_the_loss_of_all(data, dtype, kind) -> None:
    q, k, pairs, targets = data(300, 520, 96, "ids" in kind)
    pairs = Pairs(*(None if t is None else t.cuda() for t in vars(pairs).values()))
    q, k, decoupled = q.to(dtype).cuda(), k.to(dtype).cuda(), "decoupled" in kind
    row, column = targets.cuda()
    options = (row, None if kind == "rows" else column)
    floats = [None if t is None else t.float() for t in options]
    scale, bounds = torch.tensor(30.0, device="cuda"), [0, 129, 130, 520]
    ours = by_blocks(q, k, scale, pairs, *floats, bounds, decoupled=decoupled, device="cuda")
    whole = similarity.softmax_loss(
        q.double(), k.double(), scale.double(), pairs, *options, decoupled=decoupled
    )
    limit = 6e-3 if dtype != torch.float32 else 3e-5
    for got, want in zip(ours, whole, strict=True):
        assert (got.double() - want).norm() <= limit * want.norm().clamp(min=1e-6)


def test_rows_and_columns_without_terms_have_no_gradient() -> None:
    x = torch.randn(3, 4)
    ids = torch.zeros(3, dtype=torch.int64)
    nothing = Pairs(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ids, ids)
    for dtype in (torch.float32, torch.float64):
        q, scale, none = x.to(dtype), torch.tensor(100.0, dtype=dtype), torch.zeros(0, dtype=dtype)
        rows, columns, _ = similarity_passes.softmax_statistics(q, q, scale, nothing, columns=True)
        assert torch.equal(rows, torch.full((3,), -torch.inf, dtype=dtype))
        assert torch.equal(columns, rows)
        zero = torch.zeros(3, dtype=dtype)
        dq, dk, d_scale = similarity_passes.softmax_gradients(
            q, q, scale, nothing, none, none, zero, zero, zero, zero
        )
        for got in (dq, dk, d_scale):
            assert torch.equal(got, torch.zeros_like(got))


def test_wanted_gradients_and_wide_ones(data) -> None:
    q, k, pairs, targets = data(20, 30, 5, True)
    for dtype in DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        row = targets[0].to(wide)
        q, k, scale = q.to(dtype), k.to(dtype), torch.tensor(3.0, dtype=wide)
        numbers = (row, row, *torch.rand(2, 20, dtype=wide))
        all_three = similarity_passes.softmax_gradients(q, k, scale, pairs, *numbers)
        for want_q, want_k in ((True, False), (False, True), (False, False)):
            wanted = {"want_q": want_q, "want_k": want_k}
            dq, dk, d_scale = similarity_passes.softmax_gradients(
                q, k, scale, pairs, *numbers, **wanted
            )
            assert torch.equal(dq, all_three[0] if want_q else all_three[0][:0])
            assert torch.equal(dk, all_three[1] if want_k else all_three[1][:0])
            expected = all_three[2] if want_q or want_k else torch.zeros_like(d_scale)
            torch.testing.assert_close(d_scale, expected, rtol=1e-3, atol=1e-4)
        weight = torch.full((20,), 0.05, dtype=wide)
        narrow = similarity.sigmoid_loss(q, k, scale, -scale, pairs, weight)
        own = similarity.sigmoid_loss(q, k, scale, -scale, pairs, weight, wide=True)
        assert [t.dtype for t in own] == [wide] * 5
        assert [t.dtype for t in narrow] == [wide, dtype, dtype, wide, wide]
        for got, want in zip(own, narrow, strict=True):
            assert torch.equal(got.to(want.dtype), want)


def test_errors(data) -> None:
    q, k, pairs, targets = data(20, 30, 5, False)
    scale = torch.tensor(3.0, dtype=torch.float64)
    zero, row = torch.zeros(20, dtype=torch.float64), targets[0]
    with pytest.raises(ValueError, match="expected finite k, row 0 has NaN"):
        similarity_passes.softmax_statistics(q, k * torch.nan, scale, pairs)
    with pytest.raises(ValueError, match=r"expected row_lse of shape \[20\] on cpu, got \[30\]"):
        similarity_passes.softmax_gradients(q, k, scale, pairs, row, row, k[:, 0], zero)
    with pytest.raises(ValueError, match="column_lse and column_weight both or neither, got one"):
        similarity_passes.softmax_gradients(q, k, scale, pairs, row, row, zero, zero, k[:, 0])


def test_operations_are_registered_as_torch_expects(data) -> None:
    q, k, pairs, targets = data(20, 24, 6, True)
    q, k, target, scale = q.float(), k.float(), targets[0].float(), torch.tensor(5.0)
    inputs = (q, k, scale, pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids)
    rows, columns = torch.rand(2, 20), torch.rand(2, 24)
    for operation, options in (
        (similarity_passes._softmax_statistics, (True, False)),
        (
            similarity_passes._softmax_gradients,
            (target, target, *rows, *columns, False, True, False),
        ),
    ):
        torch.library.opcheck(operation, (*inputs, *options))
