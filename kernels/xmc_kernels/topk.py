"""The k best labels of each row, streamed over label tiles: [B, L] scores never exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xmc_kernels import checks
from xmc_kernels._reference import topk as reference
from xmc_kernels.layer import Layer


@torch.no_grad()
def fan_in_topk(
    x: Tensor,  # [B, D]
    weight: Tensor,  # [L, F], or [L, D] where index is None; int4: [L, ceil(F / 2)]
    index: Tensor | None,  # [L/G, F] uint16 or int32, sorted, distinct; None: dense
    bias: Tensor | None,  # [L]
    k: int,
    *,
    pattern: tuple[int, int] | None = None,
    scale: Tensor | None = None,  # [L] float32
    exclude: tuple[Tensor, Tensor] | None = None,  # indptr [B+1] int64, indices [nnz] int32
    label_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # scores [B, k] float32, labels [B, k] int64
    """The k largest of `x @ dense(weight, index).T + bias` per row, best first.

    `pattern` and `scale` as in `fan_in_linear`. Beside those, the layer of a compressed model is
    read as it is stored: weights of int8 or int4 (uint8, two a byte) with their `scale`, see
    `quantized.py`, and any index packed by `pattern=packing.one_block(F, D)`. On the CPU they are
    spelt out for a few labels at a time, never as a whole; on CUDA the plain torch definition runs.

    Ties go to the lower label. Labels come back as row of weight + label_offset, and `exclude`
    (sorted within a row) holds ids of that kind, which its row never gets. Where fewer than k
    labels are left, the rest is label -1 with score -inf.

    Raises ValueError or TypeError where arguments do not fit together or x is not finite.
    """
    checks.check_layer(x, Layer(weight, index, bias, pattern, scale))
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    if label_offset < 0 or label_offset + weight.shape[0] > 2**31:
        raise ValueError(
            f"expected label ids below 2^31, got {weight.shape[0]} labels from {label_offset} on"
        )
    if exclude is not None:
        checks.check_rows(*exclude, x.shape[0], "exclude")
    layer = (weight, index, bias, pattern, scale)
    return _fan_in_topk(x, *layer, k, *(exclude or (None, None)), label_offset)


def _on_cpu(x: Tensor, layer: Layer, *options: Any) -> tuple[Tensor, Tensor]:
    if layer.index is None and x.dtype == layer.weight.dtype == torch.float32:
        from xmc_kernels._cpu.dense_topk import dense_topk

        return dense_topk(x, layer, *options)
    if not checks.compiled_on_cpu(x, layer):
        return reference.fan_in_topk(x, layer, *options)
    from xmc_kernels._cpu import topk as cpu

    return cpu.fan_in_topk(x, layer, *options)


def _on_cuda(x: Tensor, layer: Layer, *options: Any) -> tuple[Tensor, Tensor]:
    if not checks.compiled_on_cuda(x, layer):
        return reference.fan_in_topk(x, layer, *options)
    from xmc_kernels._triton import topk as triton

    return triton.fan_in_topk(x, layer, *options)


@torch.library.custom_op("xmc::fan_in_topk", mutates_args=())
def _fan_in_topk(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    pattern: Sequence[int] | None,
    scale: Tensor | None,
    k: int,
    exclude_indptr: Tensor | None,
    exclude_indices: Tensor | None,
    label_offset: int,
) -> tuple[Tensor, Tensor]:
    exclude = _check_values(x, exclude_indptr, exclude_indices)
    layer = Layer.of(weight, index, bias, pattern, scale)
    return reference.fan_in_topk(x, layer, k, exclude, label_offset)


@_fan_in_topk.register_kernel("cpu")
def _(x, weight, index, bias, pattern, scale, k, indptr, indices, label_offset):  # type: ignore[no-untyped-def]
    layer = Layer.of(weight, index, bias, pattern, scale)
    return _on_cpu(x, layer, k, _check_values(x, indptr, indices), label_offset)


@_fan_in_topk.register_kernel("cuda")
def _(x, weight, index, bias, pattern, scale, k, indptr, indices, label_offset):  # type: ignore[no-untyped-def]
    layer = Layer.of(weight, index, bias, pattern, scale)
    return _on_cuda(x, layer, k, _check_values(x, indptr, indices), label_offset)


def _check_values(
    x: Tensor, indptr: Tensor | None, indices: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    checks.check_finite(x)
    if indptr is None or indices is None:
        return None
    checks.check_rows_values(indptr, indices, "exclude")
    return indptr, indices


@_fan_in_topk.register_fake
def _(x, weight, index, bias, pattern, scale, k, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
