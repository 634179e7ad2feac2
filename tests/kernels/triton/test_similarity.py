"""Triton's losses of all similarities against whole matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from xmc_kernels import similarity as operations
from xmc_kernels.pairs import Pairs

SHAPES = [
    # Bq, Bk, D: round, odd in one, odd in all, and the corners
    (32, 32, 16),
    (32, 35, 16),
    (17, 33, 21),
    (37, 19, 7),
    (1, 40, 3),
    (3, 1, 1),
    (1, 1, 1),
]
KINDS = {
    # symmetric, ids, decoupled, key i for query i alone
    "rows": (False, False, False, False),
    "diagonal": (True, False, False, True),
    "symmetric": (True, False, False, False),
    "ids": (True, True, False, False),
    "decoupled": (False, False, True, True),
    "decoupled ids": (True, True, True, False),
}


@dataclass(frozen=True)
class Case:
    """Features, pairs and what they count, also as matrices."""

    q: Tensor
    k: Tensor
    positive: Tensor  # [Bq, Bk], weights of positives
    masked: Tensor  # [Bq, Bk] bool
    weights: Tensor  # [Bq]
    pairs: Pairs
    symmetric: bool
    decoupled: bool

    def targets(self) -> tuple[Tensor, Tensor | None]:
        """What each pair counts of its row and of its column in the oracle's loss."""
        share = 0.5 if self.symmetric else 1.0
        both = []
        for y, w in (
            (self.positive, self.weights[:, None]),
            (self.positive.T, self.weights[None].expand(len(self.k), -1)),
        ):
            counts = w * y / y.sum(1, keepdim=True).clamp(min=1e-300)
            both.append(share * counts / counts.sum().clamp(min=1e-300))
        at = self.positive.nonzero(as_tuple=True)
        return both[0][at], both[1].T[at] if self.symmetric else None


@pytest.fixture
def case(contrastive_oracle) -> Callable[..., Case]:
    """`case(Bq, Bk, D, kind)`: row 0 has every key as positive, unless it has key 0 alone."""

    def make(num_queries: int, num_keys: int, dim: int, kind: str = "symmetric") -> Case:
        symmetric, with_ids, decoupled, one = KINDS[kind]
        g = torch.Generator().manual_seed(num_queries + num_keys)
        q, k = contrastive_oracle.features(num_queries, num_keys, dim)
        positive = contrastive_oracle.diagonal(num_queries, num_keys)
        if not one:
            positive = (torch.rand(num_queries, num_keys, generator=g) < 0.1).double()
            positive *= 0.5 + torch.rand(positive.shape, generator=g).double()
            positive[0] = 1.0
            positive[-1] = float(num_queries == 1)
        ids = (None, None)
        if with_ids:
            ids = tuple(torch.randint(4, (n,), generator=g) for n in (num_queries, num_keys))
        indptr = torch.zeros(num_queries + 1, dtype=torch.int64)
        indptr[1:] = (positive > 0).sum(1).cumsum(0)
        pairs = Pairs(indptr, positive.nonzero()[:, 1].int(), *ids)
        masked = contrastive_oracle.masked_pairs(positive, *ids)
        weights = torch.rand(num_queries, generator=g).double() + 0.5
        return Case(q, k, positive, masked, weights, pairs, symmetric, decoupled)

    return make


