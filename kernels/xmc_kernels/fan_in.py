"""Fixed fan-in linear layer: `x @ dense(weight, index).T + bias` without the dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xmc_kernels._reference import fan_in as reference
from xmc_kernels.checks import check_floats, check_layer, compiled_on_cpu, compiled_on_cuda
from xmc_kernels.layer import Layer


def fan_in_linear(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F] uint16 or int32, sorted, distinct; [L/G, P] uint8 with a pattern
    bias: Tensor | None = None,  # [L]
    *,
    pattern: tuple[int, int] | None = None,
    scale: Tensor | None = None,  # [L] float32
) -> Tensor:  # [B, L]
    """`out[b, l] = sum_k weight[l, k] * x[b, index[l // G, k]] + bias[l]`, in x's dtype.

    G = L / index.shape[0] labels share an index row. With a `pattern` (n, m) a label reads n of
    every m consecutive inputs and index is packed (`packing.pack_index`). With a `scale`, weight
    is float8_e4m3fn and stands for `scale[l] * weight[l, k]` (`float8.py`).

    Accumulates in float32 (float64 where an argument is float64). Differentiable once, in x,
    weight (unless float8) and bias. On the CPU, float32 and bfloat16 weights run compiled; on
    CUDA, all but float64; others run the plain torch definition. The gradient of x on CUDA is
    summed in no fixed order unless `torch.use_deterministic_algorithms(True)`.

    Raises ValueError or TypeError on shapes, dtypes and devices that do not fit together. The
    values of index are trusted: see `checks.validate_index`.
    """
    check_layer(x, layer := Layer(weight, index, bias, pattern, scale))
    check_floats(layer)
    return _fan_in_linear(x, weight, index, bias, pattern, scale)


def _on_cpu(x: Tensor, layer: Layer) -> Tensor:
    if not compiled_on_cpu(x, layer):
        return reference.fan_in_linear(x, layer)
    from xmc_kernels._cpu import fan_in as cpu

    return cpu.fan_in_linear(x, layer)


def _on_cuda(x: Tensor, layer: Layer) -> Tensor:
    if not compiled_on_cuda(x, layer):
        return reference.fan_in_linear(x, layer)
    from xmc_kernels._triton import fan_in as triton

    return triton.fan_in_linear(x, layer)


@torch.library.custom_op("xmc::fan_in_linear", mutates_args=())
def _fan_in_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    pattern: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    return reference.fan_in_linear(x, Layer.of(weight, index, bias, pattern, scale))


@_fan_in_linear.register_kernel("cpu")
def _(x, weight, index, bias, pattern=None, scale=None) -> Tensor:  # type: ignore[no-untyped-def]
    return _on_cpu(x, Layer.of(weight, index, bias, pattern, scale))


@_fan_in_linear.register_kernel("cuda")
def _(x, weight, index, bias, pattern=None, scale=None) -> Tensor:  # type: ignore[no-untyped-def]
    return _on_cuda(x, Layer.of(weight, index, bias, pattern, scale))


@_fan_in_linear.register_fake
def _(x, weight, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward_on_cpu(grad: Tensor, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    if not compiled_on_cpu(x, layer):
        return reference.fan_in_linear_backward(grad, x, layer)
    from xmc_kernels._cpu import fan_in as cpu

    return cpu.fan_in_linear_backward(grad, x, layer)


def _backward_on_cuda(grad: Tensor, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    if not compiled_on_cuda(x, layer):
        return reference.fan_in_linear_backward(grad, x, layer)
    from xmc_kernels._triton import fan_in as triton

    return triton.fan_in_linear_backward(grad, x, layer)


@torch.library.custom_op("xmc::fan_in_linear_backward", mutates_args=())
def _fan_in_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    pattern: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    layer = Layer.of(weight, index, None, pattern, scale)
    return reference.fan_in_linear_backward(grad, x, layer)


@_fan_in_linear_backward.register_kernel("cpu")
def _(grad, x, weight, index, pattern=None, scale=None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return _backward_on_cpu(grad, x, Layer.of(weight, index, None, pattern, scale))


@_fan_in_linear_backward.register_kernel("cuda")
def _(grad, x, weight, index, pattern=None, scale=None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return _backward_on_cuda(grad, x, Layer.of(weight, index, None, pattern, scale))


@_fan_in_linear_backward.register_fake
def _(grad, x, weight, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), reference.gradient_like(weight)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, index, bias, pattern, scale = inputs
    ctx.save_for_backward(x, weight, index, scale)
    ctx.pattern = pattern
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, index, scale = ctx.saved_tensors
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        d_x, d_weight = _fan_in_linear_backward(grad, x, weight, index, ctx.pattern, scale)
    if ctx.needs_input_grad[3]:
        d_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        d_bias = d_bias.to(ctx.bias_dtype)
    return d_x, d_weight if scale is None else None, None, d_bias, None, None


_fan_in_linear.register_autograd(_backward, setup_context=_setup_context)
