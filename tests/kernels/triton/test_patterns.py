"""The Triton kernels on N:M patterns, against dense float64 autograd and a full sort."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xmc_kernels.classifier import UpdateRule
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, make_state

SHAPES = [
    # B, D, L, (n, m), G: every m, n odd and even, n = m; round and odd in all
    (16, 64, 32, (4, 8), 1),
    (21, 40, 37, (3, 8), 1),
    (5, 96, 35, (5, 32), 1),
    (140, 48, 7, (2, 16), 1),
    (9, 12, 33, (1, 4), 1),
    (3, 8, 5, (8, 8), 1),
    (1, 32, 1, (1, 32), 1),
    (16, 64, 32, (4, 8), 16),
    (5, 96, 80, (3, 32), 20),
]
FORMS = {
    "walk": ("walk", False),
    "deterministic": ("walk", True),
    "densify": ("densify", False),
    "blocks": ("blocks", False),
    "blocks in order": ("blocks", True),
}


def moved(layer: Layer, device) -> Layer:
    """A copy on a device."""
    tensors = (layer.weight, layer.index, layer.bias)
    return Layer(*(None if t is None else t.to(device, copy=True) for t in tensors), layer.pattern)


@pytest.fixture
def few_labels(monkeypatch):
    """Chunks of 16 labels, so that there are several."""
    from xmc_kernels._triton import densify, tiles

    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 16))
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 0)  # one block of labels a chunk
    monkeypatch.setattr(tiles, "SCORE_BYTES", 4 * 4 * 64)


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        *((shape, torch.float32, "blocks") for shape in SHAPES),
        *((shape, torch.bfloat16, "blocks in order") for shape in SHAPES[1::2]),
        *((shape, torch.bfloat16, "walk") for shape in SHAPES[::2]),
        *((SHAPES[1], torch.float16, form) for form in ("walk", "blocks", "deterministic")),
    ],
    ids=str,
)
def test_layer_equals_the_dense_layer(
    shape, dtype, form, patterned, oracle, naive_and_truth, close, device, poisoned
) -> None:
    from xmc_kernels._triton import fan_in

    by, deterministic = FORMS[form]
    p, index = patterned(*shape)
    p = p.to(dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    dense = oracle.dense_weight(p.weight, index, shape[1])
    results = naive_and_truth(p.x, dense, p.bias, grad, index)
    layer = moved(Layer(p.weight, p.index, p.bias, shape[3]), device)
    x = p.x.to(device)
    out = fan_in.fan_in_linear(x, layer, by=by)
    d_x, d_weight = fan_in.fan_in_linear_backward(grad.to(device), x, layer, deterministic, by=by)
    for ours, naive, truth in zip((out, d_x, d_weight), *results, strict=True):
        assert ours.dtype == dtype
        close(ours, naive, truth, dtype)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        *((form, shape) for form in ("densify", "blocks") for shape in SHAPES),
        *((form, shape) for form in ("walk", "blocks in order") for shape in SHAPES[1::3]),
        ("deterministic", SHAPES[1]),
    ],
    ids=str,
)
def test_loss_and_gradients_equal_dense_autograd(
    shape, form, patterned, oracle, close, device, few_labels, poisoned
) -> None:
    from xmc_kernels._triton import classifier

    p, index = patterned(*shape)
    by, deterministic = FORMS[form]
    loss = "bce" if form in ("walk", "blocks") else "squared_hinge"
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
@pytest.mark.parametrize("form", ["walk", "densify", "blocks"])
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


@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
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


def test_parts_of_a_deterministic_gradient_do_not_matter(patterned, device, monkeypatch) -> None:
    from xmc_kernels._triton import blocks, tiles

    p, _ = patterned(5, 24, 150, (3, 8))
    grad = torch.randn(5, 150, device=device)
    layer = moved(Layer(p.weight, p.index, None, (3, 8)), device)
    results = []
    for num_bytes in (0, 2 * 4 * 24 * 16, 2**30):  # 1 part, 2, and one for each block
        monkeypatch.setattr(tiles, "PARTIAL_BYTES", num_bytes)
        results.append(blocks.backward(grad, p.x.to(device), layer, True))
    for d_x, d_weight in results[1:]:
        torch.testing.assert_close(d_x, results[0][0])
        assert torch.equal(d_weight, results[0][1])


def test_without_bias_without_positives_without_rows(patterned, device, few_labels) -> None:
    from xmc_kernels._triton import classifier

    p, _ = patterned(4, 16, 40, (2, 8))
    rule = UpdateRule("sgd", weight_decay=0.5)
    results = []
    for bias, rows in ((None, 4), (torch.zeros(40), 4), (p.bias, 0)):
        layer = moved(Layer(p.weight, p.index, bias, (2, 8)), device)
        batch = (torch.zeros(rows + 1, dtype=torch.int64, device=device), p.indices[:0].to(device))
        value, d_x = classifier.classifier_step(
            *(p.x[:rows].to(device), layer, *batch, ClassifierState(), "bce", rule, 0.1, 1),
            *(1 / 4, True),
            by="blocks",
        )
        results.append((value.cpu(), d_x.cpu(), layer.weight.cpu(), layer.bias))
    for without, zeros in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(without, zeros)
    value, d_x, weight, bias = results[2]
    assert value == 0
    assert d_x.shape == (0, 16)
    torch.testing.assert_close(weight, 0.95 * p.weight)
    assert torch.equal(bias.cpu(), p.bias)


def test_strategies(patterned) -> None:
    from xmc_kernels._triton.tiles import layer_strategy, strategy

    for group in (1, 4):
        p, _ = patterned(40, 16, 8, (2, 8), group)
        layer = Layer(p.weight, p.index, None, (2, 8))
        assert layer_strategy(layer) == strategy(p.x, layer, True) == "blocks"


GPU_PATTERNS = [(4, 8), (3, 8), (2, 16), (4, 32), (16, 32)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("pattern", GPU_PATTERNS, ids=str)
def test_the_layer_on_a_gpu_equals_the_cpu(pattern, group, dtype, patterned) -> None:
    p, _ = patterned(150, 288, 16 * 150, pattern, group)
    p = p.to(dtype)
    results = []
    for where in ("cpu", "cuda"):
        x, weight, bias = (t.to(where).requires_grad_() for t in (p.x, p.weight, p.bias))
        out = fan_in_linear(x, weight, p.index.to(where), bias, pattern=pattern)
        grads = torch.autograd.grad(out.float().square().mean(), (x, weight, bias))
        results.append([t.detach().cpu() for t in (out, *grads)])
    for ours, expected in zip(results[1], results[0], strict=True):
        error = expected.abs().max().item() * max(2 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(ours, expected, rtol=0, atol=error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", GPU_PATTERNS, ids=str)
def test_every_strategy_on_a_gpu_equals_the_reference(pattern, form, dtype, patterned) -> None:
    from xmc_kernels._reference import classifier as reference
    from xmc_kernels._triton import classifier

    p, _ = patterned(150, 256, 3000, pattern)
    p = p.to(dtype)
    by, deterministic = FORMS[form]
    rule = UpdateRule("adamw", weight_decay=0.1)
    results = []
    for run, options in (
        (reference.classifier_step, {}),
        (classifier.classifier_step, {"by": by, "deterministic": deterministic}),
    ):
        layer = moved(Layer(p.weight, p.index, p.bias, pattern), "cuda")
        batch = (t.cuda() for t in (p.indptr, p.indices))
        kept = [torch.zeros_like(t, dtype=torch.float32) for t in (layer.weight, layer.bias)]
        state = ClassifierState(grad_weight=kept[0], grad_bias=kept[1])
        accumulated = run(
            *(p.x.cuda(), layer, *batch, state, "bce", rule, 0.01, 1, 1 / 150, False, 0), **options
        )
        state = make_state(layer.weight, layer.bias, rule)
        batch = (t.cuda() for t in (p.indptr, p.indices))
        step = run(
            *(p.x.cuda(), layer, *batch, state, "bce", rule, 0.01, 1, 1 / 150, True, 0), **options
        )
        results.append((*accumulated, *kept, *step, layer.weight, layer.bias))
    for expected, ours in zip(*results, strict=True):
        eps = max(4 * torch.finfo(dtype).eps, 1e-5)
        error = expected.abs().max().item() * eps
        torch.testing.assert_close(ours, expected, rtol=eps, atol=error)


@pytest.mark.gpu
def test_deterministic_blocks_repeat_bit_for_bit_on_a_gpu(patterned, poisoned) -> None:
    from xmc_kernels._triton import classifier

    p, _ = patterned(150, 256, 20000, (4, 8))
    p, rule = p.to(torch.bfloat16), UpdateRule("sgd")
    results = []
    for _ in range(2):
        layer = moved(Layer(p.weight, p.index, p.bias, (4, 8)), "cuda")
        batch = (t.cuda() for t in (p.indptr, p.indices))
        state = ClassifierState()
        result = classifier.classifier_step(
            *(p.x.cuda(), layer, *batch, state, "bce", rule, 0.1, 1, 1 / 150, True)
        )
        results.append((*result, layer.weight, layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
