"""What a kernel is started with: the same record runs it and compiles it ahead of time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from xmc_kernels import float8

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when it was imported)."""


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and compile-time constants."""

    kernel: Any
    grid: int
    """Number of programs; one axis, because the others stop at 65535."""
    arguments: Mapping[str, Any]  # tensors, numbers, None
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told; 255 registers a thread keep ptxas from spilling a few."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": 255}

    def run(self) -> None:
        """Run the kernel on the device of its tensors."""
        if self.grid == 0:
            return
        tensor = next(a for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, math.ceil(math.log2(max(1, n))))


def feature_major(x: Tensor, block_b: int) -> Tensor:
    """Transpose x [B, D] to [D, width], zeros from B on; width is a multiple of block_b.

    An index of a label then names a row of neighbouring numbers, aligned for wide loads.
    """
    width = max(1, cdiv(x.shape[0], block_b)) * block_b
    x_t = x.new_zeros(x.shape[1], width)
    x_t[:, : x.shape[0]] = x.T
    return x_t


def batch_major(x_t: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """The inverse: [D, width], or [parts, D, width] added up in order, to [B, D]."""
    if x_t.dim() == 3:
        x_t = x_t.sum(0) if len(x_t) > 1 else x_t[0]
    return x_t[:, :num_rows].T.to(dtype, memory_format=torch.contiguous_format)


def input_gradient_buffer(x_t: Tensor, parts: int) -> Tensor:
    """Zeros to add d_x_t to: [D, width], or [parts, D, width] where parts is not 0."""
    shape = (parts, *x_t.shape) if parts else tuple(x_t.shape)
    return torch.zeros(shape, dtype=torch.float32, device=x_t.device)


def bfloat16_product(x: Tensor, weight: Tensor) -> bool:
    """Whether bfloat16 holds x and weight exactly (as it does float8 times a power of two)."""
    return x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, float8.DTYPE)


def dot_settings(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """How tensor cores multiply these: DOT_DTYPE and PRECISION of the kernels.

    bfloat16 as it is. float16 through TF32, which holds its ten bits and takes gradients that
    float16 would flush to zero. float32 through three TF32 products, about as exact as float32.
    The interpreter computes wrongly in bfloat16, so it gets float32.
    """
    if bfloat16_product(x, weight) and not INTERPRETED:
        return {"DOT_DTYPE": triton.language.bfloat16, "PRECISION": "tf32"}
    halves = x.dtype != torch.float32 and weight.dtype != torch.float32
    return {
        "DOT_DTYPE": triton.language.float32,
        "PRECISION": "tf32" if halves else "tf32x3",
    }
