"""One-against-all training step in plain torch, label tile by label tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xmc_kernels import float8, rounding
from xmc_kernels._reference.fan_in import (
    compute_dtype,
    dense_tile,
    label_tiles,
    tile_index,
    tile_weight,
)
from xmc_kernels.layer import Layer
from xmc_kernels.rounding import BIAS, MEAN, ROOT, WEIGHT
from xmc_kernels.update import ClassifierState, UpdateRule


def bce(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy with logits and its gradient, elementwise."""
    return F.softplus(scores) - scores * targets, torch.sigmoid(scores) - targets


def squared_hinge(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`max(0, 1 - y * score)^2` with y = +1 or -1, and its gradient, elementwise."""
    sign = 2 * targets - 1
    margin = (1 - sign * scores).clamp(min=0)
    return margin**2, -2 * sign * margin


LOSSES = {"bce": bce, "squared_hinge": squared_hinge}


def positive(scores: Tensor, loss: str, smoothing: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight * ((1 - smoothing) * loss(score, 1) + smoothing * loss(score, 0))`, elementwise."""
    ones = torch.ones_like(scores)
    as_positive, as_negative = LOSSES[loss](scores, ones), LOSSES[loss](scores, 0 * ones)
    value, gradient = (
        weight * ((1 - smoothing) * one + smoothing * other)
        for one, other in zip(as_positive, as_negative, strict=True)
    )
    return value, gradient


def updated(
    param: Tensor,
    grad: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    rule: UpdateRule,
    lr: float,
    step: int,
    weight_decay: float,
) -> Tensor:
    """One step of torch.optim's SGD, AdamW or Adagrad; moments are written in place."""
    p = param.clone()
    if rule.kind == "adamw":
        assert m is not None and v is not None
        beta1, beta2 = rule.betas
        p.mul_(1 - lr * weight_decay)
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (v / (1 - beta2**step)).sqrt_().add_(rule.eps)
        return p.addcdiv_(m, denom, value=-lr / (1 - beta1**step))
    if weight_decay:
        grad = grad + weight_decay * p
    if rule.kind == "momentum":
        assert m is not None
        grad = m.mul_(rule.momentum).add_(grad)
    elif rule.kind == "adagrad":
        assert v is not None
        v.addcmul_(grad, grad)
        grad = grad / (v.sqrt() + rule.eps)
    return p.sub_(grad, alpha=lr)


def store_(
    param: Tensor, scale: Tensor | None, value: Tensor, key: int, start: int, *, vanish: bool = True
) -> None:
    """Write rows from `start` on in param's dtype: bfloat16 and float8 rounded stochastically."""
    if param.dtype not in (torch.bfloat16, float8.DTYPE):
        param.copy_(value)
        return
    table = value.view(len(value), -1)
    rows, columns = (torch.arange(size, device=param.device) for size in table.shape)
    if scale is None:
        bits = rounding.noise(key, rows[:, None] + start, columns)
        param.copy_(rounding.stochastic_round(table, bits).view_as(param))
        return
    bits = rounding.noise(key, rows[:, None] + start, columns, float8.NOISE_BITS)
    scale.copy_(float8.row_scale(table.float()))
    param.copy_(float8.quantize(table.float(), scale, bits, vanish=vanish))


def updated_narrow(
    param: Tensor,
    grad: Tensor,
    moments: tuple[Tensor | None, Tensor | None],  # float8
    scales: tuple[Tensor | None, Tensor | None],
    rule: UpdateRule,
    lr: float,
    step: int,
    seed: int,
    row_offset: int,
    start: int,
) -> Tensor:
    """`updated` of weights from label `start` on, whose moments are float8: v's square roots."""
    m, v = (
        None if moment is None or scale is None else float8.dequantize(moment, scale, grad.dtype)
        for moment, scale in zip(moments, scales, strict=True)
    )
    v = None if v is None else v.square()
    new = updated(param, grad, m, v, rule, lr, step, rule.weight_decay)
    roots = None if v is None else v.sqrt()
    for stored, scale, value, stream in zip(moments, scales, (m, roots), (MEAN, ROOT), strict=True):
        if stored is not None and value is not None:
            key = rounding.stream_key(seed, step, stream, row_offset)
            store_(stored, scale, value, key, start, vanish=stream == MEAN)
    return new


def classifier_step(
    x: Tensor,  # [B, D]
    layer: Layer,
    indptr: Tensor,  # [B+1]
    indices: Tensor,  # [nnz]
    state: ClassifierState,
    loss: str,
    rule: UpdateRule,
    lr: float,
    step: int,
    grad_scale: float,
    update: bool,
    seed: int = 0,
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,  # [L]
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # [], [B, D]
    """Loss and d_x; weights are updated in place, or their gradient is added to the state's."""
    weight, bias = layer.weight, layer.bias
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), indptr.diff())
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    d_x = torch.zeros_like(wide)

    for start, stop in label_tiles(layer.num_labels, *x.shape):

        def take(tensor: Tensor | None, first: int = start, last: int = stop) -> Tensor | None:
            return None if tensor is None else tensor[first:last]

        dense = dense_tile(layer, start, stop, x.shape[1], dtype)
        scores = wide @ dense.T
        if bias is not None:
            scores += bias[start:stop]
        targets = torch.zeros_like(scores)
        here = (indices >= start) & (indices < stop)
        at = rows[here], indices[here].long() - start
        targets[at] = 1
        value, g = LOSSES[loss](scores, targets)
        if smoothing or positive_weight is not None:
            factor = take(positive_weight)
            factor = torch.ones_like(scores[0]) if factor is None else factor.to(dtype)
            value[at], g[at] = positive(scores[at], loss, smoothing, factor[at[1]])
        total += value.sum(dtype=torch.float64) * grad_scale
        g *= grad_scale
        d_x += g @ dense
        d_weight, d_bias = g.T @ wide, g.sum(0)
        if layer.index is not None:
            d_weight = d_weight.gather(1, tile_index(layer, start, stop))
        for param, grad, kept, m, v, stream in (
            (weight, d_weight, state.grad_weight, state.weight_m, state.weight_v, WEIGHT),
            (bias, d_bias, state.grad_bias, state.bias_m, state.bias_v, BIAS),
        ):
            if param is None:
                continue
            if kept is not None:
                grad = kept[start:stop].add_(grad)
            if not update:
                continue
            moments = take(m), take(v)
            if stream == WEIGHT:
                old, scale = tile_weight(layer, start, stop, grad.dtype), take(layer.scale)
                decay = rule.weight_decay
            else:
                old, scale, decay = param[start:stop].to(grad.dtype), None, 0.0
            if stream == WEIGHT and rule.moment_dtype == "float8":
                scales = take(state.weight_m_scale), take(state.weight_v_scale)
                noise = (seed, row_offset, start)
                new = updated_narrow(old, grad, moments, scales, rule, lr, step, *noise)
            else:
                new = updated(old, grad, *moments, rule, lr, step, decay)
            key = rounding.stream_key(seed, step, stream, row_offset)
            store_(param[start:stop], scale, new, key, start)
    return total.to(torch.float32), d_x.to(x.dtype)
