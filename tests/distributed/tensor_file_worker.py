"""What each rank does in test_tensor_file.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from xmc.config import from_dict
from xmc.data.features import load_features
from xmc.distributed import tensor_file
from xmc.distributed.collectives import World
from xmc.distributed.data_parallel import replicated
from xmc.distributed.sharding import RowShard
from xmc.distributed.tensor_file import save_tensors
from xmc.model import build_model, load_model, save_model, save_weights
from xmc.training.byte_meter import AllocationMeter


def shards_of(bounds: dict[str, list[int]], order: list[int]) -> dict[str, RowShard]:
    """Rank r has the `order[r]`-th shard."""
    turn = order[World.current().rank]
    return {name: RowShard(b[turn], b[turn + 1], b[-1]) for name, b in bounds.items()}


def write(
    path: Path,
    tensors: dict[str, Tensor],
    bounds: dict[str, list[int]],
    order: list[int],
    block_bytes: int,
) -> int:
    """Write this rank's rows of whole tensors; the most bytes that took."""
    shards = shards_of(bounds, order)
    mine = {
        name: tensor[shards[name].start : shards[name].stop] if name in shards else tensor
        for name, tensor in tensors.items()
    }
    with AllocationMeter() as meter:
        save_tensors(path, mine, world=World.current(), row_shards=shards, block_bytes=block_bytes)
    assert path.is_file()
    return meter.peak


def failure(
    path: Path,
    tensors: dict[str, Tensor],
    bounds: dict[str, list[int]],
    at: str = "",
    rank: int = 0,
) -> str:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    order = list(range(World.current().size))
    with pytest.MonkeyPatch.context() as patch:
        if at and World.current().rank == rank:
            patch.setattr(tensor_file, at, fail)
        with pytest.raises(Exception) as info:
            write(path, tensors, bounds, order, 100)
    return f"{info.type.__name__}: {info.value}"


def overlap(path: Path, tensors: dict[str, Tensor]) -> str:
    """Every rank says that it has all rows."""
    shards = {"weight": RowShard.whole(len(tensors["weight"]))}
    with pytest.raises(Exception) as info:
        save_tensors(path, tensors, world=World.current(), row_shards=shards)
    return f"{info.type.__name__}: {info.value}"


def make_model(sections: dict[str, Any], features: Path, num_labels: int, folder: Path) -> None:
    options = from_dict(sections, source="test")
    torch.manual_seed(1)
    model = build_model(
        options,
        load_features(features, options.features),
        [f"label {number}" for number in range(num_labels)],
        order=torch.arange(num_labels).flip(0),
        label_shares=torch.full((num_labels,), 0.1),
        world=World.current(),
    )
    save_model(model, folder)


def read_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, RowShard]]:
    model = load_model(folder, world=World.current())
    return {name: plain(tensor) for name, tensor in model.weights().items()}, model.row_shards()


def plain(tensor: Tensor) -> Tensor:
    return tensor.int() if tensor.dtype == torch.uint16 else tensor.clone()


def wrong_model(folder: Path) -> str:
    with pytest.raises(Exception) as info:
        read_model(folder)
    return f"{info.type.__name__}: {info.value}"


def divided_encoder(folder: Path) -> None:
    """Save a model whose encoder's parameters are DTensors, in uneven parts."""
    world = World.current()
    torch.manual_seed(2)
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3))
    encoder.world, encoder.row_shards = world, dict  # what `save_weights` asks of a model
    save_weights(cast(Any, replicated(encoder, world, "fsdp")), folder)
