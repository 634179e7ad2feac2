"""One file of tensors from several ranks, and model folders written and read by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmc.config import from_dict
from xmc.distributed.collectives import World
from xmc.distributed.sharding import RowShard
from xmc.distributed.tensor_file import in_sequence, save_tensors
from xmc.training.run import prepare_data

WORKER = Path(__file__).with_name("tensor_file_worker.py")
BOUNDS = {1: [0, 11], 2: [0, 3, 11], 4: [0, 5, 5, 6, 11]}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Every type and shape that a model may have."""
    return {
        "weight": torch.randn(11, 3, 2).bfloat16(),
        "bias": torch.randn(11),
        "none": torch.zeros(11, 0),
        "index": torch.randint(9, (11, 5), dtype=torch.int32),
        "flags": torch.randn(11) > 0,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.randn(7, 5).t(),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        'a "name"\n\x7f \u00e9': torch.ones(3, dtype=torch.uint8),
    }


SHARDED = ("weight", "bias", "none", "index", "flags")


@pytest.mark.parametrize(("size", "order"), [(1, [0]), (2, [0, 1]), (2, [1, 0]), (4, [0, 1, 2, 3])])
@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
def test_ranks_write_the_bytes_of_one_process(
    ranks: Any,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    size: int,
    order: list[int],
    block_bytes: int,
) -> None:
    path, expected = tmp_path / "ranks", tmp_path / "alone"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, expected)
    cut = dict.fromkeys(SHARDED, BOUNDS[size])
    ranks(size, WORKER, "write", path, tensors, cut, order, block_bytes)
    assert path.read_bytes() == expected.read_bytes()


def test_every_type_is_written_as_safetensors_does(tmp_path: Path) -> None:
    names = ["uint16", "int16", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]
    values = {f"{n}.{i}": torch.arange(4 + i).to(getattr(torch, n)) for n in names for i in (0, 1)}
    save_file(values, tmp_path / "theirs")
    save_tensors(tmp_path / "ours", values)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("size", [1, 2])
def test_no_rank_holds_more_than_a_block(ranks: Any, tmp_path: Path, size: int) -> None:
    tensors = {"weight": torch.randn(2000, 64), "table": torch.randn(1000, 64)}  # 512 and 256 kB
    cut = {"weight": [0, 500, 2000] if size == 2 else [0, 2000]}
    arguments = (tmp_path / "file", tensors, cut, list(range(size)), 10_000)
    peaks = ranks(size, WORKER, "write", *arguments)
    assert max(peaks) < 12_000, peaks


@pytest.mark.parametrize(("rank", "at"), [(0, "_bytes"), (1, "_bytes"), (0, "publish_file")])
def test_an_error_of_one_rank_leaves_the_old_file(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], rank: int, at: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    cut = dict.fromkeys(SHARDED, BOUNDS[2])
    failures = ranks(2, WORKER, "failure", path, tensors, cut, at, rank)
    assert failures[rank] == "OSError: No space left on device"
    assert failures[1 - rank] == f"RankError: rank {rank}: No space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_opened_is_an_error_on_every_rank(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "none" / "file"
    failures = ranks(2, WORKER, "failure", path, tensors, dict.fromkeys(SHARDED, BOUNDS[2]))
    assert failures[0].startswith("FileNotFoundError: [Errno 2] No such file or directory")
    assert failures[1].startswith("RankError: rank 0: [Errno 2] No such file or directory")


