"""One-against-all classifier over very many labels: loss, gradients and update in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xmc_kernels import checks, float8
from xmc_kernels._reference import classifier as reference
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, UpdateRule, make_state, moment_dtype

__all__ = [
    "ClassifierState",
    "UpdateRule",
    "classifier_loss_and_grad",
    "classifier_step_",
    "make_state",
]

LOSSES = tuple(reference.LOSSES)


@torch.no_grad()
def classifier_step_(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F], or [L, D] where index is None
    index: Tensor | None,  # [L/G, F] uint16 or int32, sorted, distinct; None: dense
    bias: Tensor | None,  # [L]
    indptr: Tensor,  # [B+1] int64, the positives of each row as CSR
    indices: Tensor,  # [nnz] int32
    *,
    pattern: tuple[int, int] | None = None,
    scale: Tensor | None = None,  # [L] float32
    loss: str,
    rule: UpdateRule,
    state: ClassifierState,
    lr: float,
    step: int,
    grad_scale: float,
    update: bool = True,
    seed: int = 0,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,  # [L]
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # [] float32, [B, D] in x's dtype
    """One training step of `x @ dense(weight, index).T + bias`; neither scores nor gradients stay.

    Label tile by label tile: scores, loss gradient, d_x, update of weight and bias in place.
    Returns `grad_scale * sum over B x L of the loss` and its gradient with respect to x.

    `loss` is "bce" (binary cross-entropy with logits) or "squared_hinge". `rule` equals
    torch.optim's on the same gradients; `state` comes from `make_state(weight, bias, rule)` and is
    written in place. `step` counts optimizer steps from 1 (bias correction of adamw).
    `grad_scale` is 1 / rows of the whole optimizer step. `update=False` adds the gradients to
    `state.grad_weight` and `state.grad_bias` (made at first use, [L, F]) and leaves the weights;
    `update=True` applies the sum and drops it, so accumulation is exact. bfloat16 weights are
    rounded stochastically: `rounding.py`, keyed by `seed`, step and position, whose rows count
    from `row_offset` on where these labels are a part of a larger classifier. `pattern` and
    `scale` as in `fan_in_linear`; float8 weights (experimental) are rounded stochastically too,
    and their scales written in place. So are float8 moments of weights (`rule.moment_dtype`),
    which cost adamw two bytes a weight, not eight; see `float8.py`. Biases keep float32 moments.

    A positive entry of label l counts `positive_weight[l] * ((1 - smoothing) * loss(score, 1) +
    smoothing * loss(score, 0))`, in value and gradient; for "bce" that is a target of
    1 - smoothing. Negative entries stay as they are, so that nothing dense is added.

    Raises ValueError or TypeError where arguments do not fit together, on labels out of range and
    on features that are not finite (before anything is written).
    """
    _check(x, Layer(weight, index, bias, pattern, scale), indptr, indices, loss)
    _check_positive(weight, smoothing, positive_weight)
    if row_offset < 0:
        raise ValueError(f"expected row_offset of at least 0, got {row_offset}")
    if step < 1:
        raise ValueError(f"expected step from 1 on, got {step}")
    _check_state(weight, bias, rule, state)
    if not update and state.grad_weight is None:
        state.grad_weight = _zeros(weight)
        state.grad_bias = None if bias is None else _zeros(bias)
    result = _classifier_step(
        x,
        weight,
        index,
        bias,
        pattern,
        scale,
        indptr,
        indices,
        state.weight_m,
        state.weight_v,
        state.bias_m,
        state.bias_v,
        state.grad_weight,
        state.grad_bias,
        state.weight_m_scale,
        state.weight_v_scale,
        loss,
        rule.kind,
        [rule.momentum, *rule.betas, rule.eps, rule.weight_decay],
        lr,
        step,
        grad_scale,
        update,
        seed,
        smoothing,
        positive_weight,
        row_offset,
    )
    if update:
        state.grad_weight = state.grad_bias = None
    return result


@torch.no_grad()
def classifier_loss_and_grad(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F], or [L, D] where index is None
    index: Tensor | None,  # [L/G, F]
    bias: Tensor | None,  # [L]
    indptr: Tensor,  # [B+1] int64
    indices: Tensor,  # [nnz] int32
    *,
    pattern: tuple[int, int] | None = None,
    scale: Tensor | None = None,  # [L] float32
    loss: str,
    grad_scale: float,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,  # [L]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [] float32, [B, D], [L, F], [L]
    """The loss of `classifier_step_` and its gradients in x, weight and bias; writes nothing.

    Holds an [L, F] gradient. Without a bias its gradient is that of a bias of zeros.
    """
    _check(x, Layer(weight, index, bias, pattern, scale), indptr, indices, loss)
    _check_positive(weight, smoothing, positive_weight)
    if bias is None:
        bias = torch.zeros(len(weight), dtype=_gradient_dtype(weight), device=weight.device)
    layer = (weight, index, bias, pattern, scale)
    options = (loss, grad_scale, smoothing, positive_weight)
    return _classifier_loss_and_grad(x, *layer, indptr, indices, *options)


def _check(x: Tensor, layer: Layer, indptr: Tensor, indices: Tensor, loss: str) -> None:
    checks.check_layer(x, layer)
    checks.check_floats(layer)
    checks.check_rows(indptr, indices, x.shape[0])
    if loss not in LOSSES:
        raise ValueError(f"expected a loss of {', '.join(LOSSES)}, got {loss!r}")


def _check_positive(weight: Tensor, smoothing: float, positive_weight: Tensor | None) -> None:
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"expected smoothing in [0, 0.5), got {smoothing}")
    if positive_weight is None:
        return
    if positive_weight.dtype not in checks.FLOATS:
        raise TypeError(f"expected a floating-point positive_weight, got {positive_weight.dtype}")
    if positive_weight.shape != (len(weight),) or positive_weight.device != weight.device:
        raise ValueError(
            f"expected positive_weight of shape [{len(weight)}] on {weight.device} to match "
            f"weight, got {list(positive_weight.shape)} on {positive_weight.device}"
        )


def _check_state(
    weight: Tensor, bias: Tensor | None, rule: UpdateRule, state: ClassifierState
) -> None:
    for name, like, wanted in (
        ("weight_m", weight, rule.keeps_mean),
        ("weight_v", weight, rule.keeps_square),
        ("bias_m", bias, rule.keeps_mean),
        ("bias_v", bias, rule.keeps_square),
    ):
        if like is None or not wanted:
            continue
        tensor = getattr(state, name)
        if tensor is None or tensor.shape != like.shape:
            got = None if tensor is None else list(tensor.shape)
            raise ValueError(
                f"expected state.{name} of shape {list(like.shape)} for {rule.kind}, got {got}"
            )
        narrow = name.startswith("weight") and rule.moment_dtype == "float8"
        if (tensor.dtype == float8.DTYPE) != narrow:
            wanted_dtype = float8.DTYPE if narrow else moment_dtype(like)
            raise TypeError(f"expected state.{name} of {wanted_dtype}, got {tensor.dtype}")
    for name, wanted in (
        ("weight_m_scale", rule.keeps_mean),
        ("weight_v_scale", rule.keeps_square),
    ):
        scale = getattr(state, name)
        narrow = wanted and rule.moment_dtype == "float8"
        if (scale is not None) != narrow or (narrow and scale.shape != weight.shape[:1]):
            shape = f"of shape {list(weight.shape[:1])}" if narrow else "None"
            got = None if scale is None else list(scale.shape)
            raise ValueError(
                f"expected state.{name} {shape} with moments of {rule.moment_dtype}, got {got}"
            )


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """What a gradient is returned in: the weight's dtype, float32 for float8."""
    return torch.float32 if weight.itemsize == 1 else weight.dtype


