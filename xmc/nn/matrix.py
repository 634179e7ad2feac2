"""A sparse matrix with the same number of entries in each row: what a fixed fan-in layer holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from xmc.nn.pattern import index_columns, index_dtype
from xmc_kernels import float8, quantized
from xmc_kernels.checks import validate_index
from xmc_kernels.layer import stored_numbers
from xmc_kernels.packing import (
    check_pattern,
    pack_index,
    packed_bytes,
    pattern_fan_in,
    unpack_index,
)

_TILE = 2**22  # numbers of a dense label tile held at a time


@dataclass(frozen=True)
class FixedFanIn:
    """A sparse matrix [L, D] with exactly F entries in each row.

    `dense[l, inputs[l // G, k]] = weight[l, k]`: the G labels of a group share an index row. With
    a pattern (n, m) a row has n entries in every m consecutive columns, and its index takes
    log2(m) bits an entry (`xmc_kernels.packing`). float8, int8 and int4 weights are multiplied by
    their row's scale.
    """

    weight: Tensor  # [L, F]; int4: [L, ceil(F / 2)]
    index: Tensor  # [L/G, F] uint16, or int32 where D > 65536; sorted, distinct; or [L/G, P] uint8
    in_features: int  # D
    group_size: int = 1  # G
    pattern: tuple[int, int] | None = None  # (n, m)
    scale: Tensor | None = None  # [L] float32, of float8, int8 and int4 weights

    @property
    def fan_in(self) -> int:
        if self.weight.dtype != quantized.INT4:
            return self.weight.shape[1]
        if self.pattern is None:
            return self.index.shape[1]
        return pattern_fan_in(self.pattern, self.in_features)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def validate(self) -> None:
        """Raise ValueError or TypeError on the first rule that does not hold."""
        scaled = self.weight.dtype in (float8.DTYPE, *quantized.DTYPES)
        if self.weight.dim() != 2 or not (scaled or self.weight.is_floating_point()):
            raise ValueError(
                "expected a weight of floats, int8 or int4 (uint8) and of shape [L, F], "
                f"got {self.weight.dtype} {list(self.weight.shape)}"
            )
        check_sizes(self.in_features, self.out_features, self.fan_in, self.group_size, self.pattern)
        if (self.scale is not None) != scaled:
            raise ValueError(
                "expected a scale for float8, int8 and int4 weights and for no others, "
                f"got {self.weight.dtype} and {'no scale' if self.scale is None else 'a scale'}"
            )
        if self.scale is not None and list(self.scale.shape) != [self.out_features]:
            raise ValueError(
                f"expected scale of shape [{self.out_features}] to match weight, "
                f"got {list(self.scale.shape)}"
            )
        columns = self.fan_in if self.pattern is None else packed_bytes(self.fan_in, self.pattern)
        expected = [self.out_features // self.group_size, columns]
        if list(self.index.shape) != expected:
            raise ValueError(
                f"expected index of shape {expected} to match weight "
                f"{list(self.weight.shape)} in groups of {self.group_size}, "
                f"got {list(self.index.shape)}"
            )
        validate_index(self.index, self.in_features, self.pattern)

    def inputs(self) -> Tensor:
        """The inputs of each index row, [L/G, F] in an integer dtype."""
        if self.pattern is None:
            return self.index
        return unpack_index(self.index, self.pattern, self.fan_in)

    def numbers(self) -> Tensor:
        """The weights [L, F] as they count: those with a scale as float32, others as they are."""
        return stored_numbers(self.weight, self.scale, self.fan_in)

    def to_dense(self) -> Tensor:
        """The matrix as [L, D], in weight's dtype (float32 where there is a scale)."""
        weight = self.numbers()
        dense = weight.new_zeros(self.out_features, self.in_features)
        return dense.scatter_(1, self._label_inputs().long(), weight)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,  # [L, D]
        fan_in: int,
        group_size: int = 1,
        pattern: tuple[int, int] | None = None,
    ) -> FixedFanIn:
        """Keep the `fan_in` entries of largest magnitude in each row; with a pattern, n per block.

        In groups, the inputs with the largest mean magnitude over the group's labels. Ties go to
        the lower input.
        """
        if dense.dim() != 2 or not dense.is_floating_point():
            raise ValueError(
                f"expected a floating-point matrix [L, D], got {dense.dtype} {list(dense.shape)}"
            )
        num_labels, in_features = dense.shape
        check_sizes(in_features, num_labels, fan_in, group_size, pattern)
        groups = dense.detach().reshape(-1, group_size, in_features)
        columns = index_columns(fan_in, in_features, pattern)
        index = torch.empty(groups.shape[0], columns, dtype=torch.uint8, device=dense.device)
        index = index if pattern else index.view(index_dtype(in_features))
        kept, block = pattern or (fan_in, in_features)
        base = torch.arange(0, in_features, block, device=dense.device)[:, None]
        step = max(1, _TILE // (in_features * group_size))
        for start in range(0, groups.shape[0], step):
            score = groups[start : start + step].abs().mean(1).unflatten(1, (-1, block))
            order = score.sort(dim=2, descending=True, stable=True).indices
            rows = (order[:, :, :kept].sort(dim=2).values + base).flatten(1)
            packed = pack_index(rows, pattern) if pattern else rows.to(index.dtype)
            index[start : start + step] = packed
        weight = dense.new_empty(num_labels, fan_in)
        matrix = cls(weight, index, in_features, group_size, pattern)
        torch.gather(dense.detach(), 1, matrix._label_inputs().long(), out=weight)
        return matrix

    def to_csr(self) -> scipy.sparse.csr_matrix:
        """The matrix [L, D] for scipy, float32 or float64; zero weights stay stored entries."""
        weight = self.numbers().detach().cpu()
        if weight.dtype != torch.float64:
            weight = weight.float()
        columns = self._label_inputs().cpu().to(torch.int32).flatten()
        indptr = np.arange(self.out_features + 1, dtype=np.int64) * self.fan_in
        return scipy.sparse.csr_matrix(
            (weight.flatten().numpy(), columns.numpy(), indptr),
            shape=(self.out_features, self.in_features),
        )

    def _label_inputs(self) -> Tensor:
        """Inputs of every label, [L, F]."""
        inputs = self.inputs()
        if self.group_size == 1:
            return inputs
        repeated = inputs.unsqueeze(1).expand(-1, self.group_size, -1)
        return repeated.reshape(self.out_features, self.fan_in)


def check_sizes(
    in_features: int,
    out_features: int,
    fan_in: int,
    group_size: int,
    pattern: tuple[int, int] | None = None,
) -> None:
    """Raise ValueError unless a fixed fan-in layer of these sizes can exist."""
    for name, value in (
        ("in_features", in_features),
        ("out_features", out_features),
        ("fan_in", fan_in),
        ("group_size", group_size),
    ):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if fan_in > in_features:
        raise ValueError(f"expected fan_in of at most in_features = {in_features}, got {fan_in}")
    if out_features % group_size:
        raise ValueError(
            f"expected group_size to divide out_features = {out_features}, got {group_size}"
        )
    if pattern is not None:
        check_pattern(pattern, fan_in, in_features)
