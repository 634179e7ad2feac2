"""The similarity engine against whole matrices in float64: reference, and compiled on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xmc_kernels import similarity
from xmc_kernels._cpu import similarity as cpu
from xmc_kernels._reference import similarity as reference
from xmc_kernels.pairs import Pairs

SHAPES = [
    # Bq, Bk, D: round, odd in one, odd in all, and the corners
    (64, 64, 32),
    (64, 70, 32),
    (7, 7, 257),
    (130, 33, 17),
    (513, 513, 3),
    (2, 1, 1),
    (1, 1, 5),
    (1, 300, 4),
]
KINDS = ["rows", "symmetric", "ids", "decoupled", "decoupled ids"]


@dataclass(frozen=True)
class Case:
    """Features and designated pairs with targets for the operation, and as matrices."""

    q: Tensor
    k: Tensor
    positive: Tensor  # [Bq, Bk] bool
    masked: Tensor  # [Bq, Bk] bool
    pairs: Pairs
    row_target: Tensor  # [nnz] float64
    column_target: Tensor | None

    def arguments(self, dtype: torch.dtype, scale: float) -> tuple:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        targets = (None if t is None else t.to(wide) for t in (self.row_target, self.column_target))
        number = torch.tensor(scale, dtype=wide)
        return self.q.to(dtype), self.k.to(dtype), number, self.pairs, *targets


@pytest.fixture
def case(contrastive_oracle):
    """`case(Bq, Bk, D, kind)`: some positives a row, none in the last."""

    def make(num_queries: int, num_keys: int, dim: int, kind: str = "symmetric") -> Case:
        g = torch.Generator().manual_seed(num_queries + num_keys)
        q, k = contrastive_oracle.features(num_queries, num_keys, dim)
        positive = torch.rand(num_queries, num_keys, generator=g) < 2 / num_keys
        positive |= torch.eye(num_queries, num_keys, dtype=torch.bool)
        if num_queries > 2:
            positive[-1] = False
        ids = (None, None)
        if "ids" in kind:
            groups = max(2, num_keys // 3)
            ids = tuple(torch.randint(groups, (n,), generator=g) for n in (num_queries, num_keys))
        indptr = torch.zeros(num_queries + 1, dtype=torch.int64)
        indptr[1:] = positive.sum(1).cumsum(0)
        pairs = Pairs(indptr, positive.nonzero()[:, 1].int(), *ids)
        targets = torch.rand(2, pairs.num_pairs, generator=g, dtype=torch.float64).float().double()
        return Case(
            *(q, k, positive, contrastive_oracle.masked_pairs(positive, *ids), pairs),
            targets[0] / num_queries,
            None if kind == "rows" else targets[1] / num_queries,
        )

    return make


def softmax_truth(case: Case, kind: str, dtype: torch.dtype = torch.float64):
    """The operation's definition on the whole matrix."""

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        scores = scale * (q @ k.T)
        left_out = case.masked | case.positive if "decoupled" in kind else case.masked
        inside = scores.masked_fill(left_out, -torch.inf)
        rows, keys = case.positive.nonzero().T
        total = scores.new_zeros(())
        for target, dim, at in ((case.row_target, 1, rows), (case.column_target, 0, keys)):
            if target is not None:
                lse = torch.where(left_out.all(dim), 0, inside.logsumexp(dim))[at]
                alive = ~left_out.all(dim)[at]
                terms = target.to(dtype) * (lse - scores[rows, keys])
                total = total + torch.where(alive, terms, 0).sum()
        return total

    return loss


