"""float8 (e4m3) weights and moments with a scale per label: one byte each. Experimental.

`dense[l, k] = scale[l] * weight[l, k]`. A scale is a power of two, the smallest under which the
label's largest weight stays within 448, so weights that do not change stay the same numbers when
it moves (save those that fall among the subnormals). Rounding is stochastic, by the noise of
`rounding.py`: three bits of mantissa lose nearly every update otherwise.

An optimizer's moments are stored alike: means of gradients as they are, means of squares as square
roots. Normal numbers span 2^15, so that a root tells squares apart over 2^30, the range of the
gradients squared; squares themselves would halve it. Rounding must be stochastic here more than
anywhere: an average with 0.999 falls by 0.05% a step in its root, a hundredth of the spacing, and
to nearest it would never move. A root that is not zero never becomes zero, however small: adamw
divides the mean by it, and the mean may have kept its number. So both know gradients of a row down
to 2^-17 of the largest, and below that adamw's steps are smaller than in float32, not larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_DROPPED = 20  # mantissa bits of a float32 that e4m3 has no room for
NOISE_BITS = _DROPPED
"""Random bits per weight that `quantize` takes."""
_REBIAS = 2.0**-120  # exponent bias 127 to 7: e4m3's bits then head those of the float32
_SMALLEST = 2.0**-100  # of a label's largest weight over 448, so that scales stay normal numbers


def row_scale(value: Tensor) -> Tensor:
    """The scale [R] float32 for rows of value [R, F] float32."""
    ratio = (value.abs().amax(1) / LARGEST).clamp(min=_SMALLEST)
    mantissa, exponent = torch.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(ratio), exponent - (mantissa == 0.5).int())


def quantize(
    value: Tensor, scale: Tensor, bits: Tensor | None = None, *, vanish: bool = True
) -> Tensor:
    """Value [R, F] float32 over scale [R] as float8, rounded by NOISE_BITS random bits.

    Rounded to nearest (halves away from zero) where `bits` is None. Without `vanish` nothing but
    zero becomes zero: what is too small becomes the smallest number there is. Finite values only.
    """
    raw = (value / scale[:, None] * _REBIAS).view(torch.int32)
    raised = (raw & 0x7FFFFFFF) + (2 ** (_DROPPED - 1) if bits is None else bits.int())
    size = raised >> _DROPPED
    if not vanish:
        size = size.clamp(min=(value != 0).int())
    return (size | ((raw >> 24) & 0x80)).to(torch.uint8).view(DTYPE)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * weight` in another dtype."""
    return weight.to(dtype) * scale[:, None].to(dtype)
