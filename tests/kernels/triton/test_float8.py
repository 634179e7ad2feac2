"""The Triton kernels on float8 weights: numbers of the dense truth, codes of the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xmc_kernels import float8, rounding
from xmc_kernels.checks import compiled_on_cuda
from xmc_kernels.classifier import UpdateRule, classifier_step_
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer
from xmc_kernels.topk import fan_in_topk
from xmc_kernels.update import ClassifierState, make_state

FORMS = ["walk", "densify", "blocks"]
CASES = [
    # form, (B, D, L, F or pattern, G): one tile and several, one block of slots and several
    ("walk", (9, 31, 18, 7, 1)),
    ("walk", (5, 90, 6, 77, 1)),
    ("walk", (140, 20, 3, 5, 1)),
    ("walk", (140, 80, 20, 70, 20)),
    ("walk", (16, 32, 32, 16, 16)),
    ("walk", (9, 32, 12, (3, 8), 1)),
    ("densify", (9, 31, 18, 7, 1)),
    ("densify", (9, 32, 12, (3, 8), 4)),
    ("blocks", (9, 40, 33, (3, 8), 1)),
    ("blocks", (140, 64, 20, (2, 32), 20)),
]
cases = pytest.mark.parametrize(("form", "shape"), CASES, ids=str)


@pytest.fixture
def make(problem, patterned, device):
    """`make(shape, dtype)`: a problem, its plain index, a float8 layer and its numbers."""

    def build(shape, dtype=torch.float32):
        pattern = shape[3] if isinstance(shape[3], tuple) else None
        p, index = patterned(*shape) if pattern else (problem(*shape), None)
        # Rows of sizes far apart: a scale each.
        weight = p.weight * torch.logspace(-8, 3, shape[2], base=2)[:, None]
        scale = float8.row_scale(weight)
        codes = float8.quantize(weight, scale)
        tensors = (t.to(device) for t in (codes, p.index, p.bias))
        layer = Layer(*tensors, pattern, scale.to(device))
        wide = float8.dequantize(codes, scale)
        p = replace(p, weight=wide, x=p.x.to(dtype))
        return p, p.index if index is None else index, layer

    return build


@pytest.fixture
def few_labels(monkeypatch):
    """Chunks of some labels, so that there are several."""
    from xmc_kernels._triton import densify, tiles

    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 8))
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(tiles, "SCORE_BYTES", 4 * 4 * 64)


def test_codes_and_scales_are_those_of_the_definition(device) -> None:
    from xmc_kernels._triton.float8 import quantize_launch

    value = torch.randn(37, 150) * torch.logspace(-30, 30, 37, base=2)[:, None]
    value[:6] = torch.tensor([0.0, -0.0, 448.0, 1e-35, 1e-39, 3e38])[:, None]
    value[2, 1:] = torch.linspace(-448, 448, 149)
    value[6] = torch.linspace(-448.01, 448.01, 150)
    weight = torch.zeros(47, 150, dtype=torch.uint8, device=device)
    scale = torch.zeros(47, device=device)
    quantize_launch(value.to(device), weight, scale, 10, 12345).run()
    bits = rounding.noise(12345, torch.arange(10, 47)[:, None], torch.arange(150), 20)
    expected = float8.row_scale(value)
    assert torch.equal(scale[10:].cpu(), expected)
    assert torch.equal(weight[10:].cpu(), float8.quantize(value, expected, bits).view(torch.uint8))
    assert not weight[:10].any()
    assert not scale[:10].any()


def test_every_code_is_read_as_its_number(device) -> None:
    from xmc_kernels._triton import fan_in

    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes % 128 != 127].view(-1, 1)  # without the two NaN
    values = codes.view(float8.DTYPE).double()
    index = torch.zeros(254, 1, dtype=torch.int32, device=device)
    for exponent in (-20, 0, 3):
        scale = torch.full((254,), 2.0**exponent, device=device)
        layer = Layer(codes.view(float8.DTYPE).to(device), index, None, None, scale)
        out = fan_in.fan_in_linear(torch.ones(1, 1, device=device), layer)
        assert torch.equal(out[0].cpu().double(), values[:, 0] * 2.0**exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "shape"), [c for c in CASES if c[0] != "densify"], ids=str)
def test_layer_equals_the_dense_layer(
    form, shape, dtype, make, oracle, naive_and_truth, close, device, poisoned
) -> None:
    from xmc_kernels._triton import fan_in

    p, index, layer = make(shape, dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    dense = oracle.dense_weight(p.weight, index, shape[1])
    results = naive_and_truth(p.x, dense, p.bias, grad, index)
    x = p.x.to(device)
    out = fan_in.fan_in_linear(x, layer, by=form)
    grads = fan_in.fan_in_linear_backward(grad.to(device), x, layer, False, by=form)
    for ours, naive, truth in zip((out, *grads), *results, strict=True):
        close(ours, naive, truth, dtype)
    assert grads[1].dtype == torch.float32


def step(p, layer, rule, state, form, *, update=True, number=1):
    from xmc_kernels._triton import classifier

    device = layer.weight.device
    return classifier.classifier_step(
        *(p.x.to(device), layer, p.indptr.to(device), p.indices.to(device), state),
        *("bce", rule, 0.1, number, 1 / len(p.x), update, 7),
        by=form,
        deterministic=False,
    )


@cases
def test_gradients_equal_dense_autograd(form, shape, make, oracle, close, few_labels) -> None:
    p, index, layer = make(shape)
    dense = oracle.dense_weight(p.weight, index, shape[1])
    targets = oracle.dense_targets(p.indptr, p.indices, shape[2])
    arguments = (p.x, dense, p.bias, targets, "bce", 1 / shape[0])
    truth = list(oracle.loss_and_grads(*arguments))
    naive = list(oracle.loss_and_grads(*arguments, torch.float32))
    for grads in (truth, naive):
        grads[2] = oracle.at_index(grads[2], index)
    kept = [torch.zeros_like(t, dtype=torch.float32) for t in (layer.weight, layer.bias)]
    before = layer.weight.view(torch.uint8).clone()
    state = ClassifierState(grad_weight=kept[0], grad_bias=kept[1])
    value, d_x = step(p, layer, UpdateRule("sgd"), state, form, update=False)
    assert torch.equal(layer.weight.view(torch.uint8), before)
    for ours, a, b in zip((value, d_x, *kept), naive, truth, strict=True):
        close(ours, a, b, torch.float32)


@cases
def test_a_step_rounds_what_a_float32_step_makes(
    form, shape, make, device, few_labels, poisoned
) -> None:
    """Which is tested against torch.optim; by the definition's own draw, bit for bit."""
    from xmc_kernels._triton.launch import INTERPRETED

    p, _, layer = make(shape)
    rule = UpdateRule("adamw" if shape[0] == 9 else "sgd", weight_decay=0.1)
    wide = Layer(p.weight.to(device), layer.index, layer.bias.clone(), layer.pattern)
    expected = step(p, wide, rule, make_state(wide.weight, wide.bias, rule), form)
    got = step(p, layer, rule, make_state(layer.weight, layer.bias, rule), form)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer.bias, wide.bias)
    weight = wide.weight.cpu()
    scale = float8.row_scale(weight)
    rows, columns = (torch.arange(size) for size in weight.shape)
    key = rounding.stream_key(7, 1, rounding.WEIGHT)
    bits = rounding.noise(key, rows[:, None], columns, float8.NOISE_BITS)
    codes = float8.quantize(weight, scale, bits).view(torch.uint8)
    assert torch.equal(layer.scale.cpu(), scale)
    same = (layer.weight.view(torch.uint8).cpu() == codes).double().mean().item()
    # Compiled for float8 or float32 a kernel may add and multiply at once in other places.
    assert same == 1 if INTERPRETED else same > 0.98, same


