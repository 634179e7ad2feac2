"""AdamW whose state lives in host memory and visits the device bucket by bucket."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from xmc.distributed.offload_buckets import ALIGNMENT, lay_out
from xmc.distributed.offload_slab import (
    HALF,
    Slab,
    by_kind,
    host_state,
    is_staged,
    make_slab,
    master_dtype,
    row_names,
)
from xmc.distributed.offload_stage import NUM_BUFFERS
from xmc.distributed.offload_step import joint_norm, step_slab_


class OffloadedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` with moments, and float32 masters of 16-bit parameters, on the CPU.

    A device holds a 16-bit parameter in 4 bytes, itself and its gradient, where mixed precision
    with its state on the device takes 16 or more; beside that a step holds two buffers of a bucket
    and one bucket's gradient in float32. State comes in, is stepped on the device and goes home,
    pinned memory and a stream each way, so that copies overlap with each other and with arithmetic.
    That is once a step, however many passes added up its gradient. Parameters on a CPU take the
    same steps without copies. float32 and float64 parameters are their own masters.

    A step is taken whole or not at all. Where a GradScaler found an overflow or, without one, where
    a gradient is not finite, no parameter and no state changes; `overflows` counts such steps. (A
    GradScaler leaves unscaling to the step, so float16 parameters may have float16 gradients; do
    not call its `unscale_` for these, which torch refuses.) That, and `max_norm`, are why a step
    begins when all gradients are there and not, by hooks, while the backward still makes some.

    - `max_norm` clips the joint norm of all gradients, unscaled, as in
      `torch.nn.utils.clip_grad_norm_`, without writing to them; 0 leaves them alone. `last_norm` is
      the norm before clipping, or NaN where a step had no use for it.
    - `bucket_size` is in parameters, rounded down to a multiple of 16. On the device a bucket of
      16-bit parameters takes 28 bytes of each, one of float32 parameters 20.

    State is created when a parameter first has a gradient. From then on the masters decide: after
    loading other weights into the parameters, call `reload_masters`. `state_dict` has AdamW's names
    (step, exp_avg, exp_avg_sq) and `master`; it loads into AdamW, and AdamW's into this. Read state
    through it, as it waits for copies that are on their way.

    Raises ValueError for hyper-parameters out of range, for parameters that are not contiguous or
    of another dtype, and for sparse gradients; TypeError for the sharded parameters of FSDP2, which
    offloads by its own CPUOffloadPolicy.

    After ZeRO-Offload (arXiv 2101.06840), which steps on the CPU instead, and the optimizer of
    AxoNN (arXiv 2110.13005), which walks buckets too, one copy at a time.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    """Set by a GradScaler for the time of a step, like the next."""
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float = 0.0,
        bucket_size: int = 2**22,
    ) -> None:
        if bucket_size < ALIGNMENT:
            raise ValueError(f"expected bucket_size of at least {ALIGNMENT}, got {bucket_size}")
        if not 0 <= max_norm < math.inf:
            raise ValueError(f"expected a finite max_norm of at least 0, got {max_norm}")
        self.max_norm = max_norm
        self.bucket_size = bucket_size // ALIGNMENT * ALIGNMENT
        self.overflows = 0
        self.last_norm = math.nan
        self._slabs: list[Slab] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; the group's state is created when it first has gradients."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, or none where gradients overflowed; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = {p: _flat_gradient(p) for p in self._parameters() if p.grad is not None}
        factor = self._gradient_factor(grads) if grads else None
        if factor is None:
            return loss
        self._place(grads)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        steps = {p: int(self.state[p]["step"]) for p in grads}
        for slab in self._slabs:
            step_slab_(slab, grads, steps, groups, factor=factor)
        for parameter in grads:
            self.state[parameter]["step"] += 1
        return loss

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the parameters as they are for masters, as after loading a model's weights."""
        self._settle()
        placed = self._placed()
        for parameter, state in self.state.items():
            if parameter not in placed:
                state.pop("master", None)  # made by the step that places it
            elif "master" in state:
                state["master"].copy_(parameter)

    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim.AdamW, in float32 on the CPU, with `master` for 16-bit parameters."""
        self._settle()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an OffloadedAdamW or of a torch.optim.AdamW.

        Masters that are missing are made of the parameters when the next step is taken; so are
        those that another optimizer kept in 16 bits. Raises ValueError for an AdamW with amsgrad or
        maximize, which this one lacks, and as torch does where groups differ.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"expected the state of an AdamW without {name}")
        slots = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        saved = state_dict["state"]
        states = {
            parameter: host_state(parameter, saved[slot])
            for slot, parameter in zip(slots, self._parameters(), strict=False)
            if slot in saved
        }
        # From the base class it would come in the parameters' dtype and on their device.
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = ("max_norm", "bucket_size", "overflows", "last_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # State that arrives, here and in load_state_dict, is put into slabs by the next step.
        if "_slabs" in self.__dict__:
            self._settle()
        self._slabs = []
        super().__setstate__(state)

    def device_bytes(self) -> int:
        """Most bytes on the devices during a step: parameters, gradients, buffers."""
        size = sum(p.nbytes * (2 if p.requires_grad else 1) for p in self._parameters())
        buffers = [0]
        for parameters in by_kind(p for p in self._parameters() if p.requires_grad):
            first = parameters[0]
            layout = lay_out([p.numel() for p in parameters], self.bucket_size)
            rows = 1  # of gradient
            if is_staged(first.device):
                rows += len(row_names(first)) * min(NUM_BUFFERS, len(layout.buckets))
            buffers.append(rows * layout.longest * master_dtype(first).itemsize)
        return size + max(buffers)

    def host_bytes(self) -> int:
        """Bytes of state in host memory, once every trained parameter has had a gradient."""
        size = 0
        for parameters in by_kind(p for p in self._parameters() if p.requires_grad):
            layout = lay_out([p.numel() for p in parameters], self.bucket_size)
            width = len(row_names(parameters[0])) * master_dtype(parameters[0]).itemsize
            size += width * layout.length
        return size

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _settle(self) -> None:
        """Wait until all state is home."""
        for device in {slab.device for slab in self._slabs}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _gradient_factor(self, grads: dict[Tensor, Tensor]) -> float | None:
        """What unscales and clips the gradients; None where they overflowed. Waits for them."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = 1.0 if scale is None else float(scale)
        self.last_norm = math.nan
        overflow = found is not None and float(found) != 0
        if not overflow and (found is None or self.max_norm):
            norm = joint_norm(grads.values()) / scale
            overflow = not math.isfinite(norm)
            self.last_norm = norm
        if not overflow:
            clipped = self.max_norm > 0 and self.last_norm > self.max_norm
            return (self.max_norm / self.last_norm if clipped else 1.0) / scale
        if found is None and not self.overflows:
            warnings.warn(
                "gradients are not finite: OffloadedAdamW skips this step, and counts this and "
                "further ones in `overflows`",
                stacklevel=4,
            )
        self.overflows += 1
        return None

    def _placed(self) -> set[Tensor]:
        return set(chain.from_iterable(slab.parameters for slab in self._slabs))

    def _place(self, parameters: Iterable[Tensor]) -> None:
        """Give those that have none yet their place in host memory, and move loaded state there."""
        placed = self._placed()
        for kind in by_kind(p for p in parameters if p not in placed):
            self._slabs.append(make_slab(kind, self.state, self.bucket_size))


def _flat_gradient(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError(
            f"expected dense gradients, got a sparse one of a parameter {list(parameter.shape)}: "
            "xmc.nn.lazy.LazyAdamW takes those"
        )
    return grad.detach().reshape(-1)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"expected {name} of at least 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"expected betas in [0, 1), got {group['betas']}")
    for parameter in group["params"]:
        if hasattr(parameter, "to_local"):  # importing DTensor takes half a second
            raise TypeError(
                "expected plain parameters, got a DTensor: FSDP2 offloads by "
                "fully_shard(offload_policy=CPUOffloadPolicy())"
            )
        if parameter.dtype not in (*HALF, torch.float32, torch.float64):
            raise ValueError(f"expected floating-point parameters, got {parameter.dtype}")
        if not parameter.is_contiguous():
            raise ValueError(
                f"expected contiguous parameters, got strides {parameter.stride()} "
                f"of shape {list(parameter.shape)}"
            )
