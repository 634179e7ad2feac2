"""fan_in_linear against dense float64 matrices."""

from __future__ import annotations

import threading

import pytest
import torch

from xmc_kernels._reference import fan_in as reference
from xmc_kernels.fan_in import fan_in_linear

SHAPES = [
    # B, D, L, F, G: round, odd in one, odd in all, and the corners
    (64, 128, 512, 32, 1),
    (64, 128, 515, 32, 1),
    (70, 53, 517, 17, 1),
    (1, 16, 300, 5, 1),
    (33, 40, 64, 1, 1),
    (17, 24, 33, 24, 1),
    (5, 9, 1, 4, 1),
    (1, 1, 1, 1, 1),
    (48, 64, 512, 16, 4),
    (129, 20, 66, 7, 3),
    (64, 96, 560, 35, 10),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def grads(function, leaves, d_out):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


@shapes
def test_forward_and_gradients_equal_the_dense_layer(
    shape, problem, oracle, as_accurate, poisoned, two_threads
) -> None:
    p = problem(*shape)
    d_out = torch.randn(shape[0], shape[2])
    dense = oracle.dense_weight(p.weight, p.index, shape[1])

    def linear(x, dense, bias):
        return torch.nn.functional.linear(x, dense, bias)

    def sparse(x, weight, bias):
        return fan_in_linear(x, weight, p.index, bias)

    truth = grads(linear, (p.x.double(), dense, p.bias.double()), d_out)
    naive = grads(linear, (p.x, dense.float(), p.bias), d_out)
    ours = grads(sparse, (p.x, p.weight, p.bias), d_out)
    for i in (0, 1, 3):
        as_accurate(ours[i], naive[i], truth[i])
    as_accurate(ours[2], oracle.at_index(naive[2], p.index), oracle.at_index(truth[2], p.index))


@shapes
def test_reference_equals_the_dense_layer(shape, problem, oracle) -> None:
    p = problem(*shape).to(torch.float64)
    d_out = torch.randn(shape[0], shape[2], dtype=torch.float64)
    dense = oracle.dense_weight(p.weight, p.index, shape[1])
    torch.testing.assert_close(reference.fan_in_linear(p.x, p.as_layer), p.x @ dense.T + p.bias)
    d_x, d_weight = reference.fan_in_linear_backward(d_out, p.x, p.as_layer)
    torch.testing.assert_close(d_x, d_out @ dense)
    torch.testing.assert_close(d_weight, oracle.at_index(d_out.T @ p.x, p.index))


def test_float64_goes_through_the_reference_with_its_precision(problem, oracle) -> None:
    p = problem(7, 11, 13, 3).to(torch.float64)
    leaves = [t.requires_grad_() for t in (p.x, p.weight, p.bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: fan_in_linear(x, w, p.index, b), leaves)


def test_many_features_use_wide_indices(problem, oracle, as_accurate) -> None:
    p = problem(3, 70_000, 6, 9)
    assert p.index.dtype == torch.int32
    assert int(p.index.max()) >= 65536
    dense = oracle.dense_weight(p.weight, p.index, 70_000)
    truth = p.x.double() @ dense.T + p.bias
    as_accurate(fan_in_linear(*p.layer), p.x @ dense.float().T + p.bias, truth)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_costs_no_more_than_the_naive_layer(
    weight_dtype, problem, oracle, as_accurate
) -> None:
    p = problem(40, 64, 130, 16).to(torch.bfloat16).to(torch.float32)
    d_out = torch.randn(40, 130).bfloat16()
    dense = oracle.dense_weight(p.weight, p.index, 64)

    def linear(x, dense, bias):
        return torch.nn.functional.linear(x, dense, bias)

    truth = grads(linear, (p.x.double(), dense, p.bias.double()), d_out)
    naive = grads(linear, (p.x.bfloat16(), dense.bfloat16(), p.bias.bfloat16()), d_out)
    layer = (p.x.bfloat16(), p.weight.to(weight_dtype), p.bias.to(weight_dtype))
    ours = grads(lambda x, w, b: fan_in_linear(x, w, p.index, b), layer, d_out)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 2 + [weight_dtype] * 2
    for i in (0, 1, 3):
        as_accurate(ours[i], naive[i], truth[i])
    as_accurate(ours[2], oracle.at_index(naive[2], p.index), oracle.at_index(truth[2], p.index))


def test_no_bias_and_strided_arguments(problem, oracle) -> None:
    p = problem(20, 30, 40, 6)
    dense = oracle.dense_weight(p.weight, p.index, 30)
    x = p.x.T.contiguous().T
    weight = torch.stack([p.weight, p.weight], 2)[..., 0]
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    out = fan_in_linear(x, weight, p.index)
    torch.testing.assert_close(out.double(), p.x.double() @ dense.T, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_has_no_scores_and_no_gradient(problem) -> None:
    p = problem(2, 8, 10, 3)
    out = fan_in_linear(p.x[:0], p.weight.requires_grad_(), p.index, p.bias)
    assert out.shape == (0, 10)
    out.sum().backward()
    assert torch.equal(p.weight.grad, torch.zeros_like(p.weight))


def test_repeats_bit_for_bit(problem, two_threads) -> None:
    p = problem(64, 96, 2048, 24)
    d_out = torch.randn(64, 2048)

    def sparse(x, weight, bias):
        return fan_in_linear(x, weight, p.index, bias)

    first, second = (grads(sparse, (p.x, p.weight, p.bias), d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_python_threads_may_call_at_once(problem, two_threads) -> None:
    p = problem(32, 64, 4096, 16)
    expected = fan_in_linear(*p.layer)
    wrong = []

    def work() -> None:
        x = p.x.clone().requires_grad_()
        for _ in range(20):
            out = fan_in_linear(x, *p.layer[1:])
            out.sum().backward()
            if not torch.equal(out.detach(), expected):
                wrong.append(out)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def test_operator_contract(problem) -> None:
    p = problem(4, 12, 10, 3)
    leaves = [t.requires_grad_() for t in (p.x, p.weight, p.bias)]
    arguments = (leaves[0], leaves[1], p.index, leaves[2])
    torch.library.opcheck(torch.ops.xmc.fan_in_linear.default, arguments)
    torch.library.opcheck(
        torch.ops.xmc.fan_in_linear_backward.default,
        (torch.randn(4, 10), p.x.detach(), p.weight.detach(), p.index),
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, in inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend, problem) -> None:
    if backend == "inductor":
        compiler = pytest.importorskip("torch._inductor.cpp_builder")
        try:
            compiler.get_cpp_compiler()
        except Exception as reason:  # torch raises its own type
            pytest.skip(f"inductor needs a C++ compiler: {reason}")
    p = problem(6, 12, 20, 3)
    d_out = torch.randn(6, 20)

    def model(x, weight, bias):
        return fan_in_linear(torch.relu(x), weight, p.index, bias).sigmoid()

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = grads(model, (p.x, p.weight, p.bias), d_out)
    actual = grads(compiled, (p.x, p.weight, p.bias), d_out)
    torch.testing.assert_close(actual, expected)


def test_a_column_out_of_range_is_an_error_not_a_crash(problem) -> None:
    p = problem(3, 8, 5, 2)
    p.index[4, 1] = 9
    message = r"expected index values in \[0, 8\), label 4 has \d to 9"
    with pytest.raises(ValueError, match=message):
        fan_in_linear(*p.layer)
    with pytest.raises(ValueError, match=message):
        torch.ops.xmc.fan_in_linear_backward(torch.ones(3, 5), *p.layer[:3])
