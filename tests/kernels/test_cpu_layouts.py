"""What a layer may be made of on the CPU: groups, patterns, bfloat16; compiled, not the reference.

Against dense float64, with the weights that bfloat16 can hold as the truth.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numba import njit

from xmc_kernels import checks, classifier, fan_in, rounding, topk
from xmc_kernels._cpu import bfloat16, vector
from xmc_kernels.classifier import (
    ClassifierState,
    UpdateRule,
    classifier_loss_and_grad,
    classifier_step_,
    make_state,
)
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer
from xmc_kernels.packing import unpack_index
from xmc_kernels.topk import fan_in_topk

BF16, F32 = torch.bfloat16, torch.float32
LAYOUTS = [
    # B, D, L, G; pattern or fan-in; weight and bias. Few kinds of kernels: each takes seconds to
    # compile. Batches up to 16 have one narrow tile, 70 rows two wide ones.
    (9, 96, 517, 1, 17, BF16, BF16),
    (70, 80, 530, 5, (3, 16), BF16, F32),
    (70, 96, 576, 12, (5, 32), BF16, BF16),
    (13, 40, 600, 1, (3, 8), F32, BF16),
    (16, 4, 1, 1, (1, 4), F32, F32),
    (10, 24, 513, 1, (8, 8), F32, F32),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def _no_reference(monkeypatch) -> None:
    """An operation that would fall back fails."""

    def refuse(*_):
        raise AssertionError("expected a compiled kernel")

    for module, names in (
        (classifier, ["classifier_step"]),
        (fan_in, ["fan_in_linear", "fan_in_linear_backward"]),
        (topk, ["fan_in_topk"]),
    ):
        for name in names:
            monkeypatch.setattr(module.reference, name, refuse)


@pytest.fixture
def laid_out(problem, patterned):
    """`laid_out(layout)`: a problem, its options, and its index spelt out."""

    def make(layout):
        *sizes, group, inputs, weight_dtype, bias_dtype = layout
        if isinstance(inputs, tuple):
            p, index = patterned(*sizes, inputs, group)
            options = {"pattern": inputs}
        else:
            p = problem(*sizes, inputs, group)
            index, options = p.index, {}
        p = replace(p, weight=p.weight.to(weight_dtype), bias=p.bias.to(bias_dtype))
        return p, options, index

    return make


def exact(p):
    """In small whole numbers: sums are exact in float32, and weights in bfloat16."""
    weight, bias = (2 * p.weight).round(), p.bias.round()
    return replace(p, x=p.x.round(), weight=weight, bias=bias)


@layouts
def test_linear_and_gradients(layout, laid_out, oracle, as_accurate, poisoned, two_threads) -> None:
    p, options, index = laid_out(layout)
    d_out = torch.randn(len(p.x), len(p.weight))

    def grads(function, dtype, weight):
        leaves = [t.detach().to(dtype or t.dtype) for t in (p.x, weight, p.bias)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]

    dense = oracle.dense_weight(p.weight, index, p.x.shape[1])
    truth = grads(torch.nn.functional.linear, torch.float64, dense)
    naive = grads(torch.nn.functional.linear, torch.float32, dense)
    for result in (truth, naive):
        result[2] = oracle.at_index(result[2], index)
    naive[2] = naive[2].to(p.weight.dtype)  # what the gradient is returned in
    naive[3] = naive[3].to(p.bias.dtype)
    ours = grads(lambda x, w, b: fan_in_linear(x, w, p.index, b, **options), None, p.weight)
    assert [t.dtype for t in ours] == [F32, F32, p.weight.dtype, p.bias.dtype]
    for a, b, c in zip(ours, naive, truth, strict=True):
        as_accurate(a, b, c)


@layouts
def test_loss_and_gradients(layout, laid_out, oracle, as_accurate, poisoned, two_threads) -> None:
    p, options, index = laid_out(layout)
    dense = oracle.dense_weight(p.weight, index, p.x.shape[1])
    targets = oracle.dense_targets(p.indptr, p.indices, len(p.weight))
    arguments = (p.x, dense, p.bias, targets, "bce", 0.1)
    truth = list(oracle.loss_and_grads(*arguments))
    naive = list(oracle.loss_and_grads(*arguments, torch.float32))
    for result in (truth, naive):
        result[2] = oracle.at_index(result[2], index)
    naive[2:] = [g.to(t.dtype) for g, t in zip(naive[2:], (p.weight, p.bias), strict=True)]
    ours = classifier_loss_and_grad(*p.tensors, loss="bce", grad_scale=0.1, **options)
    for a, b, c in zip(ours, naive, truth, strict=True):
        as_accurate(a, b, c)


@layouts
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_smoothed_and_weighted_positives(layout, loss, laid_out, oracle, two_threads) -> None:
    p, options, index = laid_out(layout)
    smoothing, positive_weight = 0.2, torch.linspace(0.5, 20, len(p.weight))
    targets = oracle.dense_targets(p.indptr, p.indices, len(p.weight))
    dense = oracle.dense_weight(p.weight, index, p.x.shape[1])
    leaves = [t.double().requires_grad_() for t in (p.x, dense, p.bias)]
    scores = leaves[0] @ leaves[1].T + leaves[2]
    if loss == "bce":
        one, other = torch.nn.functional.softplus(-scores), torch.nn.functional.softplus(scores)
    else:
        one, other = (torch.relu(1 - sign * scores).square() for sign in (1, -1))
    of_positives = positive_weight.double() * ((1 - smoothing) * one + smoothing * other)
    value = 0.1 * torch.where(targets > 0, of_positives, other).sum()
    truth = [value.detach(), *torch.autograd.grad(value, leaves)]
    truth[2] = oracle.at_index(truth[2], index)
    options |= {"smoothing": smoothing, "positive_weight": positive_weight}
    ours = classifier_loss_and_grad(*p.tensors, loss=loss, grad_scale=0.1, **options)
    for a, b in zip(ours, truth, strict=True):
        rounding_error = 2**-8 if a.dtype == BF16 else 2e-5
        torch.testing.assert_close(a.double(), b, rtol=rounding_error, atol=1e-4)


@layouts
def test_topk(layout, laid_out, oracle, poisoned, two_threads) -> None:
    p, options, index = laid_out(layout)
    p = exact(p)
    scores = p.x.double() @ oracle.dense_weight(p.weight, index, p.x.shape[1]).T + p.bias
    excluded = [
        p.indices[int(a) : int(b)].tolist()
        for a, b in zip(p.indptr[:-1], p.indptr[1:], strict=True)
    ]
    want_scores, want = oracle.topk(scores, 4, excluded)
    got_scores, got = fan_in_topk(*p.layer, 4, exclude=(p.indptr, p.indices), **options)
    assert got.tolist() == want
    assert got_scores.tolist() == want_scores


@layouts
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps(layout, kind, laid_out, oracle, two_threads) -> None:
    """Two steps from whole numbers, each against an update in float64 of the same weights."""
    p, options, index = laid_out(layout)
    rule = UpdateRule(kind, weight_decay=0.01, eps=1e-3)
    state = make_state(p.weight, p.bias, rule)
    targets = oracle.dense_targets(p.indptr, p.indices, len(p.weight))
    moments = [torch.zeros_like(t, dtype=torch.float64) for t in (p.weight, p.bias) * 2]
    for number in (1, 2):
        before = [p.weight.double(), p.bias.double()]
        dense = oracle.dense_weight(p.weight, index, p.x.shape[1])
        _, d_x, *wanted = oracle.loss_and_grads(p.x, dense, p.bias, targets, "bce", 0.1)
        wanted[0] = oracle.at_index(wanted[0], index)
        _, got_d_x = classifier_step_(
            *p.tensors,
            **options,
            loss="bce",
            rule=rule,
            state=state,
            lr=0.05,
            step=number,
            grad_scale=0.1,
            seed=3,
        )
        torch.testing.assert_close(got_d_x.double(), d_x, rtol=1e-4, atol=1e-4)
        for i, (param, grad) in enumerate(zip((p.weight, p.bias), wanted, strict=True)):
            m, v, decay = moments[i], moments[i + 2], (0.01, 0.0)[i]
            if kind == "sgd":
                new = before[i] - 0.05 * (grad + decay * before[i])
            else:
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                root = (v / (1 - 0.999**number)).sqrt() + 1e-3
                new = before[i] * (1 - 0.05 * decay) - 0.05 * m / (1 - 0.9**number) / root
            # Stochastic rounding goes to either neighbour, at most one spacing away.
            room = new.abs() * 2**-7 if param.dtype == BF16 else 0
            assert ((param.double() - new).abs() <= room + 2e-5).all()


@pytest.mark.parametrize("group", [1, 4])
def test_an_exact_step_rounds_to_the_same_bits_as_the_definition(group, problem, oracle) -> None:
    # Whole numbers and powers of two: nothing is rounded but the new weights.
    p = exact(problem(6, 20, 516, 5, group)).to(BF16)
    targets = oracle.dense_targets(p.indptr, p.indices, 516)
    dense = oracle.dense_weight(p.weight, p.index, 20)
    _, _, d_dense, d_bias = oracle.loss_and_grads(p.x, dense, p.bias, targets, "squared_hinge", 0.5)
    new = {
        rounding.WEIGHT: p.weight.double() - 2**-9 * oracle.at_index(d_dense, p.index),
        rounding.BIAS: (p.bias.double() - 2**-9 * d_bias)[:, None],
    }
    wanted = []
    for stream, value in new.items():
        assert torch.equal(value.float().double(), value)
        rows, columns = (torch.arange(size) for size in value.shape)
        bits = rounding.noise(rounding.stream_key(11, 4, stream), rows[:, None], columns)
        wanted.append(rounding.stochastic_round(value.float(), bits))
        assert not torch.equal(wanted[-1], value.to(BF16))  # chance had a say
    classifier_step_(
        *p.tensors,
        loss="squared_hinge",
        rule=UpdateRule("sgd"),
        state=ClassifierState(),
        lr=2**-9,
        step=4,
        grad_scale=0.5,
        seed=11,
    )
    assert torch.equal(p.weight, wanted[0])
    assert torch.equal(p.bias, wanted[1].flatten())


@njit
def _round(bits, into, columns, key):
    bfloat16.round_rows(
        vector.pointer(bits), vector.pointer(into), 0, len(bits) // columns, columns, key
    )


@njit
def _narrow(bits, into):
    bfloat16.narrow(vector.pointer(bits), len(bits), vector.pointer(into), 0)


def _special():
    value = torch.randn(64, 37) * torch.logspace(-30, 30, 37)
    value[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38])
    value.view(torch.int32)[1, 0] = 0x7F800001  # a NaN whose high half alone is an infinity
    return value


def test_rounding_by_chance_is_that_of_the_definition() -> None:
    value, key = _special(), rounding.stream_key(5, 7, rounding.BIAS)
    rows, columns = (torch.arange(size) for size in value.shape)
    wanted = rounding.stochastic_round(value, rounding.noise(key, rows[:, None], columns))
    into = np.zeros(value.numel(), np.uint16)
    _round(value.flatten().view(torch.uint32).numpy(), into, 37, key & 0xFFFFFFFF)
    got = torch.from_numpy(into).view(BF16).view_as(wanted)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0), wanted.nan_to_num(0))


def test_rounding_to_nearest_is_that_of_torch() -> None:
    value = _special()
    value.view(torch.int32)[2, :2] = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32)
    into = np.zeros(value.numel(), np.uint16)
    _narrow(value.flatten().view(torch.uint32).numpy(), into)
    got, wanted = torch.from_numpy(into).view(BF16), value.bfloat16().flatten()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0), wanted.nan_to_num(0))


@pytest.mark.parametrize("pattern", [(1, 4), (3, 8), (2, 16), (5, 32)])
def test_the_last_packed_bytes_are_not_read_beyond(pattern, patterned, oracle) -> None:
    """The index as the end of a larger block whose next bytes would change the result."""
    p, index = patterned(9, 96, 3, pattern)
    size = p.index.numel()
    padded = torch.full((size + 16,), 255, dtype=torch.uint8)
    padded[:size] = p.index.flatten()
    packed = padded[:size].view_as(p.index)
    assert torch.equal(unpack_index(packed, pattern, p.weight.shape[1]), index)
    got = fan_in_linear(p.x, p.weight, packed, pattern=pattern)
    wanted = p.x.double() @ oracle.dense_weight(p.weight, index, 96).T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_accumulated_bfloat16_gradients_are_kept_in_float32(problem) -> None:
    p = problem(16, 32, 520, 8).to(BF16)
    rule, results = UpdateRule("adamw"), []
    for cuts in ((0, 16), (0, 7, 16)):
        own = p.copy()
        state = make_state(own.weight, own.bias, rule)
        for first, last in itertools.pairwise(cuts):
            part = own.rows(first, last)
            options = {"loss": "bce", "rule": rule, "state": state, "lr": 0.1, "step": 1}
            classifier_step_(*part.tensors, **options, grad_scale=1 / 16, update=last == 16)
            kept = state.grad_weight
            assert kept is None or kept.dtype == torch.float32
        results.append((own.weight.float(), state.weight_m))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2, atol=1e-2)


def test_what_runs_compiled() -> None:
    x, index = torch.ones(2, 8), torch.zeros(4, 2, dtype=torch.uint16)
    packed = torch.zeros(4, 1, dtype=torch.uint8)

    def compiled(weight=F32, bias=F32, rows=index, pattern=None, scale=None, x=x, moment=F32):
        weight, bias = torch.ones(4, 2).to(weight), torch.ones(4).to(bias)
        layer = Layer(weight, rows, bias, pattern, scale)
        return checks.compiled_on_cpu(x, layer, torch.ones(4, 2, dtype=moment), None)

    assert all(compiled(a, b) for a in (F32, BF16) for b in (F32, BF16))
    assert compiled(rows=packed, pattern=(1, 4))
    assert compiled(x=x.bfloat16())
    assert not compiled(torch.float16)
    assert not compiled(bias=torch.float64)
    assert not compiled(x=x.double())
    assert not compiled(rows=None)
    assert not compiled(moment=BF16)
    assert not compiled(torch.float8_e4m3fn, scale=torch.ones(4))
