"""The Triton layer, forward and backward, against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer

SHAPES = [
    # B, D, L, F, G: round, odd in one, odd in all, and the corners
    (16, 32, 64, 8, 1),
    (16, 32, 67, 8, 1),
    (21, 19, 37, 7, 1),
    (150, 12, 5, 9, 1),
    (3, 90, 6, 77, 1),
    (1, 16, 33, 5, 1),
    (9, 10, 8, 1, 1),
    (5, 24, 7, 24, 1),
    (5, 9, 1, 4, 1),
    (1, 1, 1, 1, 1),
    (16, 32, 64, 16, 16),
    (5, 40, 64, 33, 32),
    (70, 70, 130, 66, 65),
    (6, 20, 12, 5, 4),
    (3, 20, 9, 20, 9),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("shape", "dtypes", "deterministic"),
    [
        *((shape, DTYPES[0], False) for shape in SHAPES),
        *((shape, DTYPES[1], True) for shape in SHAPES),
        *((shape, dtypes, False) for shape in SHAPES[1::3] for dtypes in DTYPES[2:]),
    ],
    ids=str,
)
def test_equals_the_dense_layer(
    shape, dtypes, deterministic, problem, oracle, naive_and_truth, close, device, poisoned
) -> None:
    from xmc_kernels._triton import fan_in

    p = problem(*shape)
    x, weight, bias = p.x.to(dtypes[0]), p.weight.to(dtypes[1]), p.bias.to(dtypes[1])
    index = p.index.int() if dtypes[0] == torch.float32 else p.index
    grad = torch.randn(shape[0], shape[2]).to(dtypes[0])
    dense = oracle.dense_weight(weight, index, shape[1])
    naive, truth = naive_and_truth(x, dense, bias, grad, index)
    x, weight, index, bias, grad = (t.to(device) for t in (x, weight, index, bias, grad))

    out = fan_in.fan_in_linear(x, Layer(weight, index, bias))
    d_x, d_weight = fan_in.fan_in_linear_backward(
        grad, x, Layer(weight, index, None), deterministic
    )

    assert out.dtype == d_x.dtype == dtypes[0]
    assert d_weight.dtype == dtypes[1]
    close(out, naive[0], truth[0], dtypes[0])
    close(d_x, naive[1], truth[1], dtypes[0])
    close(d_weight, naive[2], truth[2], dtypes[1])


def test_without_bias_and_with_strided_tensors(problem, device) -> None:
    from xmc_kernels._triton import fan_in

    p = problem(7, 20, 33, 6)
    x, weight, index = (t.to(device) for t in (p.x, p.weight, p.index.int()))
    layer = Layer(weight, index, torch.zeros(33, device=device))
    expected = fan_in.fan_in_linear(x, layer)
    strided = (x.T.contiguous().T, Layer(weight.T.contiguous().T, index.T.contiguous().T, None))
    assert torch.equal(fan_in.fan_in_linear(*strided), expected)
    grad = torch.randn(7, 33, device=device)
    ours = fan_in.fan_in_linear_backward(grad.T.contiguous().T, *strided, True)
    theirs = fan_in.fan_in_linear_backward(grad, x, layer, True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch(problem, device) -> None:
    from xmc_kernels._triton import fan_in

    p = problem(4, 8, 5, 2)
    x, weight, index = p.x[:0].to(device), p.weight.to(device), p.index.to(device)
    assert fan_in.fan_in_linear(x, Layer(weight, index, None)).shape == (0, 5)
    d_x, d_weight = fan_in.fan_in_linear_backward(x.new_empty(0, 5), x, Layer(weight, index, None))
    assert d_x.shape == (0, 8)
    assert not d_weight.any()


def test_every_program_has_its_part_of_a_deterministic_gradient(
    problem, device, monkeypatch
) -> None:
    from xmc_kernels._triton import fan_in, tiles

    p = problem(5, 12, 23, 4)
    grad = torch.randn(5, 23, device=device)
    layer = Layer(p.weight.to(device), p.index.to(device), None)
    tensors = (grad, p.x.to(device), layer)
    results = []
    for num_bytes in (0, 4 * 4 * 12 * 16, 2**30):  # 1 program, 4, and one for each label
        monkeypatch.setattr(tiles, "PARTIAL_BYTES", num_bytes)
        results.append(fan_in.fan_in_linear_backward(*tensors, True))
    for d_x, d_weight in results[1:]:
        torch.testing.assert_close(d_x, results[0][0])
        assert torch.equal(d_weight, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [1, 16, 64])
def test_the_operation_on_a_gpu_equals_the_cpu(group, dtype, problem) -> None:
    p = problem(100, 300, 64 * 150, 50, group).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        x, weight, bias = (t.to(device).requires_grad_() for t in (p.x, p.weight, p.bias))
        out = fan_in_linear(x, weight, p.index.to(device), bias)
        grads = torch.autograd.grad(out.float().square().mean(), (x, weight, bias))
        results.append([t.detach().cpu() for t in (out, *grads)])
    for ours, expected in zip(results[1], results[0], strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours, expected, rtol=0, atol=scale * max(2 * torch.finfo(dtype).eps, 1e-5)
        )


@pytest.mark.gpu
def test_the_deterministic_setting_repeats_bit_for_bit_on_a_gpu(problem, poisoned) -> None:
    p = problem(64, 128, 20000, 32)
    tensors = [t.cuda() for t in (torch.randn(64, 20000), p.x, p.weight, p.index)]
    first, second = (torch.ops.xmc.fan_in_linear_backward(*tensors) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_operator_contract_on_a_gpu(problem) -> None:
    p = problem(4, 6, 10, 3)
    tensors = [t.cuda() for t in p.layer]
    for tensor in (tensors[0], tensors[1], tensors[3]):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.xmc.fan_in_linear.default, tensors)
