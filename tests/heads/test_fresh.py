"""Parts of a classifier as they are drawn, against the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from xmc.config import HeadConfig
from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.heads.bag import BagClassifierHead
from xmc.heads.classifier import ClassifierHead
from xmc.heads.fresh import dense_layer, own_labels
from xmc.nn import fan_in, pattern
from xmc.types import LabelShard

D, L = 24, 52

HEADS = {
    "sparse": HeadConfig(fan_in=6),
    "most inputs": HeadConfig(fan_in=20),
    "groups": HeadConfig(fan_in=6, group_size=4),
    "pattern": HeadConfig(fan_in=12, pattern="4:8", group_size=2, weight_dtype="bfloat16"),
    "float8": HeadConfig(fan_in=6, weight_dtype="float8"),
    "dense": HeadConfig(kind="dense"),
    "dense bfloat16": HeadConfig(kind="dense", weight_dtype="bfloat16"),
    "bags": HeadConfig(fan_in=6, bag_fan_in=5),
}


def drawn(config: HeadConfig, world: World) -> tuple[ClassifierHead, Tensor]:
    """A head, and what is drawn after it."""
    torch.manual_seed(3)
    if config.bag_fan_in:
        head: ClassifierHead = BagClassifierHead.from_options(D, 30, L, config, world=world)
    else:
        shares = torch.arange(1, L + 1) / (L + 1)
        head = ClassifierHead.from_config(D, L, config, label_shares=shares, world=world)
    return head, torch.rand(3)


@pytest.mark.parametrize("tile", [2**22, 100, 1])
@pytest.mark.parametrize("name", HEADS)
def test_parts_are_those_of_the_whole_for_any_tile(
    name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern, "_TILE", tile)
    monkeypatch.setattr(fan_in, "_TILE", tile)
    whole, following = drawn(HEADS[name], World.alone())
    parts = [drawn(HEADS[name], World(rank, 3)) for rank in range(3)]
    assert all(torch.equal(after, following) for _, after in parts)
    assert [part.shard.start for part, _ in parts] == [0, *(p.shard.stop for p, _ in parts[:-1])]
    assert parts[-1][0].shard.stop == L
    state = whole.state_dict()
    for key, tensor in state.items():
        joined = torch.cat([part.state_dict()[key].view(torch.uint8) for part, _ in parts])
        assert torch.equal(joined, tensor.view(torch.uint8)), key


@pytest.mark.parametrize("in_features", [1, 7, 24, 768])
def test_a_dense_layer_starts_as_torchs(in_features: int) -> None:
    torch.manual_seed(0)
    truth, following = nn.Linear(in_features, 20), torch.rand(1)
    torch.manual_seed(0)
    layer = dense_layer(in_features, LabelShard(3, 11, 20))
    assert torch.equal(layer.weight, truth.weight[3:11])
    assert torch.equal(layer.bias, truth.bias[3:11])
    assert torch.equal(torch.rand(1), following)


@pytest.mark.parametrize(("num_labels", "size", "group"), [(10, 3, 1), (10, 3, 4), (64, 4, 16)])
def test_labels_are_divided_in_whole_groups(num_labels: int, size: int, group: int) -> None:
    shards = [own_labels(num_labels, World(rank, size), group) for rank in range(size)]
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert shards[-1].stop == num_labels
    assert all(shard.start % group == 0 for shard in shards)
    groups = [-(-len(shard) // group) for shard in shards]
    assert max(groups) - min(groups) <= 1


def test_a_rank_without_labels_is_refused() -> None:
    for world in (World(0, 3), World(2, 3)):
        with pytest.raises(
            ValueError, match=r"expected at least one label for each of 3 ranks, got 2$"
        ):
            own_labels(2, world)
    with pytest.raises(
        ValueError, match=r"expected at least one group of 4 labels for each of 3 ranks, got 2$"
    ):
        own_labels(8, World(0, 3), 4)


def test_rows_of_a_block_that_are_held() -> None:
    shard = RowShard(4, 9, 20)
    assert len(shard) == 5
    for start, stop in ((0, 20), (0, 4), (9, 12), (5, 6), (2, 5), (8, 20), (3, 3)):
        held = [row for row in range(start, stop) if 4 <= row < 9]
        first, last = shard.within(start, stop)
        assert list(range(first, last)) == held
        assert start <= first <= last <= stop
    assert RowShard(8, 12, 20).per(4) == RowShard(2, 3, 5)
