"""InfoNCE against the whole matrix of similarities in float64: values, gradients, meaning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import xmc
from xmc.losses import InfoNCE, info_nce
from xmc.types import SparseLabels


def labels(positive: Tensor) -> SparseLabels:
    """CSR of a matrix's entries above 0."""
    indptr = torch.zeros(len(positive) + 1, dtype=torch.int64)
    indptr[1:] = (positive > 0).sum(1).cumsum(0)
    return SparseLabels(indptr, positive.nonzero()[:, 1].int(), positive.shape[1])


def gradients(loss, tensors: tuple[Tensor, ...], dtype: torch.dtype):
    """The loss and its gradients in tensors of a dtype."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_like_oracle(contrastive_oracle, ours, oracle_loss, tensors) -> None:
    truth = contrastive_oracle.with_gradients(oracle_loss, tensors)
    naive = contrastive_oracle.with_gradients(oracle_loss, tensors, torch.float32)
    for dtype in (torch.float64, torch.float32):
        for got, rough, want in zip(gradients(ours, tensors, dtype), naive, truth, strict=True):
            assert got.dtype == dtype and got.shape == want.shape
            error, top = (got.double() - want).abs().max(), want.abs().max()
            limit = 4 * (rough.double() - want).abs().max() + 3e-6 * top.clamp(min=1e-2)
            assert error <= (1e-12 * top.clamp(min=1) if dtype == torch.float64 else limit)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)),
    scale=st.floats(0.5, 100),
    symmetric=st.booleans(),
    decoupled=st.booleans(),
    multiple=st.booleans(),
    with_ids=st.booleans(),
    with_weights=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_whole_matrix(
    contrastive_oracle,
    shape,
    scale,
    symmetric,
    decoupled,
    multiple,
    with_ids,
    with_weights,
    seed,
) -> None:
    num_queries, num_keys, dim = shape
    if not multiple:
        num_keys = max(num_queries, num_keys)
    g = torch.Generator().manual_seed(seed)
    q, k = contrastive_oracle.features(num_queries, num_keys, dim, seed)
    positive = contrastive_oracle.diagonal(num_queries, num_keys)
    values = None
    if multiple:
        chosen = torch.rand(positive.shape, generator=g) < 0.2
        positive = torch.where(chosen, torch.rand(positive.shape, generator=g).double(), 0)
        values = positive[positive > 0]
    ids = (None, None)
    if with_ids:
        ids = tuple(torch.randint(6, (n,), generator=g) for n in (num_queries, num_keys))
    weights = torch.rand(num_queries, generator=g).double() if with_weights else None
    common = {"symmetric": symmetric, "decoupled": decoupled, "weights": weights}

    def ours(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        return info_nce(
            q,
            k,
            scale=scale,
            positives=labels(positive) if multiple else None,
            positive_weights=values,
            query_ids=ids[0],
            key_ids=ids[1],
            **common,
        )

    def truth(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        masked = contrastive_oracle.masked_pairs(positive, *ids)
        return contrastive_oracle.info_nce(q, k, scale, positive, masked=masked, **common)

    tensors = (q, k, torch.tensor(scale, dtype=torch.float64).float().double())
    assert_like_oracle(contrastive_oracle, ours, truth, tensors)


def test_symmetric_loss_is_two_cross_entropies() -> None:
    q, k = torch.randn(2, 50, 8, dtype=torch.float64)
    scores, own = 3 * q @ k.T, torch.arange(50)
    entropy = torch.nn.functional.cross_entropy
    want = (entropy(scores, own) + entropy(scores.T, own)) / 2
    torch.testing.assert_close(info_nce(q, k, scale=3.0, symmetric=True), want)
    torch.testing.assert_close(info_nce(q, k, scale=3.0), entropy(scores, own))
    # Further keys are negatives of the rows and have no loss of their own.
    more = torch.cat([k, torch.randn(13, 8, dtype=torch.float64)])
    wide = 3 * q @ more.T
    want = (entropy(wide, own) + entropy(wide.T[:50], own)) / 2
    torch.testing.assert_close(info_nce(q, more, scale=3.0, symmetric=True), want)


def test_a_label_table_of_many_rows_is_a_softmax_layer() -> None:
    x, table = torch.randn(9, 6, dtype=torch.float64), torch.randn(3000, 6, dtype=torch.float64)
    target = torch.randint(3000, (9,))
    positives = SparseLabels(torch.arange(10), target.int(), 3000)
    got = info_nce(x, table, scale=1.0, positives=positives)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(x @ table.T, target))


def test_gradients_pass_gradcheck() -> None:
    q, k = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    positives = labels(torch.rand(5, 7) < 0.4)
    ids = {"query_ids": torch.arange(5) % 3, "key_ids": torch.arange(7) % 4}
    for options in ({}, {"symmetric": True}, {"positives": positives, "decoupled": True} | ids):
        assert torch.autograd.gradcheck(
            lambda q, k, s, o=options: info_nce(q, k, scale=s, **o), (q, k, scale)
        )


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), ()], ids=str)
def test_only_needed_gradients_are_computed(wanted, monkeypatch) -> None:
    from xmc_kernels import similarity

    calls, operation = [], similarity.softmax_loss

    def spy(*args, **options):
        calls.append((options["want_q"], options["want_k"]))
        return operation(*args, **options)

    monkeypatch.setattr(similarity, "softmax_loss", spy)
    full = [torch.randn(6, 4), torch.randn(8, 4), torch.tensor(3.0)]
    want = gradients(lambda q, k, s: info_nce(q, k, scale=s), tuple(full), torch.float32)
    calls.clear()
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(full)]
    loss = info_nce(leaves[0], leaves[1], scale=leaves[2])
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    # The scale's gradient comes from either side.
    want_k = 1 in wanted
    assert calls == [(0 in wanted or (2 in wanted and not want_k), want_k)]
    for i, leaf in enumerate(leaves):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, want[1 + i])
        else:
            assert leaf.grad is None


def test_without_grad_mode_only_the_value_is_computed(monkeypatch) -> None:
    from xmc_kernels import similarity

    q = torch.randn(6, 4, requires_grad=True)
    want, operation = info_nce(q, q, scale=2.0), similarity.softmax_loss

    def spy(*args, **options):
        assert not (options["want_q"] or options["want_k"])
        return operation(*args, **options)

    monkeypatch.setattr(similarity, "softmax_loss", spy)
    with torch.no_grad():
        got = info_nce(q, q, scale=2.0)
    assert not got.requires_grad and torch.equal(got, want.detach())


def test_upstream_gradient_and_kept_graph() -> None:
    q, k = torch.randn(2, 6, 4)
    once = gradients(lambda q, k: info_nce(q, k, scale=2.0), (q, k), torch.float32)
    scaled = gradients(lambda q, k: -2.5 * info_nce(q, k, scale=2.0), (q, k), torch.float32)
    torch.testing.assert_close(scaled[1:], [-2.5 * t for t in once[1:]])
    leaf = q.clone().requires_grad_()
    loss = info_nce(leaf, k, scale=2.0)
    loss.backward(retain_graph=True)
    first = leaf.grad
    assert first is not None
    before = first.clone()
    leaf.grad = None
    (3 * loss).backward()
    assert torch.equal(first, before)
    torch.testing.assert_close(leaf.grad, 3 * first)
    # One tensor on both sides gets both gradients.
    x = q.clone().requires_grad_()
    info_nce(x, x, scale=2.0).backward()
    a, b = gradients(lambda q, k: info_nce(q, k, scale=2.0), (q, q), torch.float32)[1:]
    torch.testing.assert_close(x.grad, a + b)


def test_gradients_are_handed_over_without_a_copy() -> None:
    q, k = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    loss = info_nce(q, k, scale=2.0)
    made = [t.data_ptr() for t in loss.grad_fn.gradients[:2]]
    (2 * loss).backward()
    assert q.grad is not None and k.grad is not None
    assert made == [q.grad.data_ptr(), k.grad.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype) -> None:
    q, k = torch.randn(2, 20, 4)
    want = gradients(lambda q, k: info_nce(q, k, scale=9.0), (q, k), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda q, k: info_nce(q, k, scale=9.0), (q, k), dtype)
    for ours, expected in zip(got, want, strict=True):
        assert torch.equal(ours, expected)


def test_a_second_derivative_is_refused() -> None:
    q, k = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    (gradient,) = torch.autograd.grad(info_nce(q, k, scale=2.0), q, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation of a tiled loss, got a"):
        gradient.sum().backward()


def test_masked_and_empty_rows_have_no_loss() -> None:
    q, k = torch.randn(2, 4, 3)
    q.requires_grad_()
    same = torch.zeros(4, dtype=torch.int64)
    # All keys have the query's id: only the positive itself is left of each row.
    loss = info_nce(q, k, scale=5.0, query_ids=same, key_ids=same)
    loss.backward()
    assert loss.item() == 0 and q.grad is not None and q.grad.abs().max() < 1e-6
    # Decoupled, nothing is left.
    for symmetric in (False, True):
        q.grad = None
        options = {"query_ids": same, "key_ids": same, "symmetric": symmetric}
        loss = info_nce(q, k, scale=5.0, decoupled=True, **options)
        loss.backward()
        assert loss.item() == 0 and q.grad is not None and torch.equal(q.grad, torch.zeros(4, 3))
    # No row has a positive, or none a weight.
    nothing = SparseLabels(torch.zeros(5, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), 4)
    for options in ({"positives": nothing}, {"weights": torch.zeros(4)}):
        q.grad = None
        loss = info_nce(q, k, scale=5.0, symmetric=True, **options)
        loss.backward()
        assert loss.item() == 0 and q.grad is not None and torch.equal(q.grad, torch.zeros(4, 3))


def test_duplicates_of_a_label_are_no_negatives() -> None:
    # Queries 0 and 2 carry the same label, so their keys are the same text.
    q, k = torch.randn(2, 3, 4, dtype=torch.float64)
    k[2] = k[0]
    ids = torch.tensor([7, 3, 7])
    scores = 2 * q @ k.T
    rows = [scores[0, [0, 1]], scores[1], scores[2, [1, 2]]]
    own = [scores[0, 0], scores[1, 1], scores[2, 2]]
    want = sum(row.logsumexp(0) - x for row, x in zip(rows, own, strict=True)) / 3
    got = info_nce(q, k, scale=2.0, query_ids=ids, key_ids=ids)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("repeats", [1, 8])
def test_gradient_of_the_scale_does_not_grow_with_tiles_or_copies(repeats) -> None:
    # Published: the temperature's gradient times the number of ranks.
    q, k = torch.randn(2, 200, 4, dtype=torch.float64)
    rows, keys = q.repeat(repeats, 1).float(), k.float()
    own = torch.arange(200).repeat(repeats).int()
    positives = SparseLabels(torch.arange(len(own) + 1), own, 200)
    scale = torch.tensor(3.0, requires_grad=True)
    info_nce(rows, keys, scale=scale, positives=positives).backward()
    exact = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(exact * q @ k.T, torch.arange(200)).backward()
    assert scale.grad is not None and exact.grad is not None
    assert scale.grad.item() == pytest.approx(exact.grad.item(), rel=1e-4)


def test_module_learns_a_scale_below_its_limit() -> None:
    q, k = torch.nn.functional.normalize(torch.randn(2, 30, 8), dim=2)
    loss = InfoNCE(scale=14.0, learnable=True, symmetric=True)
    assert loss.scale.item() == pytest.approx(14.0)
    value = loss(q, k)
    torch.testing.assert_close(value, info_nce(q, k, scale=14.0, symmetric=True))
    value.backward()
    scale = torch.tensor(14.0, requires_grad=True)
    info_nce(q, k, scale=scale, symmetric=True).backward()
    assert scale.grad is not None and loss.log_scale.grad is not None
    torch.testing.assert_close(loss.log_scale.grad, 14 * scale.grad)  # dL/d log s = s dL/ds
    with torch.no_grad():
        loss.log_scale.fill_(math.log(500))
    loss(q, k)
    assert loss.scale.item() == pytest.approx(100)
    fixed = InfoNCE(scale=5.0, decoupled=True)
    assert not any(p.requires_grad for p in fixed.parameters())
    torch.testing.assert_close(fixed(q, k), info_nce(q, k, scale=5.0, decoupled=True))
    assert repr(fixed) == "InfoNCE(scale=5, learnable=False, symmetric=False, decoupled=True)"
    with pytest.raises(ValueError, match=r"above 0, at most 100\.0, got 0\.0"):
        InfoNCE(scale=0.0)


def test_losses_are_loaded_with_the_package() -> None:
    assert xmc.losses.info_nce is info_nce
    assert "losses" in dir(xmc)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": torch.ones(3, 3)}, "expected at least 4 keys for as many queries, got 3"),
        ({"positives": (4, 4)}, "expected positives of 4 queries among 5 keys, got 4 among 4"),
        ({"positives": (3, 5)}, "expected positives of 4 queries among 5 keys, got 3 among 5"),
        (
            {"positives": torch.tensor([0, 1, 2, 5])},
            r"expected positives in \[0, 5\), the keys, got 0 to 5",
        ),
        ({"weights": torch.ones(3)}, r"expected weights of shape \[4\] on cpu, got \[3\]"),
        (
            {"weights": torch.tensor([1.0, -2, 1, 1])},
            "expected finite weights of at least 0, got -2.0 at 1",
        ),
        (
            {"weights": torch.tensor([1.0, 1, 1, torch.nan])},
            "expected finite weights of at least 0, got nan at 3",
        ),
        (
            {"weights": torch.ones(4, requires_grad=True)},
            "expected weights without a gradient",
        ),
        (
            {"positive_weights": torch.tensor([1.0, 1, -1, 1])},
            "expected finite positive_weights of at least 0, got -1.0 at 2",
        ),
        ({"q": torch.full((4, 3), torch.nan)}, "expected finite q, row 0 has NaN"),
        ({"scale": torch.ones(2)}, r"expected scale as a number .* got torch.float32 \[2\]"),
        ({"scale": math.inf}, "expected a finite scale, got inf"),
        ({"q": torch.ones(4, 2)}, r"of the same D.*got \[4, 2\] and \[5, 3\]"),
        ({"query_ids": torch.arange(4)}, "expected key_ids beside query_ids, got None"),
    ],
)
def test_errors(options, message) -> None:
    given = {"q": torch.ones(4, 3), "k": torch.ones(5, 3), "scale": 1.0} | options
    positives = given.pop("positives", None)
    if isinstance(positives, tuple):
        rows, keys = positives
        given["positives"] = SparseLabels(
            torch.arange(rows + 1), torch.arange(rows, dtype=torch.int32), keys
        )
    elif positives is not None:
        given["positives"] = SparseLabels(torch.arange(5), positives.int(), 5)
    with pytest.raises(ValueError, match=message):
        info_nce(given.pop("q"), given.pop("k"), **given)