def check(ours, naive, truth, dtype) -> None:
    """Our errors are like those of the naive code; none to speak of in float64."""
    for got, rough, want in zip(ours, naive, truth, strict=True):
        assert got.shape == want.shape
        top = want.abs().max().item()
        error = (got.double() - want).abs().max().item()
        of_naive = (rough.double() - want).abs().max().item()
        if dtype == torch.float64:
            assert error <= 1e-12 * max(top, 1), (error, top)
        else:
            assert error <= 4 * of_naive + 3e-6 * max(top, 1e-3), (error, of_naive, top)


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_equals_the_whole_matrix(
    shape, kind, scale, case, contrastive_oracle, poisoned
) -> None:
    c = case(*shape, kind)
    loss = softmax_truth(c, kind)
    leaves = (c.q, c.k, torch.tensor(scale))
    truth = contrastive_oracle.with_gradients(loss, leaves)
    naive = contrastive_oracle.with_gradients(
        softmax_truth(c, kind, torch.float32), leaves, torch.float32
    )
    for dtype in (torch.float32, torch.float64):
        ours = similarity.softmax_loss(*c.arguments(dtype, scale), decoupled="decoupled" in kind)
        assert [t.dtype for t in ours] == [dtype] * 4
        check(ours, naive, truth, dtype)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", ["rows", "ids"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_equals_the_whole_matrix(
    shape, kind, scale, case, contrastive_oracle, poisoned
) -> None:
    c = case(*shape, kind)
    weight = torch.rand(shape[0], dtype=torch.float64).float().double()
    leaves = (c.q, c.k, torch.tensor(scale), torch.tensor(-0.5 * scale))

    def loss(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        of_mean = contrastive_oracle.sigmoid_loss(
            *(q, k, scale, bias, c.positive.double()), masked=c.masked, weights=weight
        )
        return of_mean * weight.to(q.dtype).sum()

    truth = contrastive_oracle.with_gradients(loss, leaves)
    naive = contrastive_oracle.with_gradients(loss, leaves, torch.float32)
    for dtype in (torch.float32, torch.float64):
        q, k, number, pairs, *_ = c.arguments(dtype, scale)
        ours = similarity.sigmoid_loss(q, k, number, -0.5 * number, pairs, weight.to(dtype))
        check(ours, naive, truth, dtype)


@pytest.mark.parametrize("kind", ["rows", "ids"])
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[5:], ids=str)
def test_recall_equals_the_whole_matrix(shape, kind, case, contrastive_oracle, poisoned) -> None:
    c = case(*shape, kind)
    options = {"ks": (1, 3, 8), "rank_temperature": 0.1, "cut_temperature": 0.7}
    weight = torch.ones(shape[0], dtype=torch.float64).masked_fill(~c.positive.any(1), 0)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        mean = contrastive_oracle.recall_at_k(q, k, c.positive, masked=c.masked, **options)
        return mean * weight.to(q.dtype).sum()

    truth = contrastive_oracle.with_gradients(loss, (c.q, c.k))
    naive = contrastive_oracle.with_gradients(loss, (c.q, c.k), torch.float32)
    for dtype in (torch.float32, torch.float64):
        ours = similarity.recall_loss(
            c.q.to(dtype), c.k.to(dtype), c.pairs, weight.to(dtype), **options
        )
        check(ours, naive, truth, dtype)


@pytest.mark.parametrize("kind", ["rows", "symmetric", "decoupled ids"])
def test_tiles_change_nothing_but_rounding(kind, case) -> None:
    c = case(130, 75, 17, kind)
    decoupled = "decoupled" in kind
    want = reference.softmax_loss(*c.arguments(torch.float64, 50), decoupled, True, True)
    for tile in (7, 16, 50, 128):
        got = reference.softmax_loss(
            *c.arguments(torch.float64, 50), decoupled, True, True, tile=tile
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        got = cpu.softmax_loss(*c.arguments(torch.float32, 50), decoupled, True, True, tile=tile)
        torch.testing.assert_close([t.double() for t in got], list(want), rtol=3e-4, atol=2e-5)
    weight = c.row_target.new_ones(130)
    bias = torch.tensor(-5.0)
    sigmoids = [
        backend.sigmoid_loss(
            *(*c.arguments(dtype, 10)[:3], bias, c.pairs, weight.to(dtype), True, True), tile=tile
        )
        for backend, dtype, tile in (
            (reference, torch.float64, 1024),
            (reference, torch.float64, 19),
            (cpu, torch.float32, 48),
            (cpu, torch.float32, 1024),
        )
    ]
    for got in sigmoids[1:]:
        torch.testing.assert_close(
            [t.double() for t in got], list(sigmoids[0]), rtol=1e-4, atol=1e-5
        )
    recalls = [
        reference.recall_loss(*(c.q, c.k, c.pairs, weight, [1, 4], 0.1, 1.0, True, True), tile=tile)
        for tile in (1024, 19)
    ]
    torch.testing.assert_close(*recalls, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "symmetric", "decoupled ids"])
