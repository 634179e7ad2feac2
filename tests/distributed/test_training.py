"""Trainings on several ranks against one process: losses, weights, patterns, answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xmc.config import ConfigError, from_dict

WORKER = Path(__file__).with_name("training_worker.py")
TIMES = ("seconds", "examples_per_second", "peak_memory_bytes")

BAG: dict[str, dict[str, Any]] = {
    "features": {"min_df": 1},
    "encoder": {"dim": 24, "dropout": 0.3},
    "head": {"fan_in": 6},
    "encoder_optimizer": {"lr": 0.02},
    # 360 rows: the last step has 30, in passes of 17 and 13.
    "train": {"epochs": 2, "batch_size": 17, "accumulation": 2, "warmup_steps": 3},
}


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}
    }


@pytest.fixture(scope="module")
def bert(
    tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[..., Path]
) -> dict[str, Any]:
    """A recipe of a two-layer transformer without dropout, whose masks no two layouts share."""
    folder = save_bert(
        tmp_path_factory.mktemp("bert"),
        [*(f"word{n}" for n in range(30)), *(f"noise{n}" for n in range(200))],
        hidden_size=24,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return changed(
        BAG,
        features={"kind": "tokens", "max_length": 16, "min_df": 2},
        encoder={"kind": "transformer", "model": str(folder), "dropout": 0.0, "dim": 512},
        encoder_optimizer={"lr": 0.003},
    )


def whole(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of all ranks put together; those that are on every rank are the same there."""
    tensors = {}
    for name, first in parts[0]["tensors"].items():
        if name in parts[0]["shards"]:
            tensors[name] = torch.cat([part["tensors"][name] for part in parts])
            continue
        tensors[name] = first
        for part in parts[1:]:
            assert torch.equal(part["tensors"][name], first), name
    return tensors


def assert_same_steps(one: dict[str, Any], parts: list[dict[str, Any]], bound: float) -> None:
    """Of float64: equal but for the order of sums. Losses, norms and scores are told in float32."""
    for part in parts:
        for name in ("losses", "norms"):
            assert part[name] == pytest.approx(one[name], rel=1e-6)
        torch.testing.assert_close(part["best"][0], one["best"][0], rtol=1e-6, atol=1e-6)
        assert torch.equal(part["best"][1], one["best"][1])
    tensors = whole(parts)
    assert tensors.keys() == one["tensors"].keys()
    for name, tensor in one["tensors"].items():
        torch.testing.assert_close(tensors[name], tensor, rtol=bound, atol=bound, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "set": {"rewire": {"method": "set", "interval": 2, "end": 1.0, "fraction": 0.3}},
    "rigl, layer between": {
        "rewire": {"method": "rigl", "interval": 2, "end": 1.0, "fraction": 0.3},
        "encoder": {"intermediate": 20, "activation": "relu"},
        "train": {"clip_norm": 0.05},
    },
    "words": {"head": {"bag_fan_in": 4}},
    "groups in an order, a dense part": {
        "head": {"group_size": 2, "order": "random", "dense_share": 0.2}
    },
}


