"""A step of AdamW over one slab of offloaded state, bucket by bucket."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from xmc.distributed.offload_buckets import Bucket
from xmc.distributed.offload_slab import Slab, is_staged
from xmc.distributed.offload_stage import walk


def step_slab_(
    slab: Slab,
    grads: dict[Tensor, Tensor],  # flat; parameters without one stand still
    steps: dict[Tensor, int],  # taken before this one
    groups: dict[Tensor, dict[str, Any]],
    *,
    factor: float,
) -> None:
    """Step the parameters, with `factor` times their gradients, and their state."""
    active = [
        bucket
        for bucket in slab.layout.buckets
        if any(slab.parameters[piece.slot] in grads for piece in bucket.pieces)
    ]
    casts = slab.has_masters or factor != 1
    # Read by the fused kernel, which counts up a copy of it.
    counts = torch.tensor([float(steps.get(p, 0)) for p in slab.parameters]).to(slab.device)
    rows = list(slab.rows.values())
    room = torch.empty(
        max((bucket.length for bucket in active), default=0) if casts else 0,
        dtype=rows[0].dtype,
        device=slab.device,
    )
    for bucket, parts in walk(active, rows, slab.device, staged=is_staged(slab.device)):
        pieces = _pieces(slab, bucket, parts, grads, counts)
        if casts:
            _cast_gradients(pieces, room, factor)
        chosen = {id(groups[piece.parameter]): groups[piece.parameter] for piece in pieces}
        for group in chosen.values():
            _adamw([piece for piece in pieces if groups[piece.parameter] is group], group)
        if slab.has_masters:
            targets = [piece.target for piece in pieces]
            torch._foreach_copy_(targets, [piece.master for piece in pieces])


def joint_norm(grads: Iterable[Tensor]) -> float:
    """Of all gradients together; NaN or infinite only if one of them is."""
    grads = list(grads)
    for dtype in (torch.float32, torch.float64):  # squares of large numbers overflow float32
        norms = [
            torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, dtype)).double()
            for grad in grads
        ]
        norm = float(torch.stack([norm.to(norms[0].device) for norm in norms]).norm())
        if math.isfinite(norm):
            break
    return norm


@dataclass
class _Work:
    """A piece of one parameter in the bucket at hand, on the device; tensors are views [n]."""

    parameter: Tensor
    target: Tensor
    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    offset: int


def _pieces(
    slab: Slab,
    bucket: Bucket,
    parts: list[Tensor],
    grads: dict[Tensor, Tensor],
    counts: Tensor,  # [P] float32
) -> list[_Work]:
    """Those of the bucket's pieces that have a gradient."""
    first, last = bucket.pieces[0].slot, bucket.pieces[-1].slot
    steps = counts[first : last + 1].clone().unbind()
    found = []
    for piece in bucket.pieces:
        parameter = slab.parameters[piece.slot]
        if parameter not in grads:
            continue
        span = slice(piece.start, piece.start + piece.length)
        target = parameter.view(-1)[span]
        state = [part[piece.offset : piece.offset + piece.length] for part in parts]
        found.append(
            _Work(
                parameter=parameter,
                target=target,
                master=state[2] if slab.has_masters else target,
                grad=grads[parameter][span],
                exp_avg=state[0],
                exp_avg_sq=state[1],
                step=steps[piece.slot - first],
                offset=piece.offset,
            )
        )
    return found


def _cast_gradients(pieces: list[_Work], room: Tensor, factor: float) -> None:
    """Replace gradients by `factor` times them, in the dtype of the masters."""
    targets = [room[piece.offset : piece.offset + len(piece.grad)] for piece in pieces]
    torch._foreach_copy_(targets, [piece.grad for piece in pieces])
    if factor != 1:
        torch._foreach_mul_(targets, factor)
    for piece, target in zip(pieces, targets, strict=True):
        piece.grad = target


def _adamw(pieces: list[_Work], group: dict[str, Any]) -> None:
    """The arithmetic of torch, in one kernel where it has one."""
    adamw(
        [piece.master for piece in pieces],
        [piece.grad for piece in pieces],
        [piece.exp_avg for piece in pieces],
        [piece.exp_avg_sq for piece in pieces],
        [],
        [piece.step for piece in pieces],
        fused=pieces[0].master.device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
