"""Dual encoders trained by several ranks against one process: losses, weights, mined labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xmc.model import load_model

WORKER = Path(__file__).with_name("dual_ranks_worker.py")
BAG: dict[str, dict[str, Any]] = {
    "features": {"vocabulary": "hashing", "hash_bits": 10},
    "encoder": {"dim": 24, "dropout": 0.3, "intermediate": 12},
    "train": {
        "objective": "contrastive",
        "epochs": 2,
        "batch_size": 17,  # of 360 rows: the last batch has 3
        "warmup_steps": 2,
        "eval_batch_size": 50,
        "clip_norm": 1.0,
    },
    "encoder_optimizer": {"lr": 0.02},
    "negatives": {"per_document": 1, "pool": 3, "start": 1, "every": 1},
}


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}
    }


STILL = {"encoder": {"dropout": 0.0}}
CASES = {
    "bag": changed(BAG, contrastive={"symmetric": True}),
    "separate": changed(BAG, contrastive={"encoders": "separate", "decoupled": True}),
    "chunks": changed(BAG, **STILL, contrastive={"chunk": 3, "symmetric": True}),
}


@pytest.fixture(scope="module")
def bert(
    tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[..., Path]
) -> dict[str, Any]:
    """A recipe of a two-layer transformer without dropout, whose masks no two layouts share."""
    words = ["label", *(str(n) for n in range(30)), *(f"word{n}" for n in range(30))]
    folder = save_bert(
        tmp_path_factory.mktemp("bert"),
        [*words, *(f"noise{n}" for n in range(200))],
        hidden_size=16,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return changed(
        BAG,
        features={"kind": "tokens", "max_length": 24},
        encoder={"kind": "transformer", "model": str(folder), "dropout": 0.0, "dim": 512},
        encoder_optimizer={"lr": 1e-3},
    )


def assert_same(one: dict[str, Any], parts: list[dict[str, Any]], near: dict[str, float]) -> None:
    for part in parts:
        assert part["norms"] == pytest.approx(one["norms"], rel=1e-4)  # summed in float32
        assert part["losses"] == pytest.approx(one["losses"], **_approx(near))
        assert part["scale"] == pytest.approx(one["scale"], **_approx(near))
        assert torch.equal(part["mined"], one["mined"])
        assert torch.equal(part["best"][1], one["best"][1])
        torch.testing.assert_close(part["best"][0], one["best"][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part["candidates"], one["candidates"], rtol=1e-5, atol=1e-6)
        assert part["scores"] == pytest.approx(one["scores"])
        assert part["weights"].keys() == one["weights"].keys()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(part["weights"][name], weight, msg=name, **near)
    embeddings = torch.cat([part["embeddings"] for part in parts])
    torch.testing.assert_close(embeddings, one["embeddings"], rtol=1e-5, atol=1e-6)
    sizes = [len(part["embeddings"]) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def _approx(near: dict[str, float]) -> dict[str, float]:
    return {"rel": near["rtol"], "abs": near["atol"]}


EXACT = {"rtol": 1e-10, "atol": 1e-11}


def test_an_approximate_search_takes_the_best_of_every_shard(ranks: Any, tiny_data: Path) -> None:
    """Of so few labels each shard is one cell, so that none is missed."""
    pytest.importorskip("faiss")
    case = changed(CASES["bag"], contrastive={"symmetric": True, "search": "ann"})
    (one,) = ranks(1, WORKER, "steps", CASES["bag"], tiny_data)
    assert_same(one, ranks(2, WORKER, "steps", case, tiny_data), EXACT)


@pytest.mark.parametrize("name", CASES)
def test_steps_on_ranks_are_those_of_one_process(ranks: Any, tiny_data: Path, name: str) -> None:
    (one,) = ranks(1, WORKER, "steps", CASES[name], tiny_data)
    assert (one["mined"] >= 0).any()
    assert len(one["losses"]) == 8 and len(set(one["losses"])) == 8
    for size in (2, 4):
        assert_same(one, ranks(size, WORKER, "steps", CASES[name], tiny_data), EXACT)


@pytest.mark.parametrize("name", ["tied", "separate", "chunks", "fsdp", "fsdp separate chunks"])
def test_a_transformer_on_ranks_takes_the_steps_of_one_process(
    ranks: Any, tiny_data: Path, bert: dict[str, Any], name: str
) -> None:
    options: dict[str, Any] = {"symmetric": True}
    if "chunks" in name:
        options["chunk"] = 4  # unequal numbers of rows, equal numbers of chunks
    if "separate" in name:
        options["encoders"] = "separate"
    case = changed(bert, contrastive=options)
    (one,) = ranks(1, WORKER, "steps", case, tiny_data)
    if "fsdp" in name:
        case = changed(case, train={"data_parallel": "fsdp"})
    # AdamW divides by the root of squares: where they are about 0, rounding is all there is.
    assert_same(one, ranks(2, WORKER, "steps", case, tiny_data), {"rtol": 1e-7, "atol": 1e-9})


def test_float32_stays_near(ranks: Any, tiny_data: Path) -> None:
    """Rounding of float32, which nine steps of AdamW may enlarge."""
    (one,) = ranks(1, WORKER, "steps", CASES["bag"], tiny_data, torch.float32)
    for part in ranks(2, WORKER, "steps", CASES["bag"], tiny_data, torch.float32):
        assert part["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_a_training_is_resumed_and_saved_as_one_model(
    ranks: Any, tiny_data: Path, tmp_path: Path
) -> None:
    results = ranks(2, WORKER, "train", CASES["bag"], tiny_data, tmp_path)
    assert results[0]["best"] == results[1]["best"]
    assert torch.equal(results[0]["labels"], results[1]["labels"])
    assert [result["rows"] for result in results] == [15, 15]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("validation") == 2
    whole = load_model(tmp_path / "model")  # by one process
    assert whole.retrieval.embeddings.shape == (30, 12)
    (alone,) = ranks(1, WORKER, "train", CASES["bag"], tiny_data, tmp_path / "alone")
    assert alone["best"] == pytest.approx(results[0]["best"], abs=0.03)