@pytest.mark.parametrize("name", CASES)
def test_steps_on_ranks_are_those_of_one_process(ranks: Any, tiny_data: Path, name: str) -> None:
    """With dropout: ranks drop together what one process drops."""
    case = changed(BAG, **CASES[name])
    (one,) = ranks(1, WORKER, "steps", case, tiny_data, 5)
    for size in (2, 4):
        parts = ranks(size, WORKER, "steps", case, tiny_data, 5)
        assert_same_steps(one, parts, 1e-10)
        for part in parts:  # no rank holds more than its share of the classifier
            for weight in (n for n in part["shards"] if n.endswith("layer.weight")):
                assert len(part["tensors"][weight]) <= -(-len(one["tensors"][weight]) // size) + 1
        assert any("layer.weight" in shard for shard in parts[0]["shards"])


# A norm in float32, by which gradients are clipped, is another sum where they are in parts.
@pytest.mark.parametrize(("kind", "bound"), [("ddp", 1e-10), ("fsdp", 1e-8)])
def test_a_transformer_on_ranks_takes_the_steps_of_one_process(
    ranks: Any, tiny_data: Path, bert: dict[str, Any], kind: str, bound: float
) -> None:
    """Frozen embeddings, a layer in between, and passes of three rows: some ranks have none."""
    case = changed(
        bert,
        encoder={"freeze_layers": 0, "intermediate": 20, "activation": "gelu"},
        train={"data_parallel": kind, "batch_size": 3, "clip_norm": 0.5},
    )
    (one,) = ranks(1, WORKER, "steps", case, tiny_data, 3)
    for size in (2, 4):
        assert_same_steps(one, ranks(size, WORKER, "steps", case, tiny_data, 3), bound)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"encoder": {"lora_rank": 2}},
    "float16": {"encoder": {"autocast": "float16"}},
    "offload": {"encoder_optimizer": {"offload": True}},
    "frozen": {"encoder": {"freeze_layers": 2}},
    "fsdp, recomputed": {"encoder": {"checkpointing": True}, "train": {"data_parallel": "fsdp"}},
    "fsdp, rates by layer": {
        "encoder_optimizer": {"layer_decay": 0.8},
        "train": {"data_parallel": "fsdp"},
    },
    "fsdp, frozen": {"encoder": {"freeze_layers": 2}, "train": {"data_parallel": "fsdp"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_transformer_work_on_ranks(
    ranks: Any, tiny_data: Path, bert: dict[str, Any], name: str
) -> None:
    case = changed(bert, **OPTIONS[name])
    plain = changed(case, train={"data_parallel": "ddp"})
    (one,) = ranks(1, WORKER, "steps", plain, tiny_data, 3, False)
    for part in ranks(2, WORKER, "steps", case, tiny_data, 3, False):
        assert part["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert part["norms"] == pytest.approx(one["norms"], rel=1e-4)


def test_fully_sharded_encoders_hold_a_part_of_weights_and_moments(
    ranks: Any, tiny_data: Path, bert: dict[str, Any]
) -> None:
    (one,) = ranks(1, WORKER, "moments", bert, tiny_data)
    parts = ranks(2, WORKER, "moments", changed(bert, train={"data_parallel": "fsdp"}), tiny_data)
    for name, total in one.items():
        assert sum(part[name] for part in parts) == total
        assert max(part[name] for part in parts) < 0.52 * total


def log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """float32: what Adam makes of a gradient's last bits stays within 1e-3 of a weight's change."""
    mine, theirs = log(one), log(other)
    for a, b in zip(mine, theirs, strict=True):
        assert b.pop("event") == a.pop("event")
        assert b == pytest.approx(a, rel=2e-4)
    a, b = (load_file(run / "model" / "weights.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4, msg=name)


WHOLE = changed(
    BAG,
    rewire={"method": "set", "interval": 4, "end": 1.0},
    auxiliary={"kind": "clusters", "cutoff_epochs": 1, "max_labels": 5},
    train={"checkpoint_every": 4},
)
BEHIND = changed(WHOLE, train={"async_checkpoint": True})


def test_a_run_on_ranks_is_that_of_one_process_also_stopped_and_resumed_on_others(
    ranks: Any, tiny_data: Path, tmp_path: Path
) -> None:
    """Stopped by a signal to one rank alone; checkpoints are written behind the training."""
    ranks(1, WORKER, "train", WHOLE, tiny_data, tmp_path / "one")
    assert (
        ranks(2, WORKER, "train", BEHIND, tiny_data, tmp_path / "two", False, (1, 9))
        == ["stopped by SIGTERM after step 3"] * 2
    )
    assert (
        ranks(3, WORKER, "train", BEHIND, tiny_data, tmp_path / "two", True, (0, 34))
        == ["stopped by SIGTERM after step 12"] * 3
    )
    ranks(1, WORKER, "train", BEHIND, tiny_data, tmp_path / "two", True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    files = [sorted(p.name for p in (tmp_path / n / "model").iterdir()) for n in ("one", "two")]
    assert files[0] == files[1]


DUAL: dict[str, dict[str, Any]] = {
    "features": {"vocabulary": "hashing", "hash_bits": 10},
    "encoder": {"dim": 24, "dropout": 0.3},
    "train": {"objective": "contrastive", "epochs": 2, "batch_size": 40, "select_by": "R@10"},
    "negatives": {"per_document": 1, "pool": 3},
}


def test_a_dual_encoder_on_ranks_is_that_of_one_process(
    ranks: Any, tiny_data: Path, tmp_path: Path
) -> None:
    """Stopped on two ranks, gone on with on three."""
    ranks(1, WORKER, "train", DUAL, tiny_data, tmp_path / "one")
    stop = ((1, 6), "xmc.training.dual_trainer:DualTrainer.run_step")
    said = ranks(2, WORKER, "train", DUAL, tiny_data, tmp_path / "two", False, *stop)
    assert said == ["stopped by SIGTERM after step 6"] * 2
    ranks(3, WORKER, "train", DUAL, tiny_data, tmp_path / "two", True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_of_equal_ranks_repeats_its_bits(
    ranks: Any, runs: ModuleType, tiny_data: Path, tmp_path: Path, bert: dict[str, Any], kind: str
) -> None:
    """With dropout, validation between the epochs, and moments in parts."""
    case = changed(
        bert,
        encoder={"dropout": 0.2},
        train={"data_parallel": kind, "batch_size": 40, "accumulation": 1},
    )
    ranks(2, WORKER, "train", case, tiny_data, tmp_path / "whole")
    for resume, stop in ((False, (0, 12)), (True, None)):
        ranks(2, WORKER, "train", case, tiny_data, tmp_path / "parts", resume, stop)
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    one, other = (tmp_path / name / "model" / "weights.safetensors" for name in ("whole", "parts"))
    runs.assert_same_tensors(one, other)


def test_ranks_evaluate_and_answer_as_one_process(
    ranks: Any, tiny_data: Path, tmp_path: Path
) -> None:
    """A classifier, a dual encoder, and both together; two texts leave a rank without."""
    for name, values in {"run": BAG, "dual": DUAL}.items():
        ranks(1, WORKER, "train", values, tiny_data, tmp_path / name)
    asked = [tmp_path / "run", tmp_path / "dual"], ["word1 word2", "noise3"]
    (alone,) = ranks(1, WORKER, "answer", *asked)
    assert len(alone) == 3
    for part in ranks(3, WORKER, "answer", *asked):
        for (answers, scores), (expected, expected_scores) in zip(part, alone, strict=True):
            assert scores == pytest.approx(expected_scores, rel=1e-6)
            for mine, theirs in zip(answers, expected, strict=True):
                assert [label for label, _ in mine] == [label for label, _ in theirs]
                assert [s for _, s in mine] == pytest.approx([s for _, s in theirs], rel=1e-5)


def test_what_ranks_cannot_do_is_said_once_and_writes_nothing(
    ranks: Any, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limited = changed(BAG, train={"memory_limit": "2GB"})
    said = ranks(2, WORKER, "refused", limited, tiny_data, run)
    assert said[0].startswith("ConfigError: train.memory_limit: finds passes for one process yet")
    assert said[1] == "OtherRankError: rank 0 has failed"
    assert not run.exists()
    run.mkdir()
    (run / "kept").write_text("mine")
    said = ranks(2, WORKER, "refused", BAG, tiny_data, run)
    assert said[0].startswith(f"FileExistsError: {run}: already exists")
    assert said[1] == "OtherRankError: rank 0 has failed"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "train.data_parallel: a bag encoder is whole on every rank"),
        (
            {"encoder": {"kind": "transformer", "model": "x", "lora_rank": 4}},
            'encoder.lora_rank: expected 0 with data_parallel = "fsdp", got 4',
        ),
        (
            {"encoder": {"kind": "transformer", "model": "x", "autocast": "float16"}},
            'encoder.autocast: expected "bfloat16" or "none" with data_parallel = "fsdp"',
        ),
        (
            {
                "encoder": {"kind": "transformer", "model": "x"},
                "encoder_optimizer": {"offload": True},
            },
            'encoder_optimizer.offload: expected false with data_parallel = "fsdp"',
        ),
    ],
)
def test_what_cannot_be_fully_sharded_is_refused(sections: dict[str, Any], message: str) -> None:
    values = {**sections, "train": {"data_parallel": "fsdp"}}
    if sections:
        values["features"] = {"kind": "tokens"}
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        from_dict(values, source="test")
