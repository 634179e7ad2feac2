"""An encoder that every rank runs on its own rows, and the sum of its gradients over ranks.

The contract: each rank goes backward from its rows' part of the gradient of one global mean loss,
so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmc.distributed.collectives import World, counts_of, gather_rows
from xmc.distributed.gradient_sum import sum_in_buckets_
from xmc.distributed.sharding import RowShard


def replicated(
    encoder: nn.Module,
    world: World,
    kind: Literal["ddp", "fsdp"] = "ddp",
    *,
    blocks: Sequence[nn.Module] = (),
) -> nn.Module:
    """The module to call in training; its gradients are summed over ranks in its backward pass.

    ddp: a wrapper, all-reduces gradients while the pass goes on. fsdp: the encoder itself, whose
    parameters become DTensors, a part of each on every rank, in place; those of a block are
    gathered when it runs, and of the encoder's others while it runs. One rank, or an encoder
    without anything to train: the encoder as it is.

    A wrapped encoder must see a batch of at least one row on every rank.
    """
    if world.size == 1:
        return encoder
    if kind == "fsdp":
        return _fully_sharded(encoder, world, blocks)
    if not any(p.requires_grad for p in encoder.parameters()):
        return encoder
    # Buffers stay as they are in training. torch 2.13 gave the option another name, and warns.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    wrapper = DistributedDataParallel(encoder, process_group=world.group, **options)
    # A lambda, because torch compares a hook's annotations with types, and ours are strings.
    wrapper.register_comm_hook(world.group, lambda group, bucket: _bucket_sum(group, bucket))
    return wrapper


@torch.no_grad()
def sum_gradients_(parameters: Iterable[Tensor], world: World) -> None:
    """Sum the gradients of parameters over ranks, all ranks with the same result.

    All-reduces the dense gradients in buckets. Of sparse ones, each rank's touched rows go to
    all. A parameter without a gradient must have none on any rank.
    """
    if world.size == 1:
        return
    trained = [p for p in parameters if p.grad is not None]
    for parameter in trained:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = _sparse_sum(parameter.grad, world)
    dense = [p.grad for p in trained if p.grad is not None and not p.grad.is_sparse]
    sum_in_buckets_(dense, world)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its rows of a sharded one, in the same storage."""
    if not _is_sharded(tensor):
        return tensor
    part: Tensor = cast(Any, tensor).to_local()
    return part


def own_rows(tensor: Tensor) -> RowShard | None:
    """Which rows `own_part` gives; None for a tensor that is whole on every rank."""
    if not _is_sharded(tensor):
        return None
    total, mesh = tensor.shape[0], cast(Any, tensor).device_mesh
    most = -(-total // mesh.size())  # as torch.chunk divides, the last ranks may hold less
    start = min(total, most * mesh.get_local_rank())
    return RowShard(start, min(total, start + most), total)


def _is_sharded(tensor: Tensor) -> bool:
    # Not isinstance: to import DTensor takes a second, and 30 MB that a rank alone never needs.
    return hasattr(tensor, "device_mesh")


def _sparse_sum(grad: Tensor, world: World) -> Tensor:
    """The sum of gradients that are sparse in their rows, each row held once, ascending."""
    counts = counts_of(grad._indices().shape[1], world)
    rows = gather_rows(grad._indices()[0], counts, world)
    values = gather_rows(grad._values(), counts, world)
    touched, place = rows.unique(return_inverse=True)
    total = values.new_zeros(len(touched), *values.shape[1:]).index_add_(0, place, values)
    return torch.sparse_coo_tensor(
        touched[None], total, grad.shape, is_coalesced=True, check_invariants=False
    )


def _bucket_sum(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    future = work.get_future()
    return future.then(lambda done: done.value()[0])


def _fully_sharded(encoder: nn.Module, world: World, blocks: Sequence[nn.Module]) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device = next(encoder.parameters()).device
    group: Any = world.group or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, device.type)
    for module in (*blocks, encoder):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum that also scales
    return encoder
