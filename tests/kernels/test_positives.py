"""Smoothed and weighted positives in the training step, against dense float64 autograd."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_kernels.classifier import (
    ClassifierState,
    UpdateRule,
    classifier_loss_and_grad,
    classifier_step_,
    make_state,
)

LOSSES = ["bce", "squared_hinge"]
losses = pytest.mark.parametrize("loss", LOSSES)


def truth(
    p, dense: Tensor, targets: Tensor, loss: str, scale: float, smoothing: float, weight: Tensor
) -> tuple[Tensor, ...]:
    """Value and gradients in x, dense and bias of the sum over all entries, by autograd."""
    leaves = [t.detach().double().clone().requires_grad_() for t in (p.x, dense, p.bias)]
    scores = leaves[0] @ leaves[1].T + leaves[2]
    if loss == "bce":
        soft = targets * (1 - smoothing)  # the target of a positive is 1 - smoothing
        entries = F.binary_cross_entropy_with_logits(scores, soft, reduction="none")
    else:
        kept, flipped = (torch.relu(1 - y * scores).square() for y in (1, -1))
        entries = torch.where(targets > 0, (1 - smoothing) * kept + smoothing * flipped, flipped)
    value = scale * (torch.where(targets > 0, weight.double(), 1.0) * entries).sum()
    return value.detach(), *torch.autograd.grad(value, leaves)


@losses
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9, 24, 37, 7, 1), (70, 53, 516, 17, 4), (1, 1, 1, 1, 1)])
def test_loss_and_gradients_equal_dense_autograd(
    loss, smoothing, weighted, shape, problem, oracle, poisoned
) -> None:
    p = problem(*shape)
    num_rows, features, num_labels = shape[:3]
    weight = torch.rand(num_labels) * 20 if weighted else None
    dense = oracle.dense_weight(p.weight, p.index, features)
    targets = oracle.dense_targets(p.indptr, p.indices, num_labels)
    factor = torch.ones(num_labels) if weight is None else weight
    expected = list(truth(p, dense, targets, loss, 1 / num_rows, smoothing, factor))
    expected[2] = oracle.at_index(expected[2], p.index)
    ours = classifier_loss_and_grad(
        *p.tensors, loss=loss, grad_scale=1 / num_rows, smoothing=smoothing, positive_weight=weight
    )
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@losses
@pytest.mark.parametrize("dense", [False, True])
def test_steps_equal_sgd_with_those_gradients(loss, dense, problem, oracle) -> None:
    """Also accumulated over two passes; a dense layer and a sparse one."""
    p = problem(12, 20, 45, 20 if dense else 6)
    weight = torch.rand(45) * 5
    options = {"smoothing": 0.1, "positive_weight": weight}
    full = oracle.dense_weight(p.weight, p.index, 20)
    targets = oracle.dense_targets(p.indptr, p.indices, 45)
    value, d_x, d_weight, d_bias = truth(p, full, targets, loss, 1 / 12, 0.1, weight)
    new = oracle.at_index(full - 0.05 * d_weight, p.index), p.bias.double() - 0.05 * d_bias
    for bounds in ((0, 12), (0, 5, 12)):
        own, state, results = p.copy(), ClassifierState(), []
        for start, stop in pairwise(bounds):
            part = own.rows(start, stop)
            results.append(
                classifier_step_(
                    *(part.x, own.weight, None if dense else own.index, own.bias),
                    *(part.indptr, part.indices),
                    loss=loss,
                    rule=UpdateRule("sgd"),
                    state=state,
                    lr=0.05,
                    step=1,
                    grad_scale=1 / 12,
                    update=stop == 12,
                    **options,
                )
            )
        limits = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(sum(r[0] for r in results).double(), value, **limits)
        torch.testing.assert_close(torch.cat([r[1] for r in results]).double(), d_x, **limits)
        torch.testing.assert_close(own.weight.double(), new[0], **limits)
        torch.testing.assert_close(own.bias.double(), new[1], **limits)


@losses
def test_weights_of_one_change_nothing(loss, problem) -> None:
    p = problem(20, 30, 64, 8)
    plain = classifier_loss_and_grad(*p.tensors, loss=loss, grad_scale=0.05)
    ones = classifier_loss_and_grad(
        *p.tensors, loss=loss, grad_scale=0.05, positive_weight=torch.ones(64)
    )
    for one, other in zip(plain, ones, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_operator_contract(problem) -> None:
    p = problem(4, 6, 10, 6)
    tensors = (p.x, p.weight, p.index, p.bias, None, None, p.indptr, p.indices)
    state = make_state(p.weight, p.bias, UpdateRule("adamw"))
    moments = tuple(vars(state).values())
    numbers = ([0.9, 0.9, 0.99, 1e-8, 0.1], 0.1, 1, 0.25, True, 3, 0.1, torch.rand(10))
    arguments = (*tensors, *moments, "bce", "adamw", *numbers)
    torch.library.opcheck(torch.ops.xmc.classifier_step.default, arguments)
    arguments = (*tensors, "bce", 0.25, 0.1, torch.rand(10))
    torch.library.opcheck(torch.ops.xmc.classifier_loss_and_grad.default, arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"smoothing": 0.5}, ValueError, r"expected smoothing in \[0, 0.5\), got 0.5"),
        ({"smoothing": -0.1}, ValueError, r"expected smoothing in \[0, 0.5\), got -0.1"),
        (
            {"positive_weight": torch.ones(9)},
            ValueError,
            r"expected positive_weight of shape \[10\] on cpu to match weight, got \[9\] on cpu",
        ),
        (
            {"positive_weight": torch.ones(10).long()},
            TypeError,
            "expected a floating-point positive_weight, got torch.int64",
        ),
    ],
)
def test_what_does_not_fit_is_named(options, error, message, problem) -> None:
    p = problem(4, 8, 10, 3)
    with pytest.raises(error, match=message):
        classifier_loss_and_grad(*p.tensors, loss="bce", grad_scale=1.0, **options)
    more = {"lr": 0.1, "step": 1, "grad_scale": 1.0, "state": ClassifierState()}
    with pytest.raises(error, match=message):
        classifier_step_(*p.tensors, loss="bce", rule=UpdateRule("sgd"), **more, **options)
