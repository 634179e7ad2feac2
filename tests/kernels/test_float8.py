"""float8 weights with a scale per label."""

from __future__ import annotations

import pytest
import torch

from xmc_kernels import float8
from xmc_kernels.classifier import UpdateRule, classifier_step_, make_state
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.topk import fan_in_topk


def quantized(weight):
    scale = float8.row_scale(weight)
    return float8.quantize(weight, scale), scale


def test_scales_are_the_smallest_powers_of_two_that_fit() -> None:
    largest = torch.tensor([448.0, 449.0, 224.0, 1.0, 3e-5, 0.0, 1e30])
    scale = float8.row_scale(torch.stack([largest, -largest / 3], 1))
    assert scale[:5].tolist() == [1.0, 2.0, 0.5, 2.0**-8, 2.0**-23]
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert (largest / scale <= 448).all()


def test_every_number_of_the_format_is_kept() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes % 128 != 127].view(1, -1)  # without the two NaN
    values = codes.view(float8.DTYPE).float()
    for scale in (1.0, 2.0**-20):
        scale = torch.tensor([scale])
        for bits in (None, torch.full(values.shape, 2**20 - 1)):
            back = float8.quantize(values * scale, scale, bits)
            assert torch.equal(back.view(torch.uint8), codes)
        assert torch.equal(float8.dequantize(values.to(float8.DTYPE), scale), values * scale)


def test_rounding_to_nearest_is_torchs_but_for_halves() -> None:
    values = torch.randn(50, 40)
    scale = torch.ones(50)
    assert torch.equal(float8.quantize(values, scale).float(), values.to(float8.DTYPE).float())


@pytest.mark.parametrize("value", [0.3, -1.7, 300.0, 0.0019])
def test_stochastic_rounding_is_right_on_average(value) -> None:
    """Within five standard errors of the mean; the last value is among the subnormals."""
    rows = torch.full((1, 200_000), value)
    g = torch.Generator().manual_seed(3)
    bits = torch.randint(2**float8.NOISE_BITS, rows.shape, generator=g)
    rounded = float8.quantize(rows, torch.ones(1), bits).double()
    assert len(rounded.unique()) == 2
    error = rounded.std() / rows.numel() ** 0.5
    assert abs(rounded.mean() - rows[0, 0].double()) < 5 * error


def test_operations_read_scaled_weights(problem, oracle, as_accurate) -> None:
    p = problem(6, 40, 30, 9)
    weight, scale = quantized(p.weight)
    dense = oracle.dense_weight(float8.dequantize(weight, scale), p.index, 40)
    truth = p.x.double() @ dense.T + p.bias
    x = p.x.clone().requires_grad_()
    out = fan_in_linear(x, weight, p.index, p.bias, scale=scale)
    as_accurate(out, p.x @ dense.float().T + p.bias, truth)
    (d_x,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(d_x, dense.sum(0).float().expand(6, 40))
    scores, _ = fan_in_topk(p.x, weight, p.index, p.bias, 3, scale=scale)
    torch.testing.assert_close(scores.double(), truth.topk(3).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_is_the_rounded_float32_step(kind, problem) -> None:
    p = problem(8, 40, 30, 9)
    weight, scale = quantized(p.weight)
    rule = UpdateRule(kind, weight_decay=0.01)
    wide, own = float8.dequantize(weight, scale), p.copy()
    options = {"loss": "bce", "rule": rule, "lr": 0.05, "step": 1, "grad_scale": 0.125}
    batch = (p.indptr, p.indices)
    state = make_state(wide, own.bias, rule)
    expected = classifier_step_(p.x, wide, p.index, own.bias, *batch, state=state, **options)
    state = make_state(weight, p.bias, rule)
    got = classifier_step_(
        p.x, weight, p.index, p.bias, *batch, state=state, scale=scale, seed=5, **options
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(p.bias, own.bias)
    assert torch.equal(scale, float8.row_scale(wide))
    # Each weight is one of the two neighbours of the exact one.
    step = 2.0 ** (torch.frexp(wide / scale[:, None]).exponent - 4).clamp(min=-9) * scale[:, None]
    assert ((float8.dequantize(weight, scale) - wide).abs() < step).all()
    assert not torch.equal(float8.dequantize(weight, scale), wide)


def test_training_follows_float32(problem) -> None:
    """A quadratic of the squared hinge: 200 small steps, lost if rounded to nearest."""
    p = problem(12, 24, 20, 6, density=0.3)
    rule = UpdateRule("sgd")

    def train(weight, scale, seed):
        weight, bias = weight.clone(), p.bias.clone()
        scale = None if scale is None else scale.clone()
        state = make_state(weight, bias, rule)
        for step in range(1, 201):
            value, _ = classifier_step_(
                *(p.x, weight, p.index, bias, p.indptr, p.indices),
                **{"loss": "squared_hinge", "rule": rule, "state": state, "lr": 0.01},
                **{"step": step, "grad_scale": 1 / 12, "scale": scale, "seed": seed},
            )
        return float(value)

    weight, scale = quantized(p.weight)
    exact = train(float8.dequantize(weight, scale), None, 0)
    rounded = sum(train(weight, scale, seed) for seed in range(4)) / 4
    assert rounded == pytest.approx(exact, rel=0.03)


def test_bad_scales_are_named(problem) -> None:
    p = problem(3, 8, 6, 2)
    weight, scale = quantized(p.weight)
    with pytest.raises(
        TypeError, match=r"float8_e4m3fn, .* and scale of float32, got torch.float32"
    ):
        fan_in_linear(p.x, p.weight, p.index, scale=scale)
    with pytest.raises(ValueError, match=r"scale of shape \[6\] on cpu to match weight, got \[5\]"):
        fan_in_linear(p.x, weight, p.index, scale=scale[:5])
    with pytest.raises(TypeError, match="expected weight of float32, bfloat16"):
        fan_in_linear(p.x, weight, p.index)
