"""Fixed fan-in linear layer: each of L labels reads F of the D input features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from xmc.nn.pattern import draw_index_, index_dtype
from xmc_kernels.checks import validate_index
from xmc_kernels.fan_in import fan_in_linear

_TILE = 2**22  # numbers of a dense label tile held at a time


@dataclass(frozen=True)
class FixedFanIn:
    """A sparse matrix [L, D] with exactly F entries in each row.

    `dense[l, index[l // G, k]] = weight[l, k]`: the G labels of a group share an index row.
    """

    weight: Tensor  # [L, F]
    index: Tensor  # [L/G, F] uint16, or int32 where D > 65536; sorted and distinct per row
    in_features: int  # D
    group_size: int = 1  # G

    @property
    def fan_in(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def validate(self) -> None:
        """Raise ValueError or TypeError on the first rule that does not hold."""
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(
                "expected a floating-point weight of shape [L, F], "
                f"got {self.weight.dtype} {list(self.weight.shape)}"
            )
        check_sizes(self.in_features, self.out_features, self.fan_in, self.group_size)
        expected = [self.out_features // self.group_size, self.fan_in]
        if list(self.index.shape) != expected:
            raise ValueError(
                f"expected index of shape {expected} to match weight "
                f"{list(self.weight.shape)} in groups of {self.group_size}, "
                f"got {list(self.index.shape)}"
            )
        validate_index(self.index, self.in_features)

    def to_dense(self) -> Tensor:
        """The matrix as [L, D], in weight's dtype."""
        dense = self.weight.new_zeros(self.out_features, self.in_features)
        return dense.scatter_(1, self._label_index().long(), self.weight)

    @classmethod
    def from_dense(cls, dense: Tensor, fan_in: int, group_size: int = 1) -> FixedFanIn:
        """Keep the `fan_in` entries of largest magnitude in each row of dense [L, D].

        In groups, the inputs with the largest mean magnitude over the group's labels. Ties go to
        the lower input.
        """
        if dense.dim() != 2 or not dense.is_floating_point():
            raise ValueError(
                f"expected a floating-point matrix [L, D], got {dense.dtype} {list(dense.shape)}"
            )
        num_labels, in_features = dense.shape
        check_sizes(in_features, num_labels, fan_in, group_size)
        groups = dense.detach().reshape(-1, group_size, in_features)
        index = torch.empty(
            groups.shape[0], fan_in, dtype=index_dtype(in_features), device=dense.device
        )
        step = max(1, _TILE // (in_features * group_size))
        for start in range(0, groups.shape[0], step):
            score = groups[start : start + step].abs().mean(1)
            order = score.sort(dim=1, descending=True, stable=True).indices
            index[start : start + step] = order[:, :fan_in].sort(dim=1).values.to(index.dtype)
        matrix = cls(dense.new_empty(num_labels, fan_in), index, in_features, group_size)
        torch.gather(dense.detach(), 1, matrix._label_index().long(), out=matrix.weight)
        return matrix

    def to_csr(self) -> scipy.sparse.csr_matrix:
        """The matrix [L, D] for scipy, float32 or float64; zero weights stay stored entries."""
        weight = self.weight.detach().cpu()
        if weight.dtype != torch.float64:
            weight = weight.float()
        columns = self._label_index().cpu().to(torch.int32).flatten()
        indptr = np.arange(self.out_features + 1, dtype=np.int64) * self.fan_in
        return scipy.sparse.csr_matrix(
            (weight.flatten().numpy(), columns.numpy(), indptr),
            shape=(self.out_features, self.in_features),
        )

    def _label_index(self) -> Tensor:
        """Index of every label, [L, F]."""
        if self.group_size == 1:
            return self.index
        repeated = self.index.unsqueeze(1).expand(-1, self.group_size, -1)
        return repeated.reshape(self.out_features, self.fan_in)


class FixedFanInLinear(nn.Module):
    """`nn.Linear` with F inputs per output: `x @ dense(weight, index).T + bias`.

    Takes the place of `nn.Linear(in_features, out_features)` in any model: leading dimensions,
    autocast, `state_dict`, `torch.compile` and DistributedDataParallel work alike. `group_size`
    neighbouring outputs share their inputs. Costs L * F multiply-adds per example and
    L * (F weights + F / G indices) of memory; see `xmc.nn.rewire` for evolving the pattern.

    Under DistributedDataParallel every process gets the pattern of rank 0 when the wrapper is
    made, and again each forward like any buffer; `broadcast_buffers=False` saves that traffic
    where no process rewires, or all rewire with the same seed and step.

    Raises ValueError for sizes that are not positive, fan_in > in_features and a group_size that
    does not divide out_features.
    """

    in_features: int
    out_features: int
    fan_in: int
    group_size: int
    weight: nn.Parameter  # [L, F]
    bias: nn.Parameter | None  # [L]
    # `index` in memory, [L/G, F * itemsize] uint8: neither gloo nor NCCL can send 16-bit integers,
    # and bytes are left alone by casts of the module to another dtype.
    index_bytes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int,
        *,
        group_size: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features, out_features, fan_in, group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.fan_in = fan_in
        self.group_size = group_size
        self.weight = nn.Parameter(torch.empty(out_features, fan_in, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        row_bytes = fan_in * index_dtype(in_features).itemsize
        rows = out_features // group_size
        index_bytes = torch.empty(rows, row_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("index_bytes", index_bytes)
        self.reset_parameters()

    @property
    def index(self) -> Tensor:
        """Inputs of each output, [L/G, F] uint16 or int32 (D > 65536); writes reach the layer."""
        return self.index_bytes.view(index_dtype(self.in_features))

    @property
    def matrix(self) -> FixedFanIn:
        """Weights and pattern, sharing the layer's storage and detached from autograd."""
        return FixedFanIn(self.weight.detach(), self.index, self.in_features, self.group_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new pattern, weights U(-1/sqrt(F), 1/sqrt(F)) and bias 0.

        The pattern is drawn from torch's global CPU generator whatever the device, F distinct
        inputs per row, every subset equally likely.
        """
        if not self.index_bytes.is_meta:
            draw_index_(self.index, self.in_features)
        bound = 1 / math.sqrt(self.fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., L]
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected x of shape [..., {self.in_features}], got {list(x.shape)}")
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # As autocast does for nn.Linear, the output is in the lower precision; the weights
            # are read as they are, so that no cast copy of L * F numbers is made.
            x = x.to(torch.get_autocast_dtype(device))
        flat = x.reshape(-1, self.in_features)
        out = fan_in_linear(flat, self.weight, self.index, self.bias)
        return out.reshape(*x.shape[:-1], self.out_features)

    @classmethod
    def from_dense(cls, linear: nn.Linear, fan_in: int, *, group_size: int = 1) -> FixedFanInLinear:
        """Copy of a dense layer that keeps the `fan_in` largest weights of each output."""
        matrix = FixedFanIn.from_dense(linear.weight.detach(), fan_in, group_size)
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
            bias=bias is not None,
            device="meta",  # nothing is drawn only to be replaced
            dtype=matrix.weight.dtype,
        ).to_empty(device=matrix.weight.device)
        with torch.no_grad():
            layer.weight.copy_(matrix.weight)
            layer.index.copy_(matrix.index)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The dense layer with the same outputs: holds [L, D]."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        ).to(self.weight.dtype)
        linear.weight = nn.Parameter(self.matrix.to_dense())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def to_csr(self) -> scipy.sparse.csr_matrix:
        """Weights as a scipy matrix [L, D]; the bias is not part of it."""
        return self.matrix.to_csr()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"fan_in={self.fan_in}, group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> FixedFanInLinear:
        before = self.index_bytes
        super()._apply(fn, recurse)
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
                index = given.to(index_dtype(self.in_features)).contiguous()
                mine[bytes_key] = index.view(torch.uint8)
        super()._load_from_state_dict(
            mine, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for names in (missing_keys, unexpected_keys):
            names[:] = [key if name == bytes_key else name for name in names]

    def _index_problem(self, index: Tensor) -> str:
        """The rule that a loaded index breaks, or nothing."""
        expected = [self.out_features // self.group_size, self.fan_in]
        if list(index.shape) != expected:
            return f"expected index of shape {expected}, got {list(index.shape)}"
        if index.is_meta:
            return ""
        try:
            validate_index(index, self.in_features)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""


def check_sizes(in_features: int, out_features: int, fan_in: int, group_size: int) -> None:
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
