"""One safetensors file, in blocks, out of tensors of which each rank may hold some rows.

The bytes are those that `safetensors.torch.save_file` writes of the whole tensors in one process,
which would have to hold them all. Rank 0 alone writes and the others send it their rows, so that
ranks need no file system in common and two of them never write to one page of a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.distributed.together import on_rank, together
from xmc.files import publish_file

BLOCK_BYTES = 16 << 20
_Write = Callable[[memoryview], object]
A = TypeVar("A")
T = TypeVar("T")


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    world: World = World.alone(),
    row_shards: Mapping[str, RowShard] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Replace `path` in one rename by a file of whole tensors; it is there when this returns.

    `row_shards` says which rows a tensor has where it is only part of one; of any other rank 0's
    is taken. All ranks call this, with the same names. Sends every sharded tensor to rank 0, which
    holds a block of it at a time. An error on any rank is one on all of them.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    file: BinaryIO | None = None
    with ExitStack() as stack:

        def begin() -> None:
            nonlocal file
            stack.callback(temporary.unlink, missing_ok=True)
            file = stack.enter_context(temporary.open("wb"))

        def finish() -> None:
            assert file is not None
            file.flush()
            publish_file(temporary, path)

        on_rank(0, begin, world)
        write = _nothing if file is None else file.write
        stream_tensors(write, tensors, world, row_shards or {}, block_bytes)
        on_rank(0, finish, world)


def stream_tensors(
    write: _Write,
    tensors: Mapping[str, Tensor],
    world: World,
    row_shards: Mapping[str, RowShard],
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Call `write` on rank 0 with the consecutive bytes of the file, block by block.

    A block has whole rows, at least one. An error on any rank is one on all of them, raised after
    the last block, when none waits for another. Raises ValueError where shards leave a gap.
    """
    parts = _parts(tensors, world, row_shards)
    shapes = {
        name: [row_shards[name].total, *tensor.shape[1:]] if name in parts else list(tensor.shape)
        for name, tensor in tensors.items()
    }
    names, header = _header({name: tensor.dtype for name, tensor in tensors.items()}, shapes)
    errors: list[Exception] = []

    def attempt(work: Callable[[A], T], argument: A) -> T | None:
        """After an error nothing is done, but what other ranks wait for is still sent."""
        try:
            return None if errors else work(argument)
        except Exception as error:
            errors.append(error)
            return None

    if world.rank == 0:
        attempt(write, memoryview(header))
    for name in names:
        rows = _rows_of(tensors[name])
        for rank, num_rows in parts.get(name, [(0, len(rows))]):
            for start, stop, size in _spans(rows, num_rows, block_bytes):
                block = None
                if world.rank == rank:
                    block = attempt(_bytes, rows[start:stop])
                if world.size > 1 and rank > 0 and world.rank in (0, rank):
                    block = _passed(block, size, rank, world)
                if world.rank == 0 and block is not None:
                    attempt(write, block.numpy().data)
    together(lambda: _check(errors), world)


def in_sequence(shards: Sequence[RowShard]) -> list[int]:
    """Which of the shards of a tensor comes first, second, and so on.

    Raises ValueError unless together they are all of its rows, once each.
    """
    order = sorted(range(len(shards)), key=lambda i: (shards[i].start, shards[i].stop))
    total = shards[0].total
    starts = [shards[i].start for i in order]
    stops = [shards[i].stop for i in order]
    if [*starts, total] != [0, *stops] or any(shard.total != total for shard in shards):
        got = ", ".join(f"{shards[i].start}..{shards[i].stop} of {shards[i].total}" for i in order)
        raise ValueError(f"expected rows 0..{total} once each, got {got}")
    return order


def check_rows(tensors: Mapping[str, Tensor], row_shards: Mapping[str, RowShard]) -> None:
    """Raise ValueError where a tensor has not the rows of its shard."""
    for name, shard in row_shards.items():
        if name not in tensors or tensors[name].shape[:1] != (len(shard),):
            got = list(tensors[name].shape) if name in tensors else "no tensor"
            raise ValueError(f"expected {len(shard)} rows of {name} on this rank, got {got}")


def _parts(
    tensors: Mapping[str, Tensor], world: World, row_shards: Mapping[str, RowShard]
) -> dict[str, list[tuple[int, int]]]:
    """Who holds how many rows of each tensor that is in shards: (rank, rows), by first row."""

    def mine() -> dict[str, Any]:
        check_rows(tensors, row_shards)
        return {
            name: [shard.start, shard.stop, shard.total, _kind(tensors[name])]
            for name, shard in row_shards.items()
        }

    ranks = together(mine, world)
    parts: dict[str, list[tuple[int, int]]] = {}
    for name in sorted(set().union(*ranks)):
        kinds = [rank[name][3] if name in rank else "none" for rank in ranks]
        if len(set(kinds)) > 1:
            raise ValueError(f"{name}: expected equal rows on all ranks, got {', '.join(kinds)}")
        shards = [RowShard(*rank[name][:3]) for rank in ranks]
        try:
            parts[name] = [(rank, len(shards[rank])) for rank in in_sequence(shards)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return parts


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape[1:])}"


def _header(
    dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, list[int]]
) -> tuple[list[str], bytes]:
    """The names in the order of their data, and everything that stands before the data."""
    # The library's own order and names of types, from a file without data.
    empty = save({name: torch.empty(0, dtype=dtype) for name, dtype in dtypes.items()})
    records: dict[str, dict[str, Any]] = json.loads(empty[8:])
    end = 0
    for name, record in records.items():
        start = end
        end += dtypes[name].itemsize * torch.Size(shapes[name]).numel()
        record["shape"], record["data_offsets"] = shapes[name], [start, end]
    text = json.dumps(records, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return list(records), len(text).to_bytes(8, "little") + text


def _rows_of(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dim() else tensor.detach().view(1)


def _spans(like: Tensor, num_rows: int, block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Start, stop and bytes of each block of rows like these, the same on every rank."""
    row_bytes = like.element_size() * like.shape[1:].numel()
    per_block = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, num_rows if row_bytes else 0, per_block):
        stop = min(start + per_block, num_rows)
        yield start, stop, (stop - start) * row_bytes


def _bytes(rows: Tensor) -> Tensor:  # [n] uint8 on the host, not copied where they lie there
    return rows.cpu().contiguous().view(-1).view(torch.uint8)


def _passed(block: Tensor | None, size: int, rank: int, world: World) -> Tensor:
    """A block of `rank` on that rank and on rank 0; what stands for one that failed is not used."""
    if world.rank == 0:
        block = torch.empty(size, dtype=torch.uint8)
        dist.recv(block, group_src=rank, group=world.group)
        return block
    block = torch.zeros(size, dtype=torch.uint8) if block is None else block
    dist.send(block, group_dst=0, group=world.group)
    return block


def _check(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]


def _nothing(block: memoryview) -> None:
    """Where another rank writes."""
