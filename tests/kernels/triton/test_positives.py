"""Smoothed and weighted positives in the Triton step, against dense float64 autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from xmc_kernels.classifier import UpdateRule, classifier_loss_and_grad
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState

SMOOTHING = 0.2
CASES = [
    # form, (B, D, L, F or pattern, G), loss: one tile of rows and several
    ("walk", (9, 31, 18, 7, 1), "bce"),
    ("walk", (130, 20, 5, 9, 1), "squared_hinge"),
    ("walk", (9, 40, 60, 20, 20), "squared_hinge"),
    ("walk", (9, 32, 18, (3, 8), 1), "bce"),
    ("densify", (9, 31, 18, 7, 1), "squared_hinge"),
    ("densify", (40, 31, 70, 7, 1), "bce"),
    ("blocks", (9, 40, 37, (3, 8), 1), "bce"),
    ("blocks", (140, 48, 20, (2, 16), 20), "squared_hinge"),
]


@pytest.fixture
def few_labels(monkeypatch):
    """Chunks of 16 labels, so that each has its own part of the weights."""
    from xmc_kernels._triton import densify, tiles

    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 16))
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 0)


def truth(p, dense, targets, loss, smoothing, weight, dtype):
    """Value and gradients in x, dense and bias of the mean over rows, by autograd."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (p.x, dense, p.bias)]
    scores, targets = leaves[0] @ leaves[1].T + leaves[2], targets.to(dtype)
    if loss == "bce":
        soft = targets * (1 - smoothing)
        entries = F.binary_cross_entropy_with_logits(scores, soft, reduction="none")
    else:
        kept, flipped = (torch.relu(1 - y * scores).square() for y in (1, -1))
        entries = torch.where(targets > 0, (1 - smoothing) * kept + smoothing * flipped, flipped)
    entries = torch.where(targets > 0, weight.to(dtype), 1.0) * entries
    value = entries.sum() / len(p.x)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("options", ["smoothed", "weighted", "both"])
@pytest.mark.parametrize(("form", "shape", "loss"), CASES, ids=str)
def test_loss_and_gradients_equal_dense_autograd(
    form, shape, loss, options, problem, patterned, oracle, close, device, few_labels, poisoned
) -> None:
    from xmc_kernels._triton import classifier

    pattern = shape[3] if isinstance(shape[3], tuple) else None
    p, index = patterned(*shape) if pattern else (problem(*shape), None)
    index = p.index if index is None else index
    smoothing = 0.0 if options == "weighted" else SMOOTHING
    weight = None if options == "smoothed" else 20 * torch.rand(shape[2])
    factor = torch.ones(shape[2]) if weight is None else weight
    dense = oracle.dense_weight(p.weight, index, shape[1])
    targets = oracle.dense_targets(p.indptr, p.indices, shape[2])
    results = []
    for dtype in (torch.float32, torch.float64):
        results.append(truth(p, dense, targets, loss, smoothing, factor, dtype))
        results[-1][2] = oracle.at_index(results[-1][2], index)
    layer = Layer(*(t.to(device) for t in (p.weight, p.index, p.bias)), pattern)
    kept = [torch.zeros_like(t) for t in (layer.weight, layer.bias)]
    value, d_x = classifier.classifier_step(
        *(p.x.to(device), layer, p.indptr.to(device), p.indices.to(device)),
        *(ClassifierState(grad_weight=kept[0], grad_bias=kept[1]), loss, UpdateRule("sgd")),
        *(0.1, 1, 1 / shape[0], False, 0, smoothing),
        None if weight is None else weight.double().to(device),
        by=form,
        deterministic=False,
    )
    for ours, naive, expected in zip((value, d_x, *kept), *results, strict=True):
        close(ours, naive, expected, torch.float32)


def test_weights_of_one_change_nothing(problem, device) -> None:
    from xmc_kernels._triton import classifier

    p = problem(9, 30, 40, 8)
    p = replace(p, **{k: v.to(device) for k, v in vars(p).items()})
    results = []
    for weight in (None, torch.ones(40, device=device)):
        own = p.copy()
        value, d_x = classifier.classifier_step(
            *(own.x, own.as_layer, own.indptr, own.indices, ClassifierState()),
            *("bce", UpdateRule("sgd"), 0.1, 1, 1 / 9, True, 0, 0.0, weight),
            deterministic=True,
        )
        results.append((value, d_x, own.weight, own.bias))
    for plain, ones in zip(*results, strict=True):
        assert torch.equal(plain, ones)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [64, (4, 8)], ids=str)
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_the_operation_on_a_gpu_equals_the_cpu(
    loss, group, slots, dtype, problem, patterned
) -> None:
    pattern = slots if isinstance(slots, tuple) else None
    p = problem(150, 256, 2400, slots, group)
    if pattern is not None:
        p, _ = patterned(150, 256, 2400, slots, group)
    p, weight = p.to(dtype), 20 * torch.rand(2400)
    options = {"loss": loss, "grad_scale": 1 / 150, "smoothing": SMOOTHING, "pattern": pattern}
    expected, ours = (
        classifier_loss_and_grad(
            *(t.to(where) for t in p.tensors), **options, positive_weight=weight.to(where)
        )
        for where in ("cpu", "cuda")
    )
    for a, b in zip(ours, expected, strict=True):
        eps = max(4 * torch.finfo(dtype).eps, 1e-5)
        error = b.abs().max().item() * eps
        torch.testing.assert_close(a.cpu(), b, rtol=eps, atol=error)
