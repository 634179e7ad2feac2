"""A classifier's labels as the operations hand them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xmc_kernels import float8, quantized


def stored_numbers(
    weight: Tensor, scale: Tensor | None, fan_in: int, dtype: torch.dtype = torch.float32
) -> Tensor:  # [R, F]
    """Rows of weights as they count: those with a scale in `dtype`, others as they are."""
    if scale is None:
        return weight
    if weight.dtype in quantized.DTYPES:
        return quantized.dequantize(weight, scale, fan_in, dtype)
    return float8.dequantize(weight, scale, dtype)


@dataclass(frozen=True)
class Layer:
    """Weights of L labels, which inputs they belong to, and biases."""

    weight: Tensor  # [L, F], or [L, D] where index is None; int4: two weights a byte
    index: Tensor | None  # [L/G, F] uint16 or int32; [L/G, P] uint8 with a pattern; None: dense
    bias: Tensor | None  # [L]
    pattern: tuple[int, int] | None = None
    """(n, m): n of every m consecutive inputs, `index` packed (`packing.py`)."""
    scale: Tensor | None = None
    """[L] float32: what float8, int8 and int4 (uint8, `quantized.py`) weights are multiplied by."""

    @classmethod
    def of(
        cls,
        weight: Tensor,
        index: Tensor | None,
        bias: Tensor | None,
        pattern: Sequence[int] | None,
        scale: Tensor | None,
    ) -> Layer:
        """From an operation's arguments, where a pattern is a list."""
        pair = None if pattern is None else (pattern[0], pattern[1])
        return cls(weight, index, bias, pair, scale)

    @property
    def num_labels(self) -> int:
        """L."""
        return self.weight.shape[0]

    @property
    def fan_in(self) -> int:
        """F, or D of a dense layer; even in int4, but where the index says what it is."""
        if self.weight.dtype != torch.uint8:
            return self.weight.shape[1]
        if self.pattern is None and self.index is not None:
            return self.index.shape[1]
        halves = 2 * self.weight.shape[1]
        # Of one block n is F, and half a byte may be left over; of several F has to be even.
        one_block = self.pattern is not None and self.pattern[0] == halves - 1
        return halves - one_block

    @property
    def group(self) -> int:
        """G, the labels that share an index row; 1 for a dense layer."""
        return 1 if self.index is None else self.num_labels // self.index.shape[0]

    @property
    def quantized(self) -> bool:
        """Whether weights are integers: such layers predict and are not trained."""
        return self.weight.dtype in quantized.DTYPES

    def contiguous(self) -> Layer:
        """With every tensor contiguous; copies those that are not."""

        def packed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.contiguous()

        tensors = (self.weight.contiguous(), packed(self.index), packed(self.bias))
        return Layer(*tensors, self.pattern, packed(self.scale))

    @property
    def plain(self) -> bool:
        """Whether indices are stored as they are and weights mean what they say."""
        return self.pattern is None and self.scale is None
