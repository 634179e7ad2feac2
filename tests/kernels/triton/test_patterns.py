"""The Triton kernels on N:M patterns, against dense float64 autograd and a full sort."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xmc_kernels.classifier import UpdateRule
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, make_state

SHAPES = [
    # B, D, L, (n, m), G: every m, n odd and even, n = m; round and odd in all
    (16, 64, 40, (4, 8), 1),
    (21, 40, 37, (3, 8), 1),
    (5, 96, 35, (5, 32), 1),
    (140, 48, 7, (2, 16), 1),
    (9, 12, 33, (1, 4), 1),
    (3, 8, 5, (8, 8), 1),
    (1, 32, 1, (1, 32), 1),
    (16, 64, 32, (4, 8), 16),
    (5, 96, 40, (3, 32), 20),
]
FORMS = {
    "walk": ("walk", False),
    "deterministic": ("walk", True),
    "densify": ("densify", False),
}
forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def moved(layer: Layer, device) -> Layer:
    """A copy on a device."""
    tensors = (layer.weight, layer.index, layer.bias)
    return Layer(*(None if t is None else t.to(device, copy=True) for t in tensors), layer.pattern)


@pytest.fixture
def few_labels(monkeypatch):
    """Chunks of 16 labels, so that there are several."""
    from xmc_kernels._triton import densify, tiles

    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 16))
    monkeypatch.setattr(tiles, "SCORE_BYTES", 4 * 4 * 64)


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        *((shape, torch.float32, "walk") for shape in SHAPES),
        *((shape, torch.bfloat16, "deterministic") for shape in SHAPES),
        (SHAPES[1], torch.float16, "walk"),
    ],
    ids=str,
)
def test_layer_equals_the_dense_layer(
    shape, dtype, form, patterned, oracle, close, device, poisoned
) -> None:
    from xmc_kernels._triton import fan_in

    _, deterministic = FORMS[form]
    p, index = patterned(*shape)
    p = p.to(dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    dense = oracle.dense_weight(p.weight, index, shape[1])
    results = []
    for wide in (torch.float32, torch.float64):
        a, w = (t.to(wide).requires_grad_() for t in (p.x, dense))
        out = a @ w.T + p.bias.to(wide)
        d_x, d_dense = torch.autograd.grad(out, (a, w), grad.to(wide))
        results.append((out.detach(), d_x, oracle.at_index(d_dense, index)))
    layer = moved(Layer(p.weight, p.index, p.bias, shape[3]), device)
    x = p.x.to(device)
    out = fan_in.fan_in_linear(x, layer)
    d_x, d_weight = fan_in.fan_in_linear_backward(grad.to(device), x, layer, deterministic)
    for ours, naive, truth in zip((out, d_x, d_weight), *results, strict=True):
        assert ours.dtype == dtype
        close(ours, naive, truth, dtype)


@forms
@shapes
def test_loss_and_gradients_equal_dense_autograd(
    shape, form, patterned, oracle, close, device, few_labels, poisoned
) -> None:
    from xmc_kernels._triton import classifier

    p, index = patterned(*shape)
    by, deterministic = FORMS[form]
    loss = "bce" if form == "walk" else "squared_hinge"
    dense = oracle.dense_weight(p.weight, index, shape[1])
    targets = oracle.dense_targets(p.indptr, p.indices, shape[2])
    arguments = (p.x, dense, p.bias, targets, loss, 1 / shape[0])
    truth = list(oracle.loss_and_grads(*arguments))
    naive = list(oracle.loss_and_grads(*arguments, torch.float32))
    for grads in (truth, naive):
        grads[2] = oracle.at_index(grads[2], index)
    layer = moved(Layer(p.weight, p.index, p.bias, shape[3]), device)
    kept = [torch.zeros_like(t) for t in (layer.weight, layer.bias)]
    state = ClassifierState(grad_weight=kept[0], grad_bias=kept[1])
    batch = (t.to(device) for t in (p.indptr, p.indices))
    value, d_x = classifier.classifier_step(
        *(p.x.to(device), layer, *batch, state, loss, UpdateRule("sgd"), 0.1, 1),
        *(1 / shape[0], False, 0),
        by=by,
        deterministic=deterministic,
    )
    assert torch.equal(layer.weight.cpu(), p.weight)
    for ours, a, b in zip((value, d_x, *kept), naive, truth, strict=True):
        close(ours, a, b, torch.float32)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@forms
def test_updates_equal_those_on_the_unpacked_index(
    form, kind, patterned, device, few_labels
) -> None:
    """Which are tested against torch.optim; bfloat16 weights are drawn alike."""
    from xmc_kernels._triton import classifier

    p, index = patterned(9, 32, 20, (3, 8))
    p = replace(p, weight=p.weight.bfloat16())
    by, deterministic = FORMS[form]
    rule = UpdateRule(kind, weight_decay=0.1)
    results = []
    for rows, pattern, how in (
        (p.index, (3, 8), by),
        (index, None, "densify" if by == "densify" else "walk"),
    ):
        layer = moved(Layer(p.weight, rows, p.bias, pattern), device)
        state = make_state(layer.weight, layer.bias, rule)
        for step in (1, 2):
            value, d_x = classifier.classifier_step(
                *(p.x.to(device), layer, p.indptr.to(device), p.indices.to(device), state),
                *("bce", rule, 0.1, step, 1 / 9, True, 3),
                by=how,
                deterministic=deterministic,
            )
        results.append((value, d_x, layer.bias, layer.weight.float()))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=1e-3)
    same = (results[0][3] == results[1][3]).double().mean().item()
    assert same > 0.95, same


@shapes
def test_top_k_equals_a_full_sort(shape, patterned, oracle, device, few_labels) -> None:
    from xmc_kernels._triton import topk

    p, index = patterned(*shape)
    p = replace(p, x=p.x.sign(), weight=p.weight.sign(), bias=p.bias.round())
    scores = p.x.double() @ oracle.dense_weight(p.weight, index, shape[1]).T + p.bias
    layer = moved(Layer(p.weight, p.index, p.bias, shape[3]), device)
    got_scores, got = topk.fan_in_topk(p.x.to(device), layer, 4, None, 0)
    want_scores, want = oracle.topk(scores, 4, [[] for _ in p.x])
    assert got.tolist() == want
    assert got_scores.tolist() == want_scores