def test_dense_layers_of_float8_equal_sparse_ones_of_full_fan_in(make, device) -> None:
    p, _, layer = make((6, 12, 20, 12, 1))
    rule = UpdateRule("momentum", weight_decay=0.02)
    results = []
    for index in (layer.index, None):
        own = replace(
            layer,
            weight=layer.weight.clone(),
            bias=layer.bias.clone(),
            scale=layer.scale.clone(),
            index=index,
        )
        state = make_state(own.weight, own.bias, rule)
        value, d_x = step(p, own, rule, state, "walk")
        results.append((value, d_x, own.bias, state.weight_m, own.scale))
        results[-1] += (float8.dequantize(own.weight, own.scale),)
    torch.testing.assert_close(results[0][:5], results[1][:5], rtol=1e-4, atol=1e-5)
    assert (results[0][5] == results[1][5]).double().mean() > 0.98


@pytest.mark.parametrize("slots", [5, (3, 8), None], ids=str)
def test_top_k_equals_a_full_sort(slots, make, oracle, device, few_labels) -> None:
    from xmc_kernels._triton import topk

    p, index, layer = make((4, 16, 70, 16 if slots is None else slots, 1))
    if slots is None:
        layer = replace(layer, index=None)
    x = p.x.round()
    dense = oracle.dense_weight(p.weight, index, 16)
    want, _ = oracle.topk(x.double() @ dense.T + p.bias, 4, [[] for _ in x])
    scores, labels = topk.fan_in_topk(x.to(device), layer, 4, None, 0)
    torch.testing.assert_close(scores.cpu(), torch.tensor(want).float(), rtol=1e-5, atol=1e-5)
    again = (x.double() @ dense.T + p.bias).gather(1, labels.cpu())
    torch.testing.assert_close(scores.cpu().double(), again, rtol=1e-5, atol=1e-5)


