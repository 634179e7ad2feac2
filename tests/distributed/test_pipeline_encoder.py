"""Encoder and head trained over a pipeline of stages against one process without a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmc.nn.stages import whole_weights

WORKER = Path(__file__).with_name("pipeline_encoder_worker.py")


def check(results: list[Any], alone: dict[str, Any], stages: int) -> None:
    """Losses on every rank, weights of each replica, the labels of all of them: to rounding.

    Heads return losses in float32.
    """
    last = results[stages - 1 :: stages]
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for start in range(0, len(results), stages):
        replica = results[start : start + stages]
        weights = whole_weights(result["weights"] for result in replica)
        assert weights.keys() == alone["weights"].keys()
        same(weights, alone["weights"])
    if "head" in alone:
        whole = {name: torch.cat([r["head"][name] for r in last]) for name in alone["head"]}
        same(whole, alone["head"])


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("family", "size", "stages"),
    [
        ("bert", 2, 2),
        ("bert", 4, 4),
        ("bert", 4, 2),  # two replicas, each last stage with half of the labels
        ("mpnet", 4, 4),  # a table that all layers read goes along
        ("mpnet", 4, 2),
        ("roberta", 2, 2),
        ("distilbert", 2, 2),
    ],
)
def test_steps_are_those_of_plain_autograd(ranks: Any, family: str, size: int, stages: int) -> None:
    options = {"family": family, "stages": stages, "intermediate": stages == 4}
    (alone,) = ranks(1, WORKER, "train_alone", options)
    results = ranks(size, WORKER, "train", options)
    check(results, alone, stages)
    assert len(set(alone["losses"])) == 3
    assert max(result["most"] for result in results) == stages


@pytest.mark.parametrize(
    "options",
    [
        {"frozen": 1},
        {"frozen": 4},
        {"lora": 2},
        {"layers_again": True},
        {"stage_again": True},
        {"family": "mpnet", "stage_again": True, "layers_again": True},
        {"family": "mpnet", "frozen": 1},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_what_an_encoder_can_do_it_does_in_stages(ranks: Any, options: dict[str, Any]) -> None:
    options = options | {"stages": 2}
    (alone,) = ranks(1, WORKER, "train_alone", options)
    check(ranks(2, WORKER, "train", options), alone, 2)


@pytest.mark.parametrize(("size", "stages"), [(2, 2), (4, 4), (4, 2)])
def test_dropout_is_that_of_the_same_cuts_on_one_rank(ranks: Any, size: int, stages: int) -> None:
    options = {"family": "mpnet", "dropout": 0.2, "layers_again": size == 2}
    (alone,) = ranks(1, WORKER, "train", options)
    check(ranks(size, WORKER, "train", options | {"stages": stages}), alone, stages)
    (without,) = ranks(1, WORKER, "train_alone", options | {"dropout": 0.0})
    assert abs(alone["losses"][0] - without["losses"][0]) > 1e-3


@pytest.mark.parametrize("stages", [2, 4])
def test_contrastive_steps_are_those_of_one_graph(ranks: Any, stages: int) -> None:
    (alone,) = ranks(1, WORKER, "retrieve_alone", {"family": "mpnet"})
    results = ranks(stages, WORKER, "retrieve", {"family": "mpnet", "stages": stages})
    check(results, alone, stages)