def _zeros(like: Tensor) -> Tensor:
    """Zeros to add gradients up in, float32 at least."""
    return torch.zeros(like.shape, dtype=moment_dtype(like), device=like.device)


def _check_values(x: Tensor, layer: Layer, indptr: Tensor, indices: Tensor) -> None:
    checks.check_finite(x)
    checks.check_rows_values(indptr, indices)
    checks.check_label_range(indices, layer.num_labels)


def _on_cpu(
    x: Tensor, layer: Layer, indptr: Tensor, indices: Tensor, state: ClassifierState, *options: Any
) -> tuple[Tensor, Tensor]:
    """The compiled step where it has these dtypes and a sparse layer, the reference otherwise."""
    memory = vars(state).values()
    if not (checks.written_in_place(layer, *memory) and checks.compiled_on_cpu(x, layer, *memory)):
        return reference.classifier_step(x, layer, indptr, indices, state, *options)
    from xmc_kernels._cpu import classifier as cpu

    return cpu.classifier_step(x, layer, indptr, indices, state, *options)


def _on_cuda(
    x: Tensor, layer: Layer, indptr: Tensor, indices: Tensor, state: ClassifierState, *options: Any
) -> tuple[Tensor, Tensor]:
    """The Triton step; the reference for float64 and for strided weights or moments."""
    memory = vars(state).values()
    if not (checks.written_in_place(layer, *memory) and checks.compiled_on_cuda(x, layer, *memory)):
        return reference.classifier_step(x, layer, indptr, indices, state, *options)
    from xmc_kernels._triton import classifier as triton

    return triton.classifier_step(x, layer, indptr, indices, state, *options)