def test_the_dispatch_takes_all_but_float64(make) -> None:
    for shape in ((4, 16, 8, 3, 1), (4, 16, 8, (2, 8), 1)):
        p, _, layer = make(shape)
        assert compiled_on_cuda(p.x, layer)
        assert not compiled_on_cuda(p.x.double(), layer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [64, 200, (4, 8), (4, 32)], ids=str)
@pytest.mark.parametrize("group", [1, 16])
def test_the_operations_on_a_gpu_equal_the_cpu(group, slots, dtype, make) -> None:
    p, _, layer = make((150, 256, 16 * 150, slots, group), dtype)
    rule = UpdateRule("adamw")
    results, codes = [], []
    for where in ("cpu", "cuda"):
        tensors = (layer.weight, layer.index, layer.bias.to(dtype), layer.scale)
        weight, index, bias, scale = (t.to(where, copy=True) for t in tensors)
        options = {"pattern": layer.pattern, "scale": scale}
        x = p.x.to(where).requires_grad_()
        out = fan_in_linear(x, weight, index, bias, **options)
        (d_x,) = torch.autograd.grad(out.float().square().mean(), x)
        best, _ = fan_in_topk(x.detach(), weight, index, bias, 5, **options)
        state = make_state(weight, bias, rule)
        value, d_x_step = classifier_step_(
            *(x.detach(), weight, index, bias, p.indptr.to(where), p.indices.to(where)),
            **options,
            **{"loss": "bce", "rule": rule, "state": state, "lr": 1e-3, "step": 1},
            grad_scale=1 / 150,
            seed=3,
        )
        results.append([t.detach().float().cpu() for t in (out, d_x, best, value, d_x_step, bias)])
        codes.append(float8.dequantize(weight, scale).cpu())
    for ours, expected in zip(results[1], results[0], strict=True):
        eps = max(4 * torch.finfo(dtype).eps, 1e-5)
        error = expected.abs().max().item() * eps
        torch.testing.assert_close(ours, expected, rtol=eps, atol=error)
    # An eighth is a step between codes; a sum that differs in its last bits may draw the other.
    assert (codes[0] == codes[1]).double().mean() > 0.95
    torch.testing.assert_close(codes[1], codes[0], rtol=0.15, atol=2e-3)