def test_tiles_kept_between_passes_are_those_computed_again(kind, case, monkeypatch) -> None:
    c = case(130, 75, 17, kind)
    arguments = (*c.arguments(torch.float32, 50), "decoupled" in kind, True, True)
    want = cpu.softmax_loss(*arguments, tile=32)
    for numbers in (0, 2000, 4000, 8000):
        monkeypatch.setattr(cpu, "KEPT", numbers)
        for got, expected in zip(cpu.softmax_loss(*arguments, tile=32), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, case) -> None:
    c = case(600, 530, 64, "ids")
    arguments = c.arguments(dtype, 30)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(cpu.softmax_loss(*arguments, False, True, True, tile=256))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_products_are_the_same_without_onednn(case, monkeypatch) -> None:
    c = case(60, 70, 33, "symmetric")
    arguments = (*c.arguments(torch.float32, 20), False, True, True)
    want = cpu.softmax_loss(*arguments)
    monkeypatch.setattr(cpu, "_linear", lambda: None)
    torch.testing.assert_close(cpu.softmax_loss(*arguments), want, rtol=1e-4, atol=1e-6)


def test_only_wanted_gradients_are_returned(case) -> None:
    c = case(65, 40, 9, "symmetric")
    for dtype in (torch.float32, torch.float64):
        arguments = c.arguments(dtype, 7.0)
        loss, dq, dk, d_scale = similarity.softmax_loss(*arguments)
        for want_q, want_k in ((True, False), (False, True), (False, False)):
            got = similarity.softmax_loss(*arguments, want_q=want_q, want_k=want_k)
            assert torch.equal(got[0], loss)
            assert torch.equal(got[1], dq if want_q else dq[:0])
            assert torch.equal(got[2], dk if want_k else dk[:0])
            expected = d_scale if want_q or want_k else torch.zeros_like(d_scale)
            torch.testing.assert_close(got[3], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_bfloat16_features_cost_what_their_gradient_tiles_do(scale, case, monkeypatch) -> None:
    c = case(200, 200, 64, "symmetric")
    q, k, *rest = c.arguments(torch.bfloat16, scale)
    wide = (t.double() if isinstance(t, Tensor) else t for t in rest)
    truth = similarity.softmax_loss(q.double(), k.double(), *wide)
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    ours = similarity.softmax_loss(q, k, *rest)
    assert [t.dtype for t in ours] == [torch.float32, *2 * [torch.bfloat16], torch.float32]
    # Scores and sums are float32: the value has no error of bfloat16.
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    for got, want in zip(ours[1:3], truth[1:3], strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 0.006, error
    # Without products of bfloat16 all of it is float32, but for the rounded result.
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    for got, want in zip(similarity.softmax_loss(q, k, *rest)[1:3], truth[1:3], strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 0.003, error
    half = similarity.softmax_loss(q.half(), k.half(), *rest)
    error = (half[1].double() - truth[1]).norm() / truth[1].norm()
    assert half[1].dtype == torch.float16 and error < 0.002, error


def test_features_may_be_strided(case) -> None:
    c = case(33, 20, 6, "ids")
    q, k, *rest = c.arguments(torch.float32, 5.0)
    want = similarity.softmax_loss(q, k, *rest)
    got = similarity.softmax_loss(q.T.contiguous().T, k.repeat(1, 2)[:, :6], *rest)
    torch.testing.assert_close(got, want)


def test_rows_beside_the_features_are_not_read(case, contrastive_oracle) -> None:
    # Published kernels load rows beyond a ragged batch.
    c = case(37, 41, 5, "symmetric")
    q, k, *rest = c.arguments(torch.float32, 20.0)
    room = torch.full((2, 64, 5), torch.nan)
    room[0, 8:45], room[1, 8:49] = q, k
    got = similarity.softmax_loss(room[0, 8:45], room[1, 8:49], *rest)
    for ours, want in zip(got, similarity.softmax_loss(q, k, *rest), strict=True):
        assert torch.equal(ours, want)


def test_scores_of_a_hundred_do_not_overflow() -> None:
    # Published: infinite at scale 100 where no maximum is subtracted.
    x = torch.ones(300, 1)
    pairs = Pairs(torch.arange(301), torch.arange(300, dtype=torch.int32))
    target = torch.full((300,), 1 / 300)
    for scale in (100.0, -100.0, 1e4):
        loss, dq, dk, d_scale = similarity.softmax_loss(
            x, x, torch.tensor(scale), pairs, target, target
        )
        assert loss.item() == pytest.approx(2 * torch.tensor(300.0).log().item(), rel=1e-5)
        for gradient in (dq, dk):
            assert gradient.abs().max() < 1e-5 * abs(scale)
        assert abs(d_scale.item()) < 1e-4


def test_scores_that_underflow_beside_a_row_or_column_of_their_own_do_count() -> None:
    # Row 0 has scores around 1,000, row 1 around -1,000: no common reference would do.
    q = torch.tensor([[1000.0], [-1000.0], [1.0]])
    k = torch.tensor([[1.0], [1.001], [0.5]])
    pairs = Pairs(torch.arange(4), torch.arange(3, dtype=torch.int32))
    target = torch.full((3,), 1 / 3)
    for columns in (None, target):
        arguments = (torch.tensor(1.0), pairs, target, columns)
        ours = similarity.softmax_loss(q, k, *arguments)
        wide = (
            None if t is None else t.double() if isinstance(t, Tensor) else t for t in arguments
        )
        truth = similarity.softmax_loss(q.double(), k.double(), *wide)
        torch.testing.assert_close([t.double() for t in ours], list(truth), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_more_than_2_to_the_31_scores() -> None:
    # Published kernels count scores in 32 bits. Keys of one number, 1 or -1, have sums in closed
    # form.
    num_queries, num_keys = 2**16 + 3, 2**15 + 1
    q = torch.linspace(-2, 2, num_queries)[:, None]
    k = torch.ones(num_keys, 1)
    k[::3] = -1
    keys = torch.arange(num_queries) * 7 % num_keys
    pairs = Pairs(torch.arange(num_queries + 1), keys.int())
    target = torch.zeros(num_queries)
    target[-3:] = 1  # beyond the 2^31st
    loss, *_ = similarity.softmax_loss(
        q, k, torch.tensor(3.0), pairs, target, want_q=False, want_k=False
    )
    minus = (num_keys + 2) // 3
    x = 3 * q[-3:, 0].double()
    sums = (num_keys - minus) * x.exp() + minus * (-x).exp()
    assert loss.item() == pytest.approx((sums.log() - x * k[keys[-3:], 0]).sum().item(), rel=1e-6)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
def test_no_tensor_is_larger_than_a_tile_or_the_features(backend, case) -> None:
    c = case(200, 240, 16, "ids")
    arguments = c.arguments(torch.float32, 20.0)
    weight = torch.ones(200)
    for run in (
        lambda: backend.softmax_loss(*arguments, False, True, True, tile=32),
        lambda: backend.sigmoid_loss(
            *(*arguments[:3], torch.tensor(-5.0), c.pairs, weight, True, True), tile=32
        ),
        lambda: reference.recall_loss(
            *(*arguments[:2], c.pairs, weight, [1, 4], 0.1, 1.0, True, True), tile=32
        ),
    ):
        with Largest() as largest, torch.no_grad():
            run()
        assert 0 < largest.numbers <= 240 * 16 < 200 * 240


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_tiles_and_gradients(case) -> None:
    size, dim = 8192, 16
    q, k = torch.randn(2, size, dim)
    pairs = Pairs(torch.arange(size + 1), torch.arange(size, dtype=torch.int32))
    target = torch.full((size,), 1 / size)
    arguments = (q, k, torch.tensor(1.0), pairs, target, target)
    few = Pairs(pairs.indptr[:65], pairs.indices[:64])
    similarity.softmax_loss(q[:64], k, arguments[2], few, target[:64], target[:64])  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    similarity.softmax_loss(*arguments)
    # Two kept tiles, one more, its gradient's products, and numbers per row: S has 268 MB.
    assert resident("VmHWM") - before < 40e6


def test_operations_are_registered_as_torch_expects(case) -> None:
    c = case(20, 24, 6, "ids")
    q, k, scale, pairs, row, column = c.arguments(torch.float32, 5.0)
    of_pairs = (pairs.indptr, pairs.indices, pairs.query_ids, pairs.key_ids)
    weight, bias = torch.ones(20), torch.tensor(-1.0)
    for operation, arguments in (
        (similarity._softmax_loss, (q, k, scale, *of_pairs, row, column, False, True, False)),
        (similarity._sigmoid_loss, (q, k, scale, bias, *of_pairs, weight, False, True, True)),
        (similarity._recall_loss, (q, k, *of_pairs, weight, [1, 2], 0.1, 1.0, True, True)),
    ):
        torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": torch.ones(4, 2)},
            r"expected q \[Bq, D\] and k .* of the same D.*\[4, 2\] and \[5, 3\]",
        ),
        ({"q": torch.ones(4)}, r"got \[4\] and \[5, 3\]"),
        ({"k": torch.ones(0, 3)}, r"at least one key and feature, got \[4, 3\] and \[0, 3\]"),
        ({"k": torch.ones(5, 3).double()}, "expected q and k both of .*float32 and torch.float64"),
        ({"scale": torch.ones(1)}, r"expected scale as a number .*got torch.float32 \[1\]"),
        ({"scale": torch.tensor(torch.nan)}, "expected a finite scale, got nan"),
        ({"q": torch.full((4, 3), torch.nan)}, "expected finite q, row 0 has NaN"),
        (
            {"k": torch.ones(5, 3).index_fill(0, torch.tensor(2), torch.inf)},
            "expected finite k, row 2 has an infinity",
        ),
        (
            {"indices": torch.tensor([0, 1, 2, 5], dtype=torch.int32)},
            r"expected positives in \[0, 5\), the keys, got 0 to 5",
        ),
        ({"indices": torch.tensor([0, 1, 2, -1], dtype=torch.int32)}, "got -1 to 2"),
        (
            {
                "indptr": torch.tensor([0, 1, 3, 3, 4]),
                "indices": torch.tensor([0, 2, 1, 3], dtype=torch.int32),
            },
            "expected sorted, distinct positives in each row, row 1 has not",
        ),
        ({"indptr": torch.arange(4)}, r"expected positives with indptr of shape \[5\].*got \[4\]"),
        (
            {"indptr": torch.tensor([0, 1, 2, 3, 3])},
            "expected positives with an indptr from 0 to 4",
        ),
        ({"query_ids": torch.arange(4)}, "expected key_ids beside query_ids, got None"),
        ({"key_ids": torch.arange(5)}, "expected query_ids beside key_ids, got None"),
        (
            {"query_ids": torch.arange(3), "key_ids": torch.arange(5)},
            r"expected query_ids of shape \[4\].*got \[3\]",
        ),
        (
            {"query_ids": torch.arange(4), "key_ids": torch.arange(5).int()},
            "expected key_ids of int64, got torch.int32",
        ),
        ({"row": torch.ones(3)}, r"expected row_target of shape \[4\].*got \[3\]"),
        (
            {"row": torch.ones(4).double()},
            "expected row_target of torch.float32, got torch.float64",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_errors_name_argument_rule_and_value(changes, message) -> None:
    given = {
        "q": torch.ones(4, 3),
        "k": torch.ones(5, 3),
        "scale": torch.tensor(1.0),
        "indptr": torch.arange(5),
        "indices": torch.arange(4, dtype=torch.int32),
        "query_ids": None,
        "key_ids": None,
        "row": torch.ones(4),
    } | changes
    pairs = Pairs(*(given[name] for name in ("indptr", "indices", "query_ids", "key_ids")))
    with pytest.raises((ValueError, TypeError), match=message):
        similarity.softmax_loss(given["q"], given["k"], given["scale"], pairs, given["row"])


def test_recall_errors() -> None:
    x, pairs = torch.ones(2, 3), Pairs(torch.arange(3), torch.arange(2, dtype=torch.int32))
    for options, message in (
        ({"ks": ()}, r"expected ks of at least one cut-off from 1 on, got \[\]"),
        ({"ks": (0, 2)}, r"from 1 on, got \[0, 2\]"),
        ({"rank_temperature": 0.0}, "expected rank_temperature above 0, got 0.0"),
        ({"cut_temperature": -1.0}, "expected cut_temperature above 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity.recall_loss(x, x, pairs, torch.ones(2), **options)
