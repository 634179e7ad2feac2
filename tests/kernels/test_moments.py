"""float8 moments of weights: a float32 step from what is stored, rounded without bias."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xmc_kernels import float8, rounding
from xmc_kernels.checks import compiled_on_cpu
from xmc_kernels.classifier import ClassifierState, UpdateRule, classifier_step_, make_state
from xmc_kernels.layer import Layer

KINDS = ["adamw", "momentum"]
kinds = pytest.mark.parametrize("kind", KINDS)
LAYOUTS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float8": {"dtype": float8.DTYPE},
    "groups": {"group": 5},
    "pattern": {"pattern": (3, 8), "dtype": torch.bfloat16},
    "dense": {"dense": True},
    "float64": {"dtype": torch.float64},
}


def wide_state(state: ClassifierState) -> ClassifierState:
    """A copy with the float32 moments that float8 ones stand for."""
    own = {name: None if t is None else t.clone() for name, t in vars(state).items()}
    for name in ("weight_m", "weight_v"):
        scale = own.pop(f"{name}_scale")
        if scale is not None:
            number = float8.dequantize(own[name], scale)
            own[name] = number if name == "weight_m" else number.square()
    return ClassifierState(**own)


@pytest.fixture
def make(problem, patterned):
    """`make(layout)`: a problem and its layer."""

    def build(dtype=torch.float32, group=1, pattern=None, dense=False):
        if pattern is not None:
            p, _ = patterned(8, 40, 30, pattern, group)
        else:
            p = problem(8, 40, 30, 40 if dense else 9, group, density=0.3)
        index, weight = None if dense else p.index, p.weight
        if dtype != float8.DTYPE:
            return p, Layer(weight.to(dtype), index, p.bias.to(dtype), pattern)
        scale = float8.row_scale(weight)
        return p, Layer(float8.quantize(weight, scale), index, p.bias, pattern, scale)

    return build


def step(p, layer, rule, state, number, **options):
    return classifier_step_(
        *(p.x.to(layer.bias.dtype), layer.weight, layer.index, layer.bias, p.indptr, p.indices),
        **{"pattern": layer.pattern, "scale": layer.scale, "loss": "squared_hinge"},
        **{"rule": rule, "state": state, "lr": 0.02, "step": number, "grad_scale": 0.125},
        seed=3,
        **options,
    )


def copied(layer: Layer) -> Layer:
    tensors = (layer.weight, layer.index, layer.bias, layer.scale)
    weight, index, bias, scale = (None if t is None else t.clone() for t in tensors)
    return Layer(weight, index, bias, layer.pattern, scale)


@kinds
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_is_the_float32_step_from_what_is_stored(kind, layout, make) -> None:
    """Weights and loss agree; moments are rounded to a neighbour, under the smallest scale."""
    p, layer = make(**layout)
    rule = UpdateRule(kind, weight_decay=0.1, moment_dtype="float8")
    state = make_state(layer.weight, layer.bias, rule)
    for number in (1, 2, 3):
        exact, before = copied(layer), wide_state(state)
        got = step(p, layer, rule, state, number)
        expected = step(p, exact, replace(rule, moment_dtype="float32"), before, number)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(layer.weight.float(), exact.weight.float())
        torch.testing.assert_close(layer.bias, exact.bias)
        stored = [(state.weight_m, state.weight_m_scale, before.weight_m)]
        if kind == "adamw":
            assert before.weight_v is not None
            stored.append((state.weight_v, state.weight_v_scale, before.weight_v.sqrt()))
        for codes, scale, value in stored:
            assert torch.equal(scale, float8.row_scale(value))
            spacing = 2.0 ** (torch.frexp(value / scale[:, None]).exponent - 4).clamp(min=-9)
            error = (float8.dequantize(codes, scale) - value).abs()
            assert (error < 1.001 * spacing * scale[:, None]).all()
            assert error.max() > 0
    assert state.bias_m is not None
    wide = layer.bias.dtype == torch.float64
    assert state.bias_m.dtype == (torch.float64 if wide else torch.float32)


@kinds
def test_accumulated_gradients_are_applied_with_the_last_part(kind, make) -> None:
    p, layer = make(group=5)
    rule = UpdateRule(kind, moment_dtype="float8")
    whole, parts = copied(layer), copied(layer)
    whole_state, state = (make_state(layer.weight, layer.bias, rule) for _ in range(2))
    step(p, whole, rule, whole_state, 1)
    step(p.rows(0, 3), parts, rule, state, 1, update=False)
    assert torch.equal(parts.weight, layer.weight)
    assert not state.weight_m.view(torch.uint8).any()
    assert state.grad_weight.dtype == torch.float32
    step(p.rows(3, 8), parts, rule, state, 1)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)
    same = state.weight_m.view(torch.uint8) == whole_state.weight_m.view(torch.uint8)
    assert same.double().mean() > 0.98


@kinds
def test_moments_are_right_on_average(kind) -> None:
    """4096 labels with the same numbers, 30 steps: means within five standard errors.

    Of roots the mean is right, of their squares it is larger by the variance.
    """
    labels = 4096
    rule = UpdateRule(kind, moment_dtype="float8")
    x = torch.tensor([[1.0, 0.3, 0.02]])
    index = torch.tensor([[0, 1, 2]]).expand(labels, 3).to(torch.uint16).contiguous()
    weight, none = torch.zeros(labels, 3), torch.zeros(0, dtype=torch.int32)
    state = make_state(weight, None, rule)
    exact = make_state(weight[:1], None, UpdateRule(kind))
    for number in range(1, 31):
        grad_scale = 1.0 if number < 4 else 0.01
        for w, i, s, moment_dtype in (
            (weight, index, state, "float8"),
            (weight[:1], index[:1], exact, "float32"),
        ):
            classifier_step_(
                *(x, w, i, None, torch.zeros(2, dtype=torch.int64), none),
                **{"loss": "bce", "rule": replace(rule, moment_dtype=moment_dtype), "state": s},
                **{"lr": 0.0, "step": number, "grad_scale": grad_scale, "seed": 1},
            )
    values = [(float8.dequantize(state.weight_m, state.weight_m_scale), exact.weight_m)]
    if kind == "adamw":
        roots = float8.dequantize(state.weight_v, state.weight_v_scale)
        values.append((roots, exact.weight_v.sqrt()))
    for got, expected in values:
        error = got.double().std(0) / labels**0.5
        assert (error > 0).all()
        # The root of a mean square is a little concave: half a percent of it.
        assert ((got.double().mean(0) - expected[0]).abs() < 5 * error + 0.005 * expected[0]).all()


def test_roots_never_vanish_and_means_may() -> None:
    value = torch.tensor([[448.0, 0.0, 1e-3, 1e-5, 1e-12, 1e-38, -1e-5]])
    one = torch.ones(1)
    for bits in (None, torch.zeros(value.shape, dtype=torch.int64)):
        kept = float8.quantize(value, one, bits, vanish=False).float()[0].tolist()
        smallest = 2.0**-9
        assert kept == [448.0, 0.0, *[smallest] * 4, -smallest]
        lost = float8.quantize(value, one, bits).float()[0, 3:]
        assert not lost.any()
    # Every number that is no smaller is rounded as ever.
    value = torch.randn(20, 30).abs() + 2.0**-9
    bits = torch.randint(2**float8.NOISE_BITS, value.shape)
    scale = torch.ones(20)
    kept, plain = (float8.quantize(value, scale, bits, vanish=v) for v in (False, True))
    assert torch.equal(kept.view(torch.uint8), plain.view(torch.uint8))


def test_steps_stay_bounded_where_gradients_of_a_row_are_far_apart(problem) -> None:
    """Inputs of sizes 1 to 2^-40: the smallest fall below what the row's scale can tell apart."""
    p = problem(6, 41, 40, 41, density=0.3)
    p = replace(p, x=p.x * torch.logspace(0, -40, 41, base=2))
    rule = UpdateRule("adamw", moment_dtype="float8")
    weight, bias = 0 * p.weight, 0 * p.bias
    state, largest = make_state(weight, bias, rule), 0.0
    for number in range(1, 101):
        before = weight.clone()
        rows = p.rows(number % 6, number % 6 + 1)
        classifier_step_(
            *(rows.x, weight, p.index, bias, rows.indptr, rows.indices),
            **{"loss": "bce", "rule": rule, "state": state, "lr": 1.0, "step": number},
            grad_scale=1.0,
        )
        largest = max(largest, float((weight - before).abs().max()))
    assert 0.9 < largest < 3  # 1.0 with float32 moments; 250 where roots may vanish


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("adamw", torch.float32), ("momentum", torch.float32), ("adamw", float8.DTYPE)],
    ids=str,
)
def test_training_reaches_the_loss_of_float32_moments(kind, dtype, make) -> None:
    """200 steps, by the mean of four seeds, within 2%."""
    p, layer = make(dtype=dtype)
    rule = UpdateRule(kind)

    def train(narrow, seed):
        own, chosen = copied(layer), replace(rule, moment_dtype=narrow)
        state, total = make_state(own.weight, own.bias, chosen), 0.0
        for number in range(1, 201):
            value, _ = classifier_step_(
                *(p.x, own.weight, own.index, own.bias, p.indptr, p.indices),
                **{"loss": "squared_hinge", "rule": chosen, "state": state, "scale": own.scale},
                **{"lr": 0.002, "step": number, "grad_scale": 0.125, "seed": seed},
            )
            total += float(value) if number > 180 else 0.0
        return total / 20

    exact, rounded = (
        sum(train(narrow, seed) for seed in range(4)) / 4 for narrow in ("float32", "float8")
    )
    assert rounded == pytest.approx(exact, rel=0.02)


