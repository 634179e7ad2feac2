"""Gradients summed over ranks, once a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmc.distributed.collectives import World

_BUCKET_BYTES = 25 << 20


def sum_gradients_(
    parameters: Iterable[nn.Parameter], world: World, *, bucket_bytes: int = _BUCKET_BYTES
) -> None:
    """`p.grad = sum of p.grad over the ranks` for each parameter, the same ones on every rank.

    A parameter without a gradient on all ranks keeps none; where some rank has one, the others
    count as zero. Sends one byte a parameter, then the gradients once, in buckets of one dtype
    and about `bucket_bytes` that are under way two at a time: holds two of them.

    Raises ValueError for a sparse gradient.
    """
    if world.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    has_grad = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
    has_grad = has_grad.to(trained[0].device)
    dist.all_reduce(has_grad, op=dist.ReduceOp.MAX, group=world.group)
    used = [p for p, is_used in zip(trained, has_grad.tolist(), strict=True) if is_used]
    sum_in_buckets_([_dense_grad(p) for p in used], world, bucket_bytes=bucket_bytes)


def sum_in_buckets_(
    tensors: Sequence[Tensor], world: World, *, bucket_bytes: int = _BUCKET_BYTES
) -> None:
    """The sum over ranks of each tensor, in place; the same shapes and dtypes on every rank.

    Sends them once, in buckets of one dtype and about `bucket_bytes`; holds two of them.
    """
    under_way = None
    for grads in _buckets(tensors, bucket_bytes):
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        work = dist.all_reduce(flat, group=world.group, async_op=True)
        if under_way is not None:
            _finish_(*under_way)
        under_way = (work, flat, grads)
    if under_way is not None:
        _finish_(*under_way)


def _finish_(work: dist.Work, flat: Tensor, grads: list[Tensor]) -> None:
    work.wait()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def _buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Consecutive tensors of one dtype and device."""
    buckets: list[list[Tensor]] = []
    room = 0
    for x in tensors:
        last = buckets[-1][0] if buckets else None
        if last is None or room < x.nbytes or (last.dtype, last.device) != (x.dtype, x.device):
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(x)
        room -= x.nbytes
    return buckets


def _dense_grad(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    if p.grad.layout != torch.strided:
        raise ValueError(f"expected dense gradients to sum over replicas, got {p.grad.layout}")
    return p.grad
