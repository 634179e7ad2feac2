"""Losses on the CPU: functions of vectors in registers, and positives one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from xmc_kernels import classifier
from xmc_kernels._cpu import blocks, losses, vector
from xmc_kernels.classifier import classifier_loss_and_grad


def apply(function, values):
    """A function of a vector, over a float32 array whose length is a multiple of 16."""

    @njit
    def run(values, out):
        source, into = vector.pointer(values), vector.pointer(out)
        zero = vector.splat(16, np.float32(0))
        for i in range(0, values.size, 16):
            vector.store(into, i, function(vector.load(zero, source, i)))

    out = np.full_like(values, np.nan)
    run(values, out)
    return out


def test_exp_is_accurate_to_two_roundings() -> None:
    x = -np.concatenate([np.geomspace(1e-8, 85.9, 4000), np.linspace(0, 85.9, 4000)])
    x = x.astype(np.float32)
    ours, truth = apply(losses.exp_nonpositive, x), np.exp(x.astype(np.float64))
    assert np.abs(ours / truth - 1).max() < 3e-7
    far = np.full(16, -1e30, np.float32)
    assert (apply(losses.exp_nonpositive, far) < 1e-37).all()


def test_log1p_is_accurate_from_tiny_to_huge() -> None:
    around_powers = np.ldexp(1 + np.linspace(-1e-6, 1e-6, 16), np.arange(100)[:, None]) - 1
    x = np.concatenate([np.geomspace(1e-30, 1e37, 8000), np.abs(around_powers).ravel(), [0] * 16])
    x = x.astype(np.float32)
    ours, truth = apply(losses.log1p, x), np.log1p(x.astype(np.float64))
    assert (np.abs(ours - truth) <= 3e-7 * truth).all()


def test_bce_is_accurate_over_the_whole_range() -> None:
    @njit
    def value(score):
        nothing = blocks.repeat(2, vector.fill(score, np.float32(0)))
        return losses.sum_of_value(losses.bce(score, nothing)[1])

    @njit
    def gradient(score):
        return losses.bce(score, blocks.repeat(2, score))[0]

    x = np.concatenate([-np.geomspace(1e-6, 80, 800), np.geomspace(1e-6, 80, 800)])
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    truth = np.logaddexp(0, wide)
    assert (np.abs(apply(value, x) - truth) <= 6e-7 * truth).all()
    truth = 1 / (1 + np.exp(-wide))
    assert np.abs(apply(gradient, x) - truth).max() < 2e-7


@pytest.mark.parametrize("score", [-80.0, -12.0, -1.0, 0.0, 3.0])
def test_values_of_many_labels_add_up_without_overflow(score) -> None:
    """Logarithms are added by a product: 2^1600 for scores of zero, if nobody settled it."""

    @njit
    def added(score):
        value = blocks.repeat(2, vector.fill(score, np.float32(0)))
        for i in range(1600):
            value = losses.bce(score, value)[1]
            if i % 16 == 15:
                value = losses.settled(value)
        return losses.sum_of_value(value)

    total = apply(added, np.full(16, score, np.float32))
    assert total == pytest.approx(1600 * np.logaddexp(0, score), rel=2e-5)


@pytest.fixture
def compiled_only(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("expected a compiled kernel")

    monkeypatch.setattr(classifier.reference, "classifier_step", refuse)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_a_label_named_twice_counts_once(loss, group, problem, compiled_only) -> None:
    p = problem(3, 8, 24, 4, group)
    options = {"loss": loss, "grad_scale": 0.5, "smoothing": 0.1, "positive_weight": p.bias.exp()}
    twice = p.indices.repeat_interleave(2)
    got = classifier_loss_and_grad(*p.layer, 2 * p.indptr, twice, **options)
    wanted = classifier_loss_and_grad(*p.tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("score", [-60.0, 60.0])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_positives_with_extreme_scores(loss, score, oracle, compiled_only) -> None:
    """One label that is positive for the first of two rows, both with a score far out."""
    x, weight, bias = torch.ones(2, 1), torch.full((1, 1), score), torch.zeros(1)
    indptr, indices = torch.tensor([0, 1, 1]), torch.zeros(1, dtype=torch.int32)
    index = torch.zeros(1, 1, dtype=torch.uint16)
    options = {"loss": loss, "grad_scale": 1.0}
    got = classifier_loss_and_grad(x, weight, index, bias, indptr, indices, **options)
    targets = oracle.dense_targets(indptr, indices, 1)
    truth = oracle.loss_and_grads(x, weight, bias, targets, loss, 1.0)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-24)