def test_rounding_to_nearest_loses_the_second_moment(monkeypatch) -> None:
    """What the noise is for."""

    def decayed() -> float:
        weight, index = torch.zeros(64, 4), torch.arange(4).repeat(64, 1).int()
        rule = UpdateRule("adamw", moment_dtype="float8")
        state = make_state(weight, None, rule)
        for number in range(1, 401):
            classifier_step_(
                *(torch.ones(1, 4), weight, index, None),
                *(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)),
                **{"loss": "bce", "rule": rule, "state": state, "lr": 0.0, "step": number},
                grad_scale=1.0 if number == 1 else 1e-6,
            )
        return float8.dequantize(state.weight_v, state.weight_v_scale).square().mean().item()

    first = 0.001 * 0.5**2
    assert decayed() == pytest.approx(first * 0.999**399, rel=0.05)

    def half(key, rows, columns, bits=16):
        shape = torch.broadcast_shapes(rows.shape, columns.shape)
        return torch.full(shape, 2 ** (bits - 1))

    monkeypatch.setattr(rounding, "noise", half)
    assert decayed() > 0.9 * first


def test_the_state_takes_a_byte_a_number(problem) -> None:
    p = problem(2, 40, 20, 8)
    rule = UpdateRule("adamw", moment_dtype="float8")
    state = make_state(p.weight, p.bias, rule)
    sizes = {name: 0 if t is None else t.nbytes for name, t in vars(state).items()}
    assert sizes["weight_m"] == sizes["weight_v"] == 20 * 8
    assert sizes["weight_m_scale"] == sizes["weight_v_scale"] == sizes["bias_m"] == 20 * 4
    state = make_state(p.weight, p.bias, replace(rule, kind="momentum"))
    assert state.weight_v is None
    assert state.weight_v_scale is None
    layer = p.as_layer
    assert compiled_on_cpu(p.x, layer)
    assert not compiled_on_cpu(p.x, layer, *vars(state).values())


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
def test_rules_without_a_mean_refuse(kind) -> None:
    with pytest.raises(
        ValueError, match=f"expected adamw or momentum with float8 moments, got '{kind}'"
    ):
        UpdateRule(kind, moment_dtype="float8")


