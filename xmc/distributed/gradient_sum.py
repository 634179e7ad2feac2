"""The gradients of replicas, summed once a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmc.distributed.collectives import World


def sum_gradients_(
    parameters: Iterable[nn.Parameter], world: World, *, bucket_bytes: int = 25 << 20
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
    under_way = None
    for bucket in _buckets(used, bucket_bytes):
        grads = [_dense_grad(p) for p in bucket]
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


def _buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype and device."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        last = buckets[-1][0] if buckets else None
        if last is None or room < size or (last.dtype, last.device) != (p.dtype, p.device):
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(p)
        room -= size
    return buckets


def _dense_grad(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    if p.grad.layout != torch.strided:
        raise ValueError(f"expected dense gradients to sum over replicas, got {p.grad.layout}")
    return p.grad
