"""Smooth recall against its definition in float64, and mixtures of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmc.losses import Mixup, RecallAtK, draw_mixup, recall_at_k
from xmc.types import SparseLabels


def classes(num: int, per_class: int) -> tuple[Tensor, SparseLabels, Tensor]:
    """A batch of classes: positives are the others of a class; also as a matrix, and ids."""
    own = torch.arange(num) // per_class
    positive = (own[:, None] == own[None, :]) & ~torch.eye(num, dtype=torch.bool)
    indptr = torch.zeros(num + 1, dtype=torch.int64)
    indptr[1:] = positive.sum(1).cumsum(0)
    return positive, SparseLabels(indptr, positive.nonzero()[:, 1].int(), num), torch.arange(num)


def test_equals_the_definition_with_the_papers_constants(contrastive_oracle) -> None:
    positive, positives, ids = classes(24, 4)
    x, _ = contrastive_oracle.features(24, 24, 6)
    weights = torch.rand(24).double()
    # A query's own row has its id and is no positive: it is left out.
    masked = torch.eye(24, dtype=torch.bool)
    options = {"ks": (1, 2, 4, 8, 16), "weights": weights}

    def truth(q: Tensor, k: Tensor) -> Tensor:
        return contrastive_oracle.recall_at_k(q, k, positive, masked=masked, **options)

    want = contrastive_oracle.with_gradients(truth, (x, x))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        q, k = (x.to(dtype).clone().requires_grad_() for _ in range(2))
        loss = recall_at_k(q, k, positives=positives, query_ids=ids, key_ids=ids, weights=weights)
        loss.backward()
        for got, expected in zip((loss, q.grad, k.grad), want, strict=True):
            assert got is not None
            top = expected.abs().max().item()
            assert (got.double() - expected).abs().max().item() <= tolerance * max(top, 0.1)


def test_perfect_ranks_have_the_smallest_loss() -> None:
    _, positives, ids = classes(12, 3)
    good = torch.eye(4).repeat_interleave(3, 0)
    options = {"positives": positives, "query_ids": ids, "key_ids": ids, "ks": (2, 4)}
    perfect = recall_at_k(good, good, **options, cut_temperature=0.01)
    # Two positives tie: each has rank 1.5, below both cut-offs.
    assert perfect.item() == pytest.approx(0, abs=1e-5)
    assert recall_at_k(good, good.flip(1), **options, cut_temperature=0.01).item() > 0.9


def test_mixtures_are_keys_whose_similarities_are_mixed(contrastive_oracle) -> None:
    positive, positives, _ = classes(12, 4)
    mixup = Mixup(torch.tensor([0, 5, 9]), torch.tensor([2, 7, 10]), torch.tensor([0.3, 1.0, 0.5]))
    q, k = contrastive_oracle.features(12, 12, 5)
    share = mixup.share.double()

    def truth(q: Tensor, k: Tensor) -> Tensor:
        # A mixture counts for those that both its keys are positives of.
        both = positive[:, mixup.first] & positive[:, mixup.second]
        assert both.sum(0).tolist() == [2, 2, 2]
        mixed = share[:, None] * k[mixup.first] + (1 - share[:, None]) * k[mixup.second]
        return contrastive_oracle.recall_at_k(
            q, torch.cat([k, mixed]), torch.cat([positive, both], 1), ks=(1, 4)
        )

    want = contrastive_oracle.with_gradients(truth, (q, k))
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    loss = recall_at_k(*leaves, positives=positives, ks=(1, 4), mixup=mixup)
    loss.backward()
    got = (loss.detach(), *(leaf.grad for leaf in leaves))
    torch.testing.assert_close(got, tuple(want), rtol=1e-8, atol=1e-10)


def test_drawn_mixtures_are_of_two_positives_of_a_query() -> None:
    indptr = torch.tensor([0, 1, 4, 4, 6])
    positives = SparseLabels(indptr, torch.tensor([3, 0, 2, 5, 1, 4], dtype=torch.int32), 6)
    drawn = draw_mixup(positives, 500, generator=torch.Generator().manual_seed(1))
    assert len(drawn) == 500
    found = set(zip(drawn.first.tolist(), drawn.second.tolist(), strict=True))
    three = {(a, b) for a in (0, 2, 5) for b in (0, 2, 5) if a != b}
    assert found == three | {(1, 4), (4, 1)}
    assert drawn.share.min() >= 0 and drawn.share.max() <= 1 and drawn.share.std() > 0.2
    single = SparseLabels(torch.arange(3), torch.arange(2, dtype=torch.int32), 2)
    assert len(draw_mixup(single, 10)) == 0


def test_module_mixes_in_training_only() -> None:
    _, positives, ids = classes(20, 5)
    x = torch.nn.functional.normalize(torch.randn(20, 4), dim=1)
    options = {"positives": positives, "query_ids": ids, "key_ids": ids}
    loss = RecallAtK(ks=(1, 4), num_mixtures=30)
    plain = recall_at_k(x, x, ks=(1, 4), **options)
    assert torch.equal(loss.eval()(x, x, **options), plain)
    torch.manual_seed(3)
    mixed = loss.train()(x, x, **options)
    torch.manual_seed(3)
    drawn = draw_mixup(positives, 30)
    assert torch.equal(mixed, recall_at_k(x, x, ks=(1, 4), mixup=drawn, **options))
    assert not torch.equal(mixed, plain)
    assert repr(loss) == "RecallAtK(ks=(1, 4), num_mixtures=30)"


def test_gradients_pass_gradcheck() -> None:
    _, positives, _ = classes(6, 3)
    q, k = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    drawn = draw_mixup(positives, 4)
    assert torch.autograd.gradcheck(
        lambda q, k: recall_at_k(
            q, k, positives=positives, ks=(1, 2), rank_temperature=0.5, mixup=drawn
        ),
        (q, k),
    )


def test_errors() -> None:
    _, positives, _ = classes(6, 3)
    x = torch.randn(6, 3)
    outside = Mixup(torch.tensor([0]), torch.tensor([6]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"expected mixup.second in \[0, 6\), the keys, got 6"):
        recall_at_k(x, x, positives=positives, mixup=outside)
    with pytest.raises(ValueError, match="expected ks of at least one cut-off"):
        recall_at_k(x, x, positives=positives, ks=())