@torch.library.custom_op(
    "xmc::classifier_step",
    mutates_args=(
        "weight",
        "bias",
        "scale",
        "weight_m",
        "weight_v",
        "bias_m",
        "bias_v",
        "grad_weight",
        "grad_bias",
        "weight_m_scale",
        "weight_v_scale",
    ),
)
def _classifier_step(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    pattern: Sequence[int] | None,
    scale: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    weight_m: Tensor | None,
    weight_v: Tensor | None,
    bias_m: Tensor | None,
    bias_v: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weight_m_scale: Tensor | None,
    weight_v_scale: Tensor | None,
    loss: str,
    kind: str,
    constants: list[float],
    lr: float,
    step: int,
    grad_scale: float,
    update: bool,
    seed: int = 0,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    return _step(
        reference.classifier_step,
        (x, Layer.of(weight, index, bias, pattern, scale), indptr, indices),
        ClassifierState(
            *(weight_m, weight_v, bias_m, bias_v, grad_weight, grad_bias),
            *(weight_m_scale, weight_v_scale),
        ),
        *(loss, kind, constants, lr, step, grad_scale, update),
        *(seed, smoothing, positive_weight, row_offset),
    )


@_classifier_step.register_kernel("cpu")
def _(x, weight, index, bias, pattern, scale, indptr, indices, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    tensors = (x, Layer.of(weight, index, bias, pattern, scale), indptr, indices)
    return _step(_on_cpu, tensors, ClassifierState(*rest[:8]), *rest[8:])


@_classifier_step.register_kernel("cuda")
def _(x, weight, index, bias, pattern, scale, indptr, indices, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    tensors = (x, Layer.of(weight, index, bias, pattern, scale), indptr, indices)
    return _step(_on_cuda, tensors, ClassifierState(*rest[:8]), *rest[8:])


def _step(
    backend: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, Layer, Tensor, Tensor],
    state: ClassifierState,
    loss: str,
    kind: str,
    constants: list[float],
    lr: float,
    step: int,
    grad_scale: float,
    update: bool,
    seed: int = 0,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    _check_values(*tensors)
    momentum, beta1, beta2, eps, decay = constants
    narrow = "float32" if state.weight_m_scale is None else "float8"
    rule = UpdateRule(kind, momentum, (beta1, beta2), eps, decay, narrow)  # type: ignore[arg-type]
    numbers = (lr, step, grad_scale, update, seed, smoothing, positive_weight, row_offset)
    return backend(*tensors, state, loss, rule, *numbers)


@_classifier_step.register_fake
def _(x, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape)


@torch.library.custom_op("xmc::classifier_loss_and_grad", mutates_args=())
def _classifier_loss_and_grad(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None,
    bias: Tensor,
    pattern: Sequence[int] | None,
    scale: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    loss: str,
    grad_scale: float,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, Layer.of(weight, index, bias, pattern, scale), indptr, indices)
    options = (loss, grad_scale, smoothing, positive_weight)
    return _gradients(reference.classifier_step, tensors, *options)


@_classifier_loss_and_grad.register_kernel("cpu")
def _(x, weight, index, bias, pattern, scale, indptr, indices, *rest):  # type: ignore[no-untyped-def]
    tensors = (x, Layer.of(weight, index, bias, pattern, scale), indptr, indices)
    return _gradients(_on_cpu, tensors, *rest)


@_classifier_loss_and_grad.register_kernel("cuda")
def _(x, weight, index, bias, pattern, scale, indptr, indices, *rest):  # type: ignore[no-untyped-def]
    tensors = (x, Layer.of(weight, index, bias, pattern, scale), indptr, indices)
    return _gradients(_on_cuda, tensors, *rest)


def _gradients(
    backend: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, Layer, Tensor, Tensor],
    loss: str,
    grad_scale: float,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One accumulating step from zero."""
    _check_values(*tensors)
    weight, bias = tensors[1].weight, tensors[1].bias
    assert bias is not None
    state = ClassifierState()
    state.grad_weight, state.grad_bias = d_weight, d_bias = _zeros(weight), _zeros(bias)
    numbers = (0.0, 1, grad_scale, False, 0, smoothing, positive_weight)
    value, d_x = backend(*tensors, state, loss, UpdateRule("sgd"), *numbers)
    return value, d_x, d_weight.to(_gradient_dtype(weight)), d_bias.to(bias.dtype)


@_classifier_loss_and_grad.register_fake
def _(x, weight, index, bias, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    value = x.new_empty((), dtype=torch.float32)
    return (
        value,
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=_gradient_dtype(weight)),
        bias.new_empty(bias.shape),
    )
