"""Heads whose labels are divided among ranks against one process with all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmc.distributed.sharding import RowShard
from xmc.heads.classifier import ClassifierHead
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import LabelShard, SparseLabels, TopK

WORKER = Path(__file__).with_name("sharded_head_worker.py")

GROUPS = {"fan_in": 6, "group_size": 4}
PATTERN = {"fan_in": 12, "pattern": "4:8", "group_size": 2}
DENSE = {"kind": "dense"}
DENSE_FIRST = {"order": "frequency", "dense_share": 0.2}
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
    "order": {"arranged": True, "head": {"fan_in": 6, "order": "random"}, "weighted": True},
    "order rigl": {"arranged": True, "head": GROUPS | DENSE_FIRST, "rewire": RIGL},
    "order set": {
        "arranged": True,
        "head": GROUPS | DENSE_FIRST,
        "optimizer": {"kind": "adamw"},
        "rewire": LATER | {"method": "set"},
        "weighted": True,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_what_one_process_trains(ranks: Any, name: str) -> None:
    (alone,) = ranks(1, WORKER, "train", CASES[name])
    for size in (2, 4) if "rewire" in CASES[name] else (2,):
        many = ranks(size, WORKER, "train", CASES[name])
        check(many, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shares", [(13, 0), (1, 12), (6, 0, 7, 0), (0, 0, 0, 13)])
def test_rows_may_be_unequal_and_missing(ranks: Any, shares: tuple[int, ...]) -> None:
    for name in ("rigl", "order rigl"):
        (alone,) = ranks(1, WORKER, "train", CASES[name])
        many = ranks(len(shares), WORKER, "train", CASES[name] | {"shares": shares})
        assert [len(rank["d_reps"][0]) for rank in many] == list(shares)
        check(many, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shares", [(7, 6), (0, 13), (4, 3, 3, 3), (13, 0, 0, 0)])
def test_a_head_of_bags_learns_the_same(ranks: Any, shares: tuple[int, ...]) -> None:
    (alone,) = ranks(1, WORKER, "train_bags", None)
    many = ranks(len(shares), WORKER, "train_bags", shares)
    check(many, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bags", [False, True])
def test_a_model_answers_alike_for_any_batch(ranks: Any, size: int, bags: bool) -> None:
    head = {"fan_in": 6, "bag_fan_in": 4} if bags else {"fan_in": 6, "group_size": 4}
    options = {"encoder": {"dim": 16, "intermediate": 12}, "head": head}
    sizes = [13, 3, 1, 0]
    (alone,) = ranks(1, WORKER, "model", options, sizes)
    many = ranks(size, WORKER, "model", options, sizes)
    for name, tensor in joined(many, "weights").items():
        assert torch.equal(tensor, alone["weights"][name]), name
    divided = {name for name in many[0]["shards"] if name in many[0]["weights"]}
    part = "head." if bags else "head.sparse."  # 30 labels in groups of 4
    assert divided == {f"{part}layer.{name}" for name in ("weight", "index", "bias")}
    for rank in many:
        assert torch.equal(rank["next"], alone["next"])
        torch.testing.assert_close(rank["reps"], alone["reps"])
        for best, expected in zip(rank["best"], alone["best"], strict=True):
            torch.testing.assert_close(best[0], expected[0], rtol=1e-5, atol=1e-6)
            assert torch.equal(best[1], expected[1])


@pytest.mark.parametrize("size", [2, 4])
def test_the_auxiliary_head_learns_the_same(ranks: Any, size: int) -> None:
    (alone,) = ranks(1, WORKER, "train_auxiliary")
    check(ranks(size, WORKER, "train_auxiliary"), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "size"),
    [("adamw", 4), ("dense", 2), ("groups rigl", 4), ("n:m set", 2), ("order set", 4)],
)
def test_compiled_in_float32(ranks: Any, name: str, size: int) -> None:
    """Each label is computed alike; sums over labels are rounded otherwise."""
    (alone,) = ranks(1, WORKER, "train", CASES[name] | {"double": False})
    many = ranks(size, WORKER, "train", CASES[name] | {"double": False})
    check(many, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bfloat16", "n:m set"), ("float8", "groups set"), ("bfloat16", "order set")],
)
def test_narrow_weights_are_rounded_by_the_same_noise(ranks: Any, dtype: str, kind: str) -> None:
    case = CASES[kind] | {"double": False}
    case["head"] = case["head"] | {"weight_dtype": dtype}
    case["optimizer"] = {"kind": "adamw", "moments": "float8"}
    (alone,) = ranks(1, WORKER, "train", case)
    check(ranks(2, WORKER, "train", case), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "num_labels", "k"), [(2, 10, 4), (4, 10, 4), (4, 4, 7), (4, 9, 1)]
)
def test_ties_go_to_the_lower_label_and_excluded_ones_to_none(
    ranks: Any, size: int, num_labels: int, k: int
) -> None:
    exclude = SparseLabels.from_lists([[], [2, 5, 8], [1], list(range(9))], num_labels=9)
    exclude = exclude.within(LabelShard(0, min(num_labels, 9), 9))
    exclude = SparseLabels(exclude.indptr, exclude.indices, num_labels)
    scores = (torch.arange(num_labels) % 3).float().expand(4, -1)
    scores = scores.masked_fill(exclude.to_dense().bool(), -torch.inf)
    labels = torch.arange(num_labels).expand(4, -1).masked_fill(scores.isinf(), -1)
    expected = TopK(scores, labels).ranked().resized(k)
    for found, named in ranks(size, WORKER, "tied", num_labels, k, exclude):
        assert torch.equal(found, expected.scores)
        assert torch.equal(named, expected.labels)


def test_fewer_labels_than_ranks_are_refused_everywhere(ranks: Any) -> None:
    message = "expected at least one label for each of 4 ranks, got 3"
    assert ranks(4, WORKER, "problem", 3, {"fan_in": 2}) == [message] * 4
    message = "expected at least one group of 4 labels for each of 4 ranks, got 3"
    assert ranks(4, WORKER, "problem", 12, {"fan_in": 2, "group_size": 4}) == [message] * 4
    assert ranks(4, WORKER, "problem", 4, {"fan_in": 2}) == [""] * 4


def test_a_wrong_label_of_one_rank_is_an_error_on_each(ranks: Any) -> None:
    message = "expected labels in [0, 9), got 0 to 9"
    assert ranks(2, WORKER, "wrong_label") == [message] * 2


def test_a_shard_has_to_be_that_of_the_layer() -> None:
    layer = FixedFanInLinear(8, 5, 3)
    with pytest.raises(
        ValueError, match=r"expected a shard of 5 labels, got LabelShard\(start=0, s"
    ):
        ClassifierHead(layer, shard=LabelShard(0, 6, 9))
    with pytest.raises(
        ValueError, match=r"expected a shard of 5 outputs, got RowShard\(start=0, s"
    ):
        FixedFanInLinear(8, 5, 3, rows=RowShard(0, 6, 9))


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
        torch.testing.assert_close(
            tensor, whole, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name)
        )
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
