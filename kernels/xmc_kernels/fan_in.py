"""Fixed fan-in linear layer: `x @ dense(weight, index).T + bias` without the dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from xmc_kernels._reference import fan_in as reference
from xmc_kernels.checks import check_fan_in, compiled_on_cpu, compiled_on_cuda


def fan_in_linear(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F] uint16 or int32, sorted, distinct
    bias: Tensor | None = None,  # [L]
) -> Tensor:  # [B, L]
    """`out[b, l] = sum_k weight[l, k] * x[b, index[l // G, k]] + bias[l]`, in x's dtype.

    G = L / index.shape[0] labels share an index row. Accumulates in float32 (float64 where an
    argument is float64). Differentiable once, in x, weight and bias. On the CPU, float32 weights
    run compiled; on CUDA, all but float64; others run the plain torch definition. The gradient of
    x on CUDA is summed in no fixed order unless `torch.use_deterministic_algorithms(True)`.

    Raises ValueError or TypeError on shapes, dtypes and devices that do not fit together. The
    values of index are trusted: see `checks.validate_index`.
    """
    check_fan_in(x, weight, index, bias)
    return _fan_in_linear(x, weight, index, bias)


@torch.library.custom_op("xmc::fan_in_linear", mutates_args=())
def _fan_in_linear(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    return reference.fan_in_linear(x, weight, index, bias)


@_fan_in_linear.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    if not compiled_on_cpu(x, weight, bias):
        return reference.fan_in_linear(x, weight, index, bias)
    from xmc_kernels._cpu import fan_in as cpu

    return cpu.fan_in_linear(x, weight, index, bias)


@_fan_in_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    if not compiled_on_cuda(x, weight, bias):
        return reference.fan_in_linear(x, weight, index, bias)
    from xmc_kernels._triton import fan_in as triton

    return triton.fan_in_linear(x, weight, index, bias)


@_fan_in_linear.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("xmc::fan_in_linear_backward", mutates_args=())
def _fan_in_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.fan_in_linear_backward(grad, x, weight, index)


@_fan_in_linear_backward.register_kernel("cpu")
def _(grad: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if not compiled_on_cpu(x, weight, None):
        return reference.fan_in_linear_backward(grad, x, weight, index)
    from xmc_kernels._cpu import fan_in as cpu

    return cpu.fan_in_linear_backward(grad, x, weight, index)


@_fan_in_linear_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if not compiled_on_cuda(x, weight):
        return reference.fan_in_linear_backward(grad, x, weight, index)
    from xmc_kernels._triton import fan_in as triton

    return triton.fan_in_linear_backward(grad, x, weight, index)


@_fan_in_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, index, bias = inputs
    ctx.save_for_backward(x, weight, index)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, index = ctx.saved_tensors
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        d_x, d_weight = _fan_in_linear_backward(grad, x, weight, index)
    if ctx.needs_input_grad[3]:
        d_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        d_bias = d_bias.to(ctx.bias_dtype)
    return d_x, d_weight, None, d_bias


_fan_in_linear.register_autograd(_backward, setup_context=_setup_context)