@pytest.fixture
def engine(device, monkeypatch):
    """The Triton backend with small tiles and parts, from and to the CPU; more than one of each."""
    from xmc_kernels._triton import similarity, similarity_passes, tiles

    small = {
        key: replace(tiles.TABLES["default"].products[key], m=16, n=16, k=16)
        for key in tiles.TABLES["default"].products
    }
    table = replace(tiles.table(device), products=small)
    monkeypatch.setattr(tiles, "table", lambda device: table)
    monkeypatch.setattr(similarity, "_PART_ROWS", 16)
    monkeypatch.setattr(similarity, "_STATISTICS_ROWS", 16)
    monkeypatch.setattr(similarity, "_STATISTICS_KEYS", 16)
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 4 * 16 * 16)

    def move(value, where=device):
        if isinstance(value, Pairs):
            return Pairs(*(move(t, where) for t in vars(value).values()))
        return value.to(where) if isinstance(value, Tensor) else value

    def run(name: str, *arguments) -> list[Tensor]:
        module = similarity if hasattr(similarity, name) else similarity_passes
        results = getattr(module, name)(*(move(value) for value in arguments))
        places = {t.untyped_storage().data_ptr() for t in results if t.numel()}
        assert len(places) == sum(t.numel() > 0 for t in results)  # no output shares another's
        return [move(t, "cpu") for t in results]

    return run


def softmax_arguments(c: Case, dtype: torch.dtype, scale: float) -> tuple:
    targets = (None if t is None else t.float() for t in c.targets())
    return c.q.to(dtype), c.k.to(dtype), torch.tensor(scale), c.pairs, *targets, c.decoupled


def softmax_results(c: Case, oracle, scale: float, dtype: torch.dtype = torch.float64):
    """Loss, dq, dk, dscale of the oracle."""

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        return oracle.info_nce(
            *(q, k, scale, c.positive),
            masked=c.masked,
            weights=c.weights,
            symmetric=c.symmetric,
            decoupled=c.decoupled,
        )

    return oracle.with_gradients(loss, (c.q, c.k, torch.tensor(scale)), dtype)


