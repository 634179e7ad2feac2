"""Fixed fan-in linear layer: each of L labels reads F of the D input features."""

from __future__ import annotations

import math
from typing import Any

import scipy.sparse
import torch
from torch import Tensor, nn

from xmc.distributed.sharding import RowShard
from xmc.nn.matrix import FixedFanIn, check_sizes
from xmc.nn.pattern import (
    draw_index_,
    draw_pattern_,
    draw_uniform_,
    index_columns,
    index_dtype,
)
from xmc_kernels import float8
from xmc_kernels.checks import validate_index
from xmc_kernels.fan_in import fan_in_linear

__all__ = ["FixedFanIn", "FixedFanInLinear"]

_TILE = 2**22  # weights drawn at a time where they are stored in fewer bits


class FixedFanInLinear(nn.Module):
    """`nn.Linear` with F inputs per output: `x @ dense(weight, index).T + bias`.

    Takes the place of `nn.Linear(in_features, out_features)` in any model: leading dimensions,
    autocast, `state_dict`, `torch.compile` and DistributedDataParallel work alike. `group_size`
    neighbouring outputs share their inputs; `pattern=(n, m)` has each output read n of every m
    consecutive inputs (m of 4, 8, 16 or 32; fan_in is n * in_features / m). Costs L * F
    multiply-adds per example and L * (F weights + F / G indices) of memory, where an index takes
    two bytes (four where in_features > 65536, log2(m) bits with a pattern); see `xmc.nn.rewire`
    for evolving it.

    With dtype float8_e4m3fn (experimental) a weight takes one byte, an output has a scale in
    `weight_scale` [L] float32 and the bias is float32. Such weights get no gradient from autograd:
    `xmc_kernels.classifier.classifier_step_` trains them. Casts of the module leave them alone.

    Under DistributedDataParallel every process gets the pattern of rank 0 when the wrapper is
    made, and again each forward like any buffer; `broadcast_buffers=False` saves that traffic
    where no process rewires, or all rewire with the same seed and step.

    `rows` says of how many outputs, on all ranks, these `out_features` are: see
    `reset_parameters`.

    Raises ValueError for sizes that are not positive, fan_in > in_features, a group_size that does
    not divide out_features and a pattern that does not make this fan-in.
    """

    in_features: int
    out_features: int
    fan_in: int
    group_size: int
    pattern: tuple[int, int] | None
    weight: nn.Parameter  # [L, F]
    bias: nn.Parameter | None  # [L]
    weight_scale: Tensor | None  # [L] float32, of float8 weights
    # `index` in memory, [L/G, bytes of a row] uint8: neither gloo nor NCCL can send 16-bit
    # integers, and bytes are left alone by casts of the module to another dtype.
    index_bytes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int,
        *,
        group_size: int = 1,
        pattern: tuple[int, int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rows: RowShard | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features, out_features, fan_in, group_size, pattern)
        self.in_features = in_features
        self.out_features = out_features
        self.fan_in = fan_in
        self.group_size = group_size
        self.pattern = pattern
        scaled = dtype == float8.DTYPE
        weight = torch.empty(out_features, fan_in, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=not scaled)
        scale = torch.ones(out_features, device=device) if scaled else None
        self.register_buffer("weight_scale", scale)
        if bias:
            wide = torch.float32 if scaled else dtype
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=wide))
        else:
            self.register_parameter("bias", None)
        shape = (out_features // group_size, index_columns(fan_in, in_features, pattern))
        index_bytes = torch.empty(shape, dtype=torch.uint8, device=device)
        self.register_buffer("index_bytes", index_bytes)
        self.reset_parameters(rows)

    @property
    def index(self) -> Tensor:
        """Inputs of each output, [L/G, F] uint16 or int32 (D > 65536); writes reach the layer.

        With a pattern packed, [L/G, P] uint8: `matrix.inputs()` unpacks it.
        """
        if self.pattern is not None:
            return self.index_bytes
        return self.index_bytes.view(index_dtype(self.in_features))

    @property
    def matrix(self) -> FixedFanIn:
        """Weights and pattern, sharing the layer's storage and detached from autograd."""
        return FixedFanIn(
            self.weight.detach(),
            self.index,
            self.in_features,
            self.group_size,
            self.pattern,
            self.weight_scale,
        )

    @torch.no_grad()
    def reset_parameters(self, rows: RowShard | None = None) -> None:
        """Draw a new pattern, weights U(-1/sqrt(F), 1/sqrt(F)) and bias 0.

        The pattern is drawn from torch's global CPU generator whatever the device, F distinct
        inputs per row, every subset equally likely. Where the outputs are `rows` of those of a
        larger layer, they get what that one would draw for them on the CPU.
        """
        rows = rows or RowShard.whole(self.out_features)
        if len(rows) != self.out_features:
            raise ValueError(f"expected a shard of {self.out_features} outputs, got {rows}")
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.index_bytes.is_meta:
            return
        shared = rows.per(self.group_size)
        if self.pattern is None:
            draw_index_(self.index, self.in_features, shared)
        else:
            draw_pattern_(self.index, self.in_features, self.pattern, shared)
        bound = 1 / math.sqrt(self.fan_in)
        if self.weight_scale is None:
            draw_uniform_(self.weight, bound, rows)
            return
        step = max(1, _TILE // self.fan_in)
        for start in range(0, rows.total, step):
            shape = (min(step, rows.total - start), self.fan_in)
            drawn = torch.empty(shape, device=self.weight.device).uniform_(-bound, bound)
            first, last = rows.within(start, start + len(drawn))
            if first < last:
                drawn = drawn[first - start : last - start]
                own = slice(first - rows.start, last - rows.start)
                self.weight_scale[own] = float8.row_scale(drawn)
                self.weight[own] = float8.quantize(drawn, self.weight_scale[own])

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., L]
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected x of shape [..., {self.in_features}], got {list(x.shape)}")
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # As autocast does for nn.Linear, the output is in the lower precision; the weights
            # are read as they are, so that no cast copy of L * F numbers is made.
            x = x.to(torch.get_autocast_dtype(device))
        flat = x.reshape(-1, self.in_features)
        out = fan_in_linear(
            flat,
            self.weight,
            self.index,
            self.bias,
            pattern=self.pattern,
            scale=self.weight_scale,
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        fan_in: int,
        *,
        group_size: int = 1,
        pattern: tuple[int, int] | None = None,
    ) -> FixedFanInLinear:
        """Copy of a dense layer that keeps the `fan_in` largest weights of each output."""
        matrix = FixedFanIn.from_dense(linear.weight.detach(), fan_in, group_size, pattern)
        return cls.from_fixed_fan_in(matrix, linear.bias)

    @classmethod
    def from_fixed_fan_in(cls, matrix: FixedFanIn, bias: Tensor | None = None) -> FixedFanInLinear:
        """A layer with copies of the given matrix and bias [L]."""
        matrix.validate()
        if bias is not None and list(bias.shape) != [matrix.out_features]:
            raise ValueError(
                f"expected bias of shape [{matrix.out_features}] to match weight, "
                f"got {list(bias.shape)}"
            )
        layer = cls(
            matrix.in_features,
            matrix.out_features,
            matrix.fan_in,
            group_size=matrix.group_size,
            pattern=matrix.pattern,
            bias=bias is not None,
            device="meta",  # nothing is drawn only to be replaced
            dtype=matrix.weight.dtype,
        ).to_empty(device=matrix.weight.device)
        with torch.no_grad():
            layer.weight.copy_(matrix.weight)
            layer.index.copy_(matrix.index)
            if layer.weight_scale is not None and matrix.scale is not None:
                layer.weight_scale.copy_(matrix.scale)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The dense layer with the same outputs: holds [L, D].

        Its dtype is the wider one of weight and bias, float32 for float8 weights.
        """
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.matrix.to_dense())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
            linear.to(torch.promote_types(linear.weight.dtype, linear.bias.dtype))
        return linear

    def to_csr(self) -> scipy.sparse.csr_matrix:
        """Weights as a scipy matrix [L, D]; the bias is not part of it."""
        return self.matrix.to_csr()

    def extra_repr(self) -> str:
        pattern = "" if self.pattern is None else f"pattern={self.pattern}, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"fan_in={self.fan_in}, group_size={self.group_size}, {pattern}"
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> FixedFanInLinear:
        before, weight, scale = self.index_bytes, self.weight.data, self.weight_scale
        super()._apply(fn, recurse)
        if scale is not None and self.weight.dtype != float8.DTYPE:
            device = self.weight.device
            self.weight = nn.Parameter(weight.to(device), requires_grad=False)
            self.weight_scale = scale.to(device)
        if self.index_bytes.dtype != torch.uint8:  # Module.type() casts integers too
            self.index_bytes = before.to(self.index_bytes.device)
        return self

    # Files hold `index` with its own dtype; the bytes are an affair of this class.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "index_bytes"]
        destination[prefix + "index"] = self.index

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses an index that is not sorted, distinct and in range: kernels trust it."""
        # Named `index` here and `index_bytes` in the module: both names below, one each way.
        key, bytes_key = prefix + "index", prefix + "index_bytes"
        given = state_dict.get(key)
        mine = {name: v for name, v in state_dict.items() if name not in (key, bytes_key)}
        if isinstance(given, Tensor):
            problem = self._index_problem(given)
            if problem:
                error_msgs.append(f"{key}: {problem}")
                mine[bytes_key] = self.index_bytes
            else:
                if self.pattern is None:
                    given = given.to(index_dtype(self.in_features))
                mine[bytes_key] = given.contiguous().view(torch.uint8)
        super()._load_from_state_dict(
            mine, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for names in (missing_keys, unexpected_keys):
            names[:] = [key if name == bytes_key else name for name in names]

    def _index_problem(self, index: Tensor) -> str:
        """The rule that a loaded index breaks, or nothing."""
        expected = list(self.index.shape)
        if list(index.shape) != expected:
            return f"expected index of shape {expected}, got {list(index.shape)}"
        if index.is_meta:
            return ""
        try:
            validate_index(index, self.in_features, self.pattern)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""
