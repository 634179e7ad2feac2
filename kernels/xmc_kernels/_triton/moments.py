"""float8 moments of weights: read and written in registers, or rounded in a second pass.

A row's scale follows from its largest number, so that a row is rounded whole: from registers where
a program holds it, otherwise from float32 room [C, F] that `quantize_rows` reads again. Second
moments are square roots that never vanish, see `float8.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmc_kernels._triton.float8 import decode, quantize_launch, store_rows
from xmc_kernels.update import ClassifierState


class Room(NamedTuple):
    """float32 room for new moments of C labels; None where they are rounded in registers."""

    m: Tensor | None = None
    v: Tensor | None = None


@triton.jit
def load_moment(ptr, scale_ptr, place):
    """Numbers of a moment, at a place as `update.apply` has it."""
    offs, _, mask, rows, mask_rows, _ = place
    value = tl.load(ptr + offs, mask=mask, other=0)
    if scale_ptr is not None:
        value = decode(value) * tl.load(scale_ptr + rows, mask=mask_rows, other=0.0)
    return value


@triton.jit
def store_moment(
    value,
    ptr,
    scale_ptr,
    room_ptr,  # None, or float32 room for rows that this is a part of
    place,
    key,
    VANISH: tl.constexpr,
):
    """As it is where there is no scale."""
    offs, offs_room, mask, rows, mask_rows, columns = place
    if scale_ptr is None:
        tl.store(ptr + offs, value, mask=mask)
    elif room_ptr is not None:
        tl.store(room_ptr + offs_room, value, mask=mask)
    else:
        store_rows(ptr + offs, scale_ptr, value, mask, rows, mask_rows, columns, key, VANISH)


def is_narrow(state: ClassifierState) -> bool:
    """Whether there are float8 moments."""
    return state.weight_m_scale is not None


def room_rows(state: ClassifierState) -> int:
    """How many numbers of room a weight needs."""
    return sum(t is not None for t in (state.weight_m_scale, state.weight_v_scale))


def make_room(state: ClassifierState, *shape: int) -> Room:
    """Room of that shape for what is float8, nothing for the rest."""

    def empty(scale: Tensor | None) -> Tensor | None:
        return None if scale is None else torch.empty(shape, device=scale.device)

    return Room(empty(state.weight_m_scale), empty(state.weight_v_scale))


def moment_arguments(state: ClassifierState, room: Room, keys: dict[str, int]) -> dict[str, Any]:
    """What kernels are handed beside m and v, scales of all labels among them."""
    return {
        "m_scale_ptr": state.weight_m_scale,
        "v_scale_ptr": state.weight_v_scale,
        "m_room_ptr": room.m,
        "v_room_ptr": room.v,
        "mean_key": keys["mean_key"],
        "root_key": keys["root_key"],
    }


def round_moments(state: ClassifierState, room: Room, start: int, keys: dict[str, int]) -> None:
    """Labels from `start` on from what the update left in their room [C, F]."""
    for name, value, key in (("m", room.m, "mean_key"), ("v", room.v, "root_key")):
        if value is None:
            continue
        codes = getattr(state, f"weight_{name}").view(torch.uint8)
        scale = getattr(state, f"weight_{name}_scale")
        quantize_launch(value, codes, scale, start, keys[key], vanish=name == "m").run()


def as_bytes(moment: Tensor | None) -> Tensor | None:
    """float8 as the bytes that kernels take, all else as it is."""
    return moment.view(torch.uint8) if moment is not None and moment.itemsize == 1 else moment
