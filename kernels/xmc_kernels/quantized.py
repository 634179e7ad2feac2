"""int8 and int4 weights with a scale per label, for prediction: `dense[l, k] = scale[l] * q[l, k]`.

int8 holds -127 to 127. int4 holds -7 to 7, two weights a byte: slot k of a row lies in byte k // 2,
the even one in the lower half, as q + 8; where F is odd the last half byte is 8, which is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8, INT4 = torch.int8, torch.uint8
DTYPES = (INT8, INT4)
"""What tells the two apart: int4 is bytes."""
_ZERO = 8  # what int4 stores for 0
_TILE = 2**20  # weights quantized at a time
# Shares of a row's largest weight at which int4 may cut: a finer grid for the others often errs
# less. int8's grid is fine enough.
_CUTS = {INT8: (1.0,), INT4: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}
_MOST = {INT8: 127, INT4: 7}


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [L, F] of floats as (q [L, F] int8 or [L, ceil(F / 2)] uint8, scale [L] float32).

    Rounded to nearest under the scale of least squared error among a few; a row of zeros has
    scale 1. Raises ValueError on weights that are not finite.
    """
    num_labels, fan_in = weight.shape
    columns = fan_in if dtype == INT8 else -(-fan_in // 2)
    q = torch.empty(num_labels, columns, dtype=dtype, device=weight.device)
    scale = torch.empty(num_labels, device=weight.device)
    step = max(1, _TILE // fan_in)
    for start in range(0, num_labels, step):
        rows = weight[start : start + step].float()
        if not bool(rows.isfinite().all()):
            label = start + int((~rows.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"expected finite weights, those of label {label} are not")
        scale[start : start + step] = _row_scale(rows, dtype)
        whole = _rounded(rows, scale[start : start + step], dtype)
        q[start : start + step] = whole.to(INT8) if dtype == INT8 else _paired(whole)
    return q, scale


def dequantize(
    q: Tensor,  # [R, F] int8 or [R, ceil(F / 2)] uint8
    scale: Tensor,  # [R]
    fan_in: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [R, F]
    """`scale * q` in another dtype."""
    whole = q.to(dtype)
    if q.dtype == INT4:
        both = torch.stack([q & 15, q >> 4], 2).flatten(1)[:, :fan_in]
        whole = both.to(dtype) - _ZERO
    return whole * scale[:, None].to(dtype)


def _row_scale(rows: Tensor, dtype: torch.dtype) -> Tensor:
    largest = rows.abs().amax(1)
    # The smallest normal number, so that nothing is divided by zero.
    full = (largest / _MOST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    best, least = full, torch.full_like(full, torch.inf)
    for cut in _CUTS[dtype]:
        scale = cut * full
        error = (_rounded(rows, scale, dtype) * scale[:, None] - rows).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return torch.where(largest == 0, 1.0, best)


def _rounded(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    most = _MOST[dtype]
    return (rows / scale[:, None]).round().clamp(-most, most)


def _paired(whole: Tensor) -> Tensor:
    """[R, F] whole numbers as bytes [R, ceil(F / 2)]."""
    halves = torch.nn.functional.pad(whole, (0, whole.shape[1] % 2)).to(torch.uint8) + _ZERO
    return halves[:, ::2] | halves[:, 1::2] << 4