def test_a_state_that_does_not_fit_is_named(problem) -> None:
    p = problem(4, 8, 10, 3)
    narrow, wide = (UpdateRule("adamw", moment_dtype=d) for d in ("float8", "float32"))
    state = make_state(p.weight, p.bias, narrow)
    cases = [
        (wide, state, TypeError, "state.weight_m of torch.float32, got torch.float8_e4m3fn"),
        (
            narrow,
            make_state(p.weight, p.bias, wide),
            TypeError,
            "state.weight_m of torch.float8_e4m3fn, got torch.float32",
        ),
        (
            narrow,
            replace(state, weight_v_scale=torch.ones(9)),
            ValueError,
            r"state.weight_v_scale of shape \[10\] with moments of float8, got \[9\]",
        ),
        (
            narrow,
            replace(state, weight_m_scale=None),
            ValueError,
            r"state.weight_m_scale of shape \[10\] with moments of float8, got None",
        ),
        (
            wide,
            replace(make_state(p.weight, p.bias, wide), weight_m_scale=torch.ones(10)),
            ValueError,
            r"state.weight_m_scale None with moments of float32, got \[10\]",
        ),
    ]
    for rule, given, error, message in cases:
        with pytest.raises(error, match=message):
            classifier_step_(
                *p.tensors,
                **{"loss": "bce", "rule": rule, "state": given, "lr": 0.1, "step": 1},
                grad_scale=1.0,
            )
    with pytest.raises(ValueError, match="expected moments of float32 or float8, got 'int8'"):
        UpdateRule("adamw", moment_dtype="int8")