def test_rows_that_do_not_fit_together_are_refused(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    shards = [RowShard(0, 3, 11), RowShard(4, 11, 11)]
    with pytest.raises(ValueError, match=r"expected rows 0\.\.11 once each, got 0\.\.3 of 11, 4"):
        in_sequence(shards)
    with pytest.raises(ValueError, match=r"expected rows 0\.\.11 once each, got 0\.\.3 of 11, 3"):
        in_sequence([RowShard(0, 3, 11), RowShard(3, 11, 12)])
    assert in_sequence([RowShard(3, 3, 11), RowShard(3, 11, 11), RowShard(0, 3, 11)]) == [2, 0, 1]
    alone = {"weight": RowShard(0, 3, 3)}
    with pytest.raises(ValueError, match=r"expected 3 rows of weight .*, got \[11, 3, 2\]"):
        save_tensors(tmp_path / "file", tensors, world=World.alone(), row_shards=alone)
    message = "ValueError: weight: expected rows 0..11 once each, got 0..11 of 11, 0..11 of 11"
    failures = ranks(2, WORKER, "overlap", tmp_path / "file", tensors)
    assert failures == [message] * 2


MODELS: dict[str, dict[str, Any]] = {
    "groups": {"fan_in": 8, "group_size": 4},
    "pattern": {"fan_in": 4, "pattern": "2:8", "weight_dtype": "bfloat16"},
    "dense": {"kind": "dense"},
    "parts": {"fan_in": 8, "dense_share": 0.2, "group_size": 2, "order": "frequency"},
    "bag": {"fan_in": 8, "bag_fan_in": 4},
}


@pytest.fixture(scope="module")
def features(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    found, _, _ = prepare_data(from_dict(sections({}), source="test"), tiny_data, folder / "cache")
    found.save(folder / "features")
    return folder / "features"


def sections(head: dict[str, Any]) -> dict[str, Any]:
    return {"features": {"min_df": 1}, "encoder": {"dim": 16}, "head": {"fan_in": 8, **head}}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_folder_is_the_same_from_any_number_of_ranks(
    ranks: Any, features: Path, tmp_path: Path, kind: str
) -> None:
    options, num_labels = sections(MODELS[kind]), 30
    for size in (1, 2, 4):
        ranks(size, WORKER, "make_model", options, features, num_labels, tmp_path / f"{size}")
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*"))
    assert Path("weights.safetensors") in files
    for size in (2, 4):
        for file in files:
            assert (tmp_path / f"{size}" / file).read_bytes() == (
                tmp_path / "1" / file
            ).read_bytes()
    whole = load_file(tmp_path / "1" / "weights.safetensors")
    for size in (1, 4):
        for weights, shards in ranks(size, WORKER, "read_model", tmp_path / "2"):
            assert weights.keys() == whole.keys()
            for name, tensor in whole.items():
                expected = tensor.int() if tensor.dtype == torch.uint16 else tensor
                rows = shards.get(name, RowShard.whole(len(expected)))
                assert rows.total == len(expected)
                assert torch.equal(weights[name], expected[rows.start : rows.stop])
            assert size == 1 or any(
                len(shards[name]) < len(whole[name]) for name in shards.keys() & whole.keys()
            )


@pytest.mark.parametrize("size", [2, 4])
def test_a_divided_encoder_is_saved_whole(ranks: Any, tmp_path: Path, size: int) -> None:
    ranks(size, WORKER, "divided_encoder", tmp_path)
    torch.manual_seed(2)
    whole = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3)).state_dict()
    saved = load_file(tmp_path / "weights.safetensors")
    assert saved.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(saved[name], tensor)


def test_a_model_of_other_labels_is_refused(ranks: Any, features: Path, tmp_path: Path) -> None:
    options = sections(MODELS["dense"])
    for num_labels in (30, 28):
        folder = tmp_path / f"{num_labels}"
        ranks(1, WORKER, "make_model", options, features, num_labels, folder)
    path = tmp_path / "30" / "weights.safetensors"
    path.write_bytes((tmp_path / "28" / path.name).read_bytes())
    assert json.loads((tmp_path / "30" / "model.json").read_text())["num_labels"] == 30
    for failure in ranks(2, WORKER, "wrong_model", tmp_path / "30"):
        assert failure.startswith(f"ModelError: {path}: expected 30 rows of head.layer.")
