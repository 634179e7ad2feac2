"""What goes wrong on one rank of a pipeline ends the others with words that say what it was."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xmc.distributed.collectives import World
from xmc.distributed.pipeline import Pipeline, PipelineError, Place

WORKER = Path(__file__).with_name("pipeline_errors_worker.py")


def test_the_number_of_ranks_is_a_multiple_of_the_stages() -> None:
    with pytest.raises(ValueError, match="multiple of 4 stages, got 6"):
        Place.of(World(0, 6), 4)
    with pytest.raises(ValueError, match="multiple of 2 stages, got 1"):
        Pipeline(nn.Identity(), num_stages=2)
    with pytest.raises(ValueError, match="multiple of 0 stages"):
        Place.of(World(0, 1), 0)


def test_settings_are_above_zero() -> None:
    with pytest.raises(ValueError, match=r"above 0, got 0, 300\.0 and 1"):
        Pipeline(nn.Identity(), num_stages=1, pipeline_limit=0)
    with pytest.raises(ValueError, match=r"above 0, got 1, 300\.0 and 0"):
        Pipeline([], num_stages=1)


def test_ranks_agree_on_their_settings(ranks: Any) -> None:
    texts = ranks(2, WORKER, "settings", [2, 3], [1, 1], 2)
    assert all("same num_stages and pipeline_limit on all ranks, got [[2, 2]" in t for t in texts)
    texts = ranks(2, WORKER, "settings", [2, 2], [1, 3], 1)
    assert all("numbers of cuts in all replicas, got [[1], [3]]" in text for text in texts)


# The rank that fails, what it raises, and what the text says there and on the others.
CASES = [
    (
        "a stage raises",
        1,
        "ValueError",
        "expected courage, got none; in the forward pass of micro-batch 1 with inputs of shapes [",
    ),
    (
        "a stage returns other features",
        1,
        "RuntimeError",
        "in the forward pass of micro-batch 1 with inputs of shapes [2, 2]",
    ),
    (
        "a stage returns a text",
        1,
        "TypeError",
        "expected a tensor or a tuple of tensors from rank 1 (stage 1 of 3), got str",
    ),
    (
        "a stage changes when it is run again",
        0,
        "ValueError",
        "to give [2, 3] again for micro-batch",
    ),
    (
        "the loss raises",
        2,
        "ValueError",
        "expected courage, got none; in the loss of micro-batch 0",
    ),
    (
        "a gradient of another shape",
        2,
        "ValueError",
        "expected a gradient of shape [2, 3] like the output of rank 2 (stage 2 of 3), got [1, 3]",
    ),
    ("two gradients", 2, "ValueError", "expected 1 gradients for the outputs of rank 2"),
    (
        "a loss without gradient",
        2,
        "TypeError",
        "expected (loss, gradients of the outputs) from the loss, got Tensor",
    ),
    ("a loss of many numbers", 2, "ValueError", "expected a loss of one number, got shape [2, 3]"),
    ("no loss", 2, "ValueError", "expected a loss on the last stage, got none"),
    (
        "no micro-batches",
        0,
        "ValueError",
        "expected micro-batches on the first stage, got an empty sequence",
    ),
    ("no inputs", 0, "ValueError", "expected micro-batches on the first stage, got none"),
    (
        "another call",
        1,
        "ValueError",
        "of kind activation or gradient, got evaluation: all stages have to make the same calls",
    ),
]


@pytest.mark.parametrize(("case", "rank", "kind", "text"), CASES, ids=[case[0] for case in CASES])
def test_all_ranks_hear_what_failed_on_one(
    ranks: Any, case: str, rank: int, kind: str, text: str
) -> None:
    results = ranks(3, WORKER, "attempts", case, 3)
    for other, (first, second) in enumerate(results):
        assert first[0] == (kind if other == rank else "PipelineError")
        assert text in first[1]
        if other != rank:
            assert first[1].startswith(f"rank {rank} (stage {rank} of 3) failed: {kind}: ")
        assert second[0] == "PipelineError"
        assert "expected a pipeline that works, this one ended: rank" in second[1]
        assert text in second[1]


def test_a_failure_after_the_others_are_done_ends_their_next_step(ranks: Any) -> None:
    results = ranks(3, WORKER, "attempts", "the last backward pass raises", 3)
    text = "expected courage, got none; in the backward pass of micro-batch 3"
    for rank, (first, second) in enumerate(results):
        assert first[0] == ("ValueError" if rank == 0 else "")
        assert text in (first if rank == 0 else second)[1]
        assert second[0] == "PipelineError"


def test_replicas_of_a_stage_that_failed_end_too(ranks: Any) -> None:
    results = ranks(4, WORKER, "attempts", "a stage raises", 2, 1)
    [(kinds, texts)] = [tuple(zip(*(result[0] for result in results), strict=True))]
    assert kinds == ("PipelineError", "ValueError", "PipelineError", "PipelineError")
    assert "rank 1 (stage 1 of 2, replica 0) failed: ValueError: expected courage" in texts[0]
    assert (
        "the sum over the replicas of stage 0 failed on rank 2 (stage 0 of 2, replica 1)"
        in texts[2]
    )
    assert (
        "the sum over the replicas of stage 1 failed on rank 3 (stage 1 of 2, replica 1)"
        in texts[3]
    )


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("a rank stays away", "expected a message from rank 1 on rank 0 within 1 s, got none"),
        (
            "a rank stays away from a long sweep",
            "expected rank 1 to take a message of rank 0 within 1 s, it did not",
        ),
        (
            "a rank stays away from sums",
            "the sum over the stages failed on rank 0 (stage 0 of 2): ",
        ),
    ],
)
def test_a_rank_that_stays_away_is_waited_for_no_longer_than_said(
    ranks: Any, case: str, text: str
) -> None:
    [(kind, words)] = ranks(2, WORKER, "attempts", case, 2, 1)[0]
    assert kind == "PipelineError"
    assert words.startswith(text)


def test_a_closed_pipeline_makes_no_steps() -> None:
    pipeline = Pipeline(nn.Identity(), num_stages=1)
    pipeline.close()
    with pytest.raises(PipelineError, match="this one ended: it was closed"):
        pipeline.step([], None)


class Returns(nn.Module):
    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, _: torch.Tensor) -> Any:
        return self.outputs


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ([torch.ones(1)] * 9, "expected at most 8 tensors from rank 0 (stage 0 of 1), got 9"),
        ([torch.ones([1] * 9)], "expected tensors of at most 8 dims from rank 0"),
        ([torch.ones(2, dtype=torch.complex64)], "of plain dtypes from rank 0"),
        ([torch.ones(2, 2).to_sparse()], "got torch.float32, torch.sparse_coo"),
    ],
)
def test_stages_return_what_can_be_sent(outputs: list[torch.Tensor], text: str) -> None:
    pipeline = Pipeline(Returns(*outputs), num_stages=1)
    with pytest.raises(ValueError, match=re.escape(text)):
        pipeline.represent([torch.ones(1)])


def test_a_coupled_loss_gives_a_gradient_for_each_micro_batch(ranks: Any) -> None:
    text = "expected gradients of 3 outputs, got 2"
    first, last = ranks(2, WORKER, "coupled", 2)
    assert last == ["ValueError", text]
    assert first == ["PipelineError", f"rank 1 (stage 1 of 2) failed: ValueError: {text}"]


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(WORKER)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "3", str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1, -9]
    for rank in (0, 1):  # one of them hears it from the other
        assert "PipelineError: rank 2 (stage 2 of 3) is gone: " in errors[rank]
