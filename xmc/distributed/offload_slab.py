"""Optimizer state of parameters of one kind, flat in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmc.distributed.host_memory import host_zeros
from xmc.distributed.offload_buckets import Layout, lay_out

HALF = (torch.float16, torch.bfloat16)
"""Dtypes of parameters that have masters in float32."""


@dataclass(frozen=True)
class Slab:
    """Where the state of parameters of one dtype on one device lies, and in which buckets."""

    parameters: list[Tensor]
    layout: Layout
    rows: dict[str, Tensor]
    """exp_avg, exp_avg_sq and, of 16-bit parameters, master: [N] each."""

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.parameters[0].device

    @property
    def has_masters(self) -> bool:
        return "master" in self.rows


def make_slab(
    parameters: list[Tensor], states: dict[Tensor, dict[str, Tensor]], bucket_size: int
) -> Slab:
    """Host memory for the state of parameters of one kind.

    Whatever `states` holds of it moves there and becomes views; moments start at 0 and masters as
    copies of the parameters.
    """
    first = parameters[0]
    layout = lay_out([p.numel() for p in parameters], bucket_size)
    rows = {
        name: host_zeros(layout.length, master_dtype(first), first.device)
        for name in row_names(first)
    }
    for parameter, start in zip(parameters, layout.starts, strict=True):
        old = states.get(parameter, {})
        state = {"step": old.get("step", torch.zeros(()))}
        for name, row in rows.items():
            place = row[start : start + parameter.numel()].view(parameter.shape)
            if name in old:
                place.copy_(old[name])
            elif name == "master":
                place.copy_(parameter)
            state[name] = place
        states[parameter] = state
    return Slab(parameters, layout, rows)


def by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters of one device and dtype together, in order."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(kinds.values())


def row_names(parameter: Tensor) -> tuple[str, ...]:
    """What is remembered of each number of a parameter."""
    names = ("exp_avg", "exp_avg_sq")
    return (*names, "master") if parameter.dtype in HALF else names


def master_dtype(parameter: Tensor) -> torch.dtype:
    """In which a parameter is stepped."""
    return torch.float32 if parameter.dtype in HALF else parameter.dtype


def is_staged(device: torch.device) -> bool:
    """Whether state has to be copied to be computed on."""
    return device.type != "cpu"


def host_state(parameter: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
    """State as a slab takes it, from what this optimizer or another AdamW saved.

    A master that was kept in 16 bits is left out. Raises ValueError for what does not fit.
    """
    dtype = master_dtype(parameter)
    needed = ("step", "exp_avg", "exp_avg_sq")
    if not all(name in saved for name in needed):
        raise ValueError(f"expected a state with {', '.join(needed)}, got {', '.join(saved)}")
    state = {"step": torch.as_tensor(saved["step"], dtype=torch.float32).cpu().clone()}
    for name in row_names(parameter):
        if name == "master" and (name not in saved or saved[name].dtype != dtype):
            continue
        value = saved[name]
        if value.shape != parameter.shape:
            raise ValueError(
                f"expected {name} of shape {list(parameter.shape)}, got {list(value.shape)}"
            )
        state[name] = value.detach().to("cpu", dtype)
    return state
