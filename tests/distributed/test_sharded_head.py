"""Heads whose labels are divided among ranks against one process with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmc.types import SparseLabels, TopK

WORKER = Path(__file__).with_name("sharded_head_worker.py")

GROUPS = {"fan_in": 6, "group_size": 4}
PATTERN = {"fan_in": 12, "pattern": "4:8", "group_size": 2}
DENSE = {"kind": "dense"}
SET = {"method": "set", "fraction": 0.5, "init": "uniform"}
RIGL = {"method": "rigl", "fraction": 0.5, "moments": "keep"}
LATER = {"method": "rigl", "prune": "threshold", "threshold": 0.1, "init": "uniform"}

CASES: dict[str, dict[str, Any]] = {
    "sgd": {"head": {"fan_in": 6}},
    "momentum": {"head": {"fan_in": 6}, "optimizer": {"kind": "momentum"}, "weighted": True},
    "adamw": {"head": {"fan_in": 6}, "optimizer": {"kind": "adamw", "weight_decay": 0.1}},
    "adagrad": {"head": {"fan_in": 6}, "optimizer": {"kind": "adagrad"}},
    "dense": {"head": DENSE, "optimizer": {"kind": "adamw"}, "weighted": True},
    "hinge": {"head": {"fan_in": 6, "loss": "squared_hinge"}, "weighted": True},
    "set": {"head": {"fan_in": 6}, "optimizer": {"kind": "adamw"}, "rewire": SET},
    "rigl": {"head": {"fan_in": 6}, "optimizer": {"kind": "momentum"}, "rewire": RIGL},
    "groups set": {"num_labels": 52, "head": GROUPS, "rewire": SET},
    "groups rigl": {"num_labels": 52, "head": GROUPS, "rewire": LATER},
    "n:m set": {"head": PATTERN, "optimizer": {"kind": "adamw"}, "rewire": SET},
    "n:m rigl": {"head": PATTERN, "rewire": RIGL, "weighted": True},
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_what_one_process_trains(ranks: Any, name: str, size: int) -> None:
    (alone,) = ranks(1, WORKER, "train", CASES[name])
    many = ranks(size, WORKER, "train", CASES[name])
    check(many, alone, rtol=1e-10, atol=1e-12)


def check(many: list[dict[str, Any]], alone: dict[str, Any], rtol: float, atol: float) -> None:
    for rank in many:
        assert torch.equal(rank["next"], alone["next"])  # what is drawn after the head
        # In float32 whatever the weights are.
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-5, atol=0)
        assert torch.equal(rank["losses"], many[0]["losses"])
        assert rank["reports"] == alone["reports"]
        for best, expected in zip(rank["best"], alone["best"], strict=True):
            torch.testing.assert_close(best[0], expected[0], rtol=1e-5, atol=1e-6)
            assert torch.equal(best[1], expected[1])
        torch.testing.assert_close(rank["chosen"], alone["chosen"], rtol=1e-5, atol=1e-6)
    for number, whole in enumerate(alone["d_reps"]):
        parts = torch.cat([rank["d_reps"][number] for rank in many])
        torch.testing.assert_close(parts, whole, rtol=rtol, atol=atol)
    for name, tensor in joined(many, "fresh").items():
        assert torch.equal(tensor, alone["fresh"][name]), name
    assert joined(many, "state").keys() == alone["state"].keys()
    for name, tensor in joined(many, "state").items():
        whole = alone["state"][name]
        torch.testing.assert_close(tensor, whole, rtol=rtol, atol=atol, msg=lambda m: name + m)
    assert joined(many, "ages").keys() == alone["ages"].keys()
    for name, tensor in joined(many, "ages").items():
        assert torch.equal(tensor, alone["ages"][name]), name


def joined(many: list[dict[str, Any]], which: str) -> dict[str, Tensor]:
    """The whole tensors, after a look at what is said of their parts."""
    tensors = {}
    for name, first in many[0][which].items():
        parts = [rank[which][name] for rank in many]
        shards = [rank["shards"].get(name) for rank in many]
        if shards[0] is None:
            assert all(torch.equal(part, first) for part in parts), name
            tensors[name] = first
            continue
        assert [shard.start for shard in shards] == [0, *(s.stop for s in shards[:-1])]
        assert {shard.total for shard in shards} == {shards[-1].stop}
        assert [len(shard) for shard in shards] == [len(part) for part in parts]
        tensors[name] = torch.cat(parts)
    return tensors