def sigmoid_results(c: Case, oracle, scale: float, bias: float, dtype: torch.dtype = torch.float64):
    """Loss, dq, dk, dscale, dbias of the oracle, with row weights that add up to one."""

    def loss(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return oracle.sigmoid_loss(
            *(q, k, scale, bias, c.positive), masked=c.masked, weights=c.weights
        )

    return oracle.with_gradients(loss, (c.q, c.k, torch.tensor(scale), torch.tensor(bias)), dtype)


def check(ours, naive, truth) -> None:
    """Our errors are like those of the naive float32 code."""
    for got, rough, want in zip(ours, naive, truth, strict=True):
        assert got.shape == want.shape
        assert got.dtype == torch.float32
        top = want.abs().max().item()
        error = (got.double() - want).abs().max().item()
        of_naive = (rough.double() - want).abs().max().item()
        assert error <= 4 * of_naive + 3e-6 * max(top, 1e-3), (error, of_naive, top)


@pytest.mark.parametrize(
    ("shape", "kind", "scale"),
    [
        *((shape, kind, 20.0) for shape in SHAPES[2:3] for kind in KINDS),
        *((shape, "ids", 100.0) for shape in SHAPES),
        *((shape, "decoupled ids", 1.0) for shape in SHAPES[3:]),
        (SHAPES[0], "diagonal", 100.0),
        (SHAPES[1], "rows", -3.0),
    ],
    ids=str,
)
def test_softmax_equals_the_whole_matrix(
    shape, kind, scale, case, engine, contrastive_oracle, poisoned
) -> None:
    c = case(*shape, kind)
    ours = engine("softmax_loss", *softmax_arguments(c, torch.float32, scale), True, True)
    truth = softmax_results(c, contrastive_oracle, scale)
    check(ours, softmax_results(c, contrastive_oracle, scale, torch.float32), truth)


@pytest.mark.parametrize(
    ("shape", "kind", "scale", "bias"),
    [
        *((shape, "ids", 10.0, -5.0) for shape in SHAPES[1:]),
        (SHAPES[0], "diagonal", 100.0, -50.0),
        (SHAPES[0], "rows", 1.0, 0.0),
    ],
    ids=str,
)
def test_sigmoid_equals_the_whole_matrix(
    shape, kind, scale, bias, case, engine, contrastive_oracle, poisoned
) -> None:
    c = case(*shape, kind)
    weight = (c.weights / c.weights.sum()).float()
    numbers = (torch.tensor(scale), torch.tensor(bias), c.pairs, weight)
    ours = engine("sigmoid_loss", c.q.float(), c.k.float(), *numbers, True, True)
    results = [
        sigmoid_results(c, contrastive_oracle, scale, bias, dtype)
        for dtype in (torch.float32, torch.float64)
    ]
    check(ours, *results)


@pytest.mark.parametrize("kind", ["rows", "ids", "decoupled ids"])
def test_two_passes_give_what_one_operation_does(kind, case, engine, poisoned) -> None:
    from xmc_kernels._reference import similarity as reference

    c = case(17, 33, 21, kind)
    q, k, scale, pairs, row, column, decoupled = softmax_arguments(c, torch.float32, 20.0)
    want = engine("softmax_loss", q, k, scale, pairs, row, column, decoupled, True, True)
    given = (q.double(), k.double(), scale.double(), pairs, c.symmetric, decoupled)
    truth = reference.softmax_statistics(*given)
    ours = engine("softmax_statistics", q, k, scale, pairs, c.symmetric, decoupled)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), expected[: len(got)], rtol=1e-5, atol=1e-5)
    row_lse, column_lse, scores = ours
    queries = torch.arange(len(q)).repeat_interleave(pairs.indptr.diff())
    target = row = row.where(row_lse[queries] > -torch.inf, 0)  # row 0 may have no terms
    row_weight, column_weight = reference.row_sums(pairs, row), None
    if column is not None:
        assert not (column_lse == -torch.inf).any()
        column_weight = reference.key_sums(pairs, column, len(k))
        target = row + column
    numbers = (target, scores, row_lse.masked_fill(row_lse == -torch.inf, 0), row_weight)
    columns = (column_lse if column is not None else None, column_weight)
    got = engine("softmax_gradients", q, k, scale, pairs, *numbers, *columns, decoupled, True, True)
    torch.testing.assert_close(got, want[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_cost_their_rounding(
    dtype, case, engine, contrastive_oracle
) -> None:
    c = case(33, 35, 24, "diagonal")
    c = replace(c, q=c.q.to(dtype).double(), k=c.k.to(dtype).double())
    loss, dq, dk, d_scale = engine("softmax_loss", *softmax_arguments(c, dtype, 14.0), True, True)
    truth = softmax_results(c, contrastive_oracle, 14.0)
    assert dq.dtype == dk.dtype == dtype
    assert loss.dtype == d_scale.dtype == torch.float32
    for got, want in ((loss, truth[0]), (d_scale, truth[3])):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for got, want in ((dq, truth[1]), (dk, truth[2])):
        # G is rounded to bfloat16 on a GPU; the interpreter truncates results, where that rounds.
        error = (got.double() - want).norm() / want.norm()
        assert error < 1.5 * torch.finfo(dtype).eps + 1e-5, error


@pytest.mark.parametrize("kind", ["symmetric", "decoupled ids"])
def test_only_wanted_gradients_are_made(kind, case, engine) -> None:
    c = case(17, 20, 9, kind)
    weight = torch.rand(17)
    softmax = softmax_arguments(c, torch.float32, 7.0)
    sigmoid = (*softmax[:3], torch.tensor(-2.0), c.pairs, weight)
    for name, arguments in (("softmax_loss", softmax), ("sigmoid_loss", sigmoid)):
        loss, dq, dk, d_scale, *rest = engine(name, *arguments, True, True)
        for want_q, want_k in ((True, False), (False, True), (False, False)):
            got = engine(name, *arguments, want_q, want_k)
            assert torch.equal(got[0], loss)
            assert torch.equal(got[1], dq if want_q else dq[:0])
            assert torch.equal(got[2], dk if want_k else dk[:0])
            assert torch.equal(got[3], d_scale if want_q or want_k else torch.zeros(()))
            assert all(torch.equal(a, b) for a, b in zip(got[4:], rest, strict=True))


UNEVEN = {
    # m, n, k
    "statistics": (32, 16, 32),
    "gradient": (16, 32, 16),
    "sigmoid": (32, 16, 32),
    "products": (64, 16, 64),
}


def test_sizes_of_tiles_and_parts_change_nothing_but_rounding(
    case, engine, monkeypatch, device, poisoned
) -> None:
    from xmc_kernels._triton import similarity, tiles

    c = case(20, 66, 9, "ids")
    softmax = (*softmax_arguments(c, torch.float32, 30.0), True, True)
    sigmoid = (*softmax[:3], torch.tensor(-9.0), c.pairs, c.weights.float(), True, True)
    results = [[engine("softmax_loss", *softmax), engine("sigmoid_loss", *sigmoid)]]
    small = tiles.table(device)
    uneven = {
        (name, wide): replace(row, **dict(zip("mnk", UNEVEN[name], strict=True)))
        for (name, wide), row in small.products.items()
    }
    monkeypatch.setattr(tiles, "table", lambda device: replace(small, products=uneven))
    for name in ("_PART_ROWS", "_STATISTICS_ROWS", "_STATISTICS_KEYS"):
        monkeypatch.setattr(similarity, name, 64)
    for scratch in (0, 2**26):
        monkeypatch.setattr(tiles, "SCRATCH_BYTES", scratch)
        results.append([engine("softmax_loss", *softmax), engine("sigmoid_loss", *sigmoid)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


def test_rows_and_columns_far_below_the_others_count(engine) -> None:
    # Row 0 has scores around 1,000, row 1 around -1,000: no common reference would do.
    q = torch.tensor([[1000.0], [-1000.0], [1.0]])
    k = torch.tensor([[1.0], [1.001], [0.5]])
    pairs = Pairs(torch.arange(4), torch.arange(3, dtype=torch.int32))
    target = torch.full((3,), 1 / 3)
    ours = engine("softmax_loss", q, k, torch.tensor(1.0), pairs, target, target, False, True, True)
    truth = operations.softmax_loss(
        *(q.double(), k.double(), torch.tensor(1.0), pairs, target.double(), target.double())
    )
    torch.testing.assert_close([t.double() for t in ours], list(truth), rtol=1e-3, atol=1e-3)


def test_a_scale_of_zero_is_not_divided_by(case, engine, contrastive_oracle) -> None:
    c = case(20, 18, 5, "symmetric")
    ours = engine("softmax_loss", *softmax_arguments(c, torch.float32, 0.0), True, True)
    truth = softmax_results(c, contrastive_oracle, 0.0)
    check(ours, softmax_results(c, contrastive_oracle, 0.0, torch.float32), truth)
    assert ours[1].abs().max() == 0
    assert ours[3] != 0


def test_strided_features_and_rows_beside_them(case, engine) -> None:
    c = case(18, 20, 6, "ids")
    q, k, *rest = softmax_arguments(c, torch.float32, 5.0)
    room = torch.full((2, 64, 6), torch.nan)
    room[0, 8:26], room[1, 8:28] = q, k
    want = engine("softmax_loss", q, k, *rest, True, True)
    for strided in (
        (room[0, 8:26], room[1, 8:28]),
        (q.T.contiguous().T, k.repeat(1, 2)[:, :6]),
    ):
        got = engine("softmax_loss", *strided, *rest, True, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_queries_and_no_pairs(engine, case) -> None:
    k = torch.randn(5, 3)
    for q, indptr in ((torch.empty(0, 3), torch.zeros(1)), (torch.randn(4, 3), torch.zeros(5))):
        pairs = Pairs(indptr.long(), torch.empty(0, dtype=torch.int32))
        empty = torch.empty(0)
        numbers = (torch.tensor(2.0), pairs, empty, empty, False, True, True)
        loss, dq, dk, d_scale = engine("softmax_loss", q, k, *numbers)
        assert loss == d_scale == 0
        assert torch.equal(dq, torch.zeros_like(q))
        assert torch.equal(dk, torch.zeros_like(k))


def test_the_gradient_of_a_part_fits_its_scratch() -> None:
    from xmc_kernels._triton import similarity, tiles

    for rows, keys in ((65536, 65536), (128, 4_000_000), (4_000_000, 128), (1000, 70), (0, 1)):
        q, k = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (rows, keys))
        of_rows, of_keys = similarity.part_size(q, k, 128)
        assert of_rows % 128 == of_keys % 128 == 0
        bytes_each = 2 if similarity.stores_bfloat16(q) else 4
        assert bytes_each * of_rows * of_keys <= tiles.SCRATCH_BYTES
        assert of_rows <= max(rows, 1) + 127
        assert of_keys < keys + 128


@pytest.fixture
def normal(contrastive_oracle):
    """`normal(B, D)`: float32 features and the pairs of key i for query i, on the GPU."""

    def make(num: int, dim: int) -> tuple[Tensor, Tensor, Pairs, Tensor]:
        q, k = (t.float().cuda() for t in contrastive_oracle.features(num, num, dim))
        numbers = torch.arange(num + 1, device="cuda")
        target = torch.full((num,), 0.5 / num, device="cuda")
        return q, k, Pairs(numbers, numbers[:-1].int()), target

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-3), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("shape", [(300, 520, 96), (1000, 777, 61), (130, 5000, 768)], ids=str)
def test_the_operations_on_a_gpu_equal_float64(shape, dtype, limit, kind, case) -> None:
    c = case(*shape, kind)
    q, k, scale, _, row_target, column_target, decoupled = softmax_arguments(c, dtype, 5.0)
    for name in ("softmax_loss", "sigmoid_loss"):
        results = []
        for device, wide in (("cuda", False), ("cpu", True)):
            pairs = Pairs(*(None if t is None else t.to(device) for t in vars(c.pairs).values()))

            def on(t, device=device, wide=wide):
                return None if t is None else t.to(device, torch.float64 if wide else t.dtype)

            if name == "softmax_loss":
                rest = (pairs, on(row_target), on(column_target))
                options = {"decoupled": decoupled}
            else:
                rest, options = (on(torch.tensor(-2.0)), pairs, on(c.weights.float())), {}
            one = getattr(operations, name)(on(q), on(k), on(scale), *rest, **options)
            results.append([t.cpu().double() for t in one])
        for ours, truth in zip(*results, strict=True):
            error = (ours - truth).norm() / truth.norm().clamp(min=1e-6)
            assert error < limit, (name, error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit_on_a_gpu(dtype, normal) -> None:
    q, k, pairs, target = normal(9000, 200)
    arguments = (q.to(dtype), k.to(dtype), torch.tensor(50.0, device="cuda"), pairs, target, target)
    first, second = (operations.softmax_loss(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_large_batch_takes_at_most_20_bytes_a_feature_element(normal) -> None:
    q, k, pairs, target = normal(65536, 256)
    q, k = q.bfloat16(), k.bfloat16()
    scale = torch.tensor(20.0, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, dq, dk, _ = operations.softmax_loss(q, k, scale, pairs, target, target)
    elements = q.numel() + k.numel()
    more = torch.cuda.max_memory_allocated() - before
    # Gradients and sums of dk in float32, and the scratch of a part: constant.
    assert more < 4 * elements + 2**28, more
    assert more + 2 * elements < 20 * elements, more / elements

    # Some rows of dq and dk against the definition.
    some = torch.arange(7, 65536, 1021, device="cuda")
    for mine, theirs, gradient in ((q, k, dq), (k, q, dk)):
        other = torch.cat(
            [(20 * t @ mine.float().T).logsumexp(1) for t in theirs.float().split(512)]
        )
        scores = 20 * mine[some].double() @ theirs.double().T
        share = scores.softmax(1) + (scores - other).exp()
        share[torch.arange(len(some)), some] -= 2
        truth = 20 * 0.5 / 65536 * share @ theirs.double()
        error = (gradient[some].double() - truth).norm() / truth.norm()
        assert error < 6e-3, error
