"""Checkpoints that several ranks write and any number of them reads."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmc.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

WORKER = Path(__file__).with_name("sharded_checkpoint_worker.py")

# Groups of two labels that share an index row; ranks with unequal shares, some with none.
SAVED = {1: [0, 6], 2: [0, 1, 6], 4: [0, 1, 1, 5, 6]}
LOADED = {1: [0, 6], 2: [0, 4, 6], 4: [0, 2, 2, 3, 6]}


def bounds(groups: list[int]) -> dict[str, list[int]]:
    labels = [2 * group for group in groups]
    return {"weight": labels, "moments.0": labels, "scale": labels, "index": groups}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.randn(12, 3).bfloat16(),
        "moments.0": torch.randn(12, 3),
        "scale": torch.randn(12),
        "index": torch.arange(18, dtype=torch.int32).view(6, 3),  # uint16 in the ranks
        "encoder": torch.randn(4, 5).t(),
        "step": torch.tensor(7.5, dtype=torch.float64),
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], size: int
) -> None:
    written = ranks(size, WORKER, "save", tmp_path, 7, tensors, bounds(SAVED[size]))
    assert set(written) == {tmp_path / "step-00000007"}
    for readers, groups in LOADED.items():
        for rank, (loaded, state) in enumerate(
            ranks(readers, WORKER, "load", written[0], bounds(groups))
        ):
            assert state == {"steps": 7}
            assert loaded.keys() == tensors.keys()
            for name, tensor in tensors.items():
                rows = bounds(groups).get(name)
                assert_equal(
                    loaded[name], tensor if rows is None else tensor[slice(*rows[rank : rank + 2])]
                )
    alone, _ = load_checkpoint(written[0])  # in a process without ranks
    assert_all_equal(alone, tensors)


def test_every_byte_is_a_tensor_or_json(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    """In particular nothing is pickled, and no tensor is there twice."""
    (path, *_) = ranks(4, WORKER, "save", tmp_path, 7, tensors, bounds(SAVED[4]))
    files = sorted(entry.name for entry in path.iterdir())
    parts = [f"tensors-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert files == ["state.json", *parts]
    json.loads((path / "state.json").read_text())
    num_bytes = 0
    for part in parts:
        content = (path / part).read_bytes()
        (header_bytes,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + header_bytes])
        end = max(entry["data_offsets"][1] for entry in header.values())
        assert len(content) == 8 + header_bytes + end
        assert header.keys() == (tensors.keys() if part == parts[0] else bounds([]).keys())
        num_bytes += end
    assert num_bytes == (sum(t.numel() * t.element_size() for t in tensors.values()) - 2 * 18)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("part", [1, 2, 4])
def test_a_damaged_file_is_named_by_every_rank(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], damage: str, part: int
) -> None:
    (path, *_) = ranks(4, WORKER, "save", tmp_path, 7, tensors, bounds(SAVED[4]))
    file = path / f"tensors-{part:05d}-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
        message = "missing"
    elif damage == "truncated":
        file.write_bytes(content[:-1])
        message = f"expected {len(content)} bytes, got {len(content) - 1}"
    else:
        content[-3] ^= 4
        file.write_bytes(content)
        message = "checksum differs"
    failures = ranks(2, WORKER, "failure_of_load", path, bounds(LOADED[2]))
    checks = (part - 1) % 2  # the rank that reads the whole file
    assert failures[checks].startswith("CheckpointError")
    assert failures[1 - checks].startswith(f"RankError: rank {checks}: ")
    for failure in failures:
        assert f"{file}: {message}" in failure


def test_rows_must_be_those_of_the_model(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    (path, *_) = ranks(2, WORKER, "save", tmp_path, 7, tensors, bounds(SAVED[2]))
    failures = ranks(2, WORKER, "failure_of_load", path, {"weight": [0, 4, 10]})
    for failure in failures:
        assert failure.startswith(f"CheckpointError: {path}: weight: expected 10 rows, got 12")


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 12), (2, 13)])
def test_shards_that_leave_a_gap_are_no_checkpoint(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], start: int, stop: int
) -> None:
    (path, *_) = ranks(2, WORKER, "save", tmp_path, 7, tensors, bounds(SAVED[2]))
    record = json.loads((path / "state.json").read_text())
    record["files"][1]["rows"]["weight"] = {"start": start, "stop": stop, "total": 12}
    (path / "state.json").write_text(json.dumps(record))
    message = r"state.json: not a checkpoint state: expected rows 0..12 once each, got 0..2 of 12"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_tensor_that_is_not_as_said_is_not_saved(
    tmp_path: Path, ranks: Any, tensors: dict[str, Tensor]
) -> None:
    whole = {"weight": [0, 12], "none": [0, 12]}
    with pytest.raises(
        AssertionError, match="expected 12 rows of none on this rank, got no tensor"
    ):
        ranks(1, WORKER, "save", tmp_path, 1, tensors, whole)
    with pytest.raises(AssertionError, match=r"expected 12 rows of index .*, got \[6, 3\]"):
        ranks(1, WORKER, "save", tmp_path, 1, tensors, {"index": [0, 12]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rank", "at"), [(0, "stream_tensors"), (1, "stream_tensors"), (0, "write_json")]
)
def test_an_error_of_one_rank_leaves_the_old_checkpoint(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], rank: int, at: str
) -> None:
    ranks(2, WORKER, "save", tmp_path, 1, tensors, bounds(SAVED[2]))
    failures = ranks(2, WORKER, "failure_of_save", tmp_path, tensors, bounds(SAVED[2]), rank, at)
    assert failures[rank] == "OSError: No space left on device"
    assert failures[1 - rank] == f"RankError: rank {rank}: No space left on device"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_newest_are_kept_and_the_same_step_is_not_written_again(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    for step in (900, 1000, 10_000):
        ranks(2, WORKER, "save", tmp_path, step, tensors, bounds(SAVED[2]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00001000", "step-00010000"]
    before = (tmp_path / "step-00010000").stat()
    ranks(4, WORKER, "save", tmp_path, 10_000, tensors, bounds(SAVED[4]))
    assert (tmp_path / "step-00010000").stat() == before


@pytest.mark.parametrize("size", [1, 2])
def test_the_background_writes_what_was_there_when_it_was_told_to(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], size: int
) -> None:
    tensors = {name: tensors[name] for name in ("weight", "scale", "encoder")}
    cut = {name: bounds(SAVED[size])[name] for name in ("weight", "scale")}
    results = ranks(size, WORKER, "background", tmp_path, tensors, cut)
    assert results == [[False, True]] * size  # the second waited for the first
    for step in (1, 2):
        loaded, state = load_checkpoint(tmp_path / f"step-{step:08d}")
        assert state == {"list": [step]}
        for name, tensor in tensors.items():
            assert_equal(loaded[name], tensor + (step - 1))


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_in_the_background_is_raised_by_the_next_call(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], size: int
) -> None:
    failures = ranks(size, WORKER, "failure_in_background", tmp_path, tensors, bounds(SAVED[size]))
    assert failures[0] == ("OSError: No space left on device", True)
    assert failures[1:] == [("RankError: rank 0: No space left on device", True)] * (size - 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("size", [1, 2])
def test_saving_makes_no_copy(ranks: Any, tmp_path: Path, size: int) -> None:
    peaks = ranks(size, WORKER, "peak_of_save", tmp_path, 4096, 64)  # 1 MB a rank
    assert max(peaks) < 20_000, peaks


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the peak is known")
def test_a_rank_reads_its_rows_alone(ranks: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors={"weight": torch.ones(180_000, 64)}, state={})
    grown = ranks(4, WORKER, "resident_after_load", path, 180_000)
    assert max(grown) < 30_000_000, grown  # a quarter has 11.5 MB, all 46 MB


@pytest.mark.parametrize("behind", [False, True])
def test_a_rank_killed_while_saving_leaves_the_old_checkpoint(
    ranks: Any, tmp_path: Path, tensors: dict[str, Tensor], behind: bool
) -> None:
    with pytest.raises(AssertionError, match="rank 1"):  # its process is gone
        ranks(2, WORKER, "killed", tmp_path, tensors, bounds(SAVED[2]), behind)
    assert (tmp_path / "seen").read_text().startswith("RuntimeError")
    path = latest_checkpoint(tmp_path)
    assert path == tmp_path / "step-00000001"
    loaded, _ = load_checkpoint(path)
    assert_all_equal(loaded, tensors)


def test_what_a_killed_run_left_is_removed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    left = tmp_path / ".step-00000003.unfinished"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half of it")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, step=4, tensors=tensors, state={})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000004"]


def assert_all_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(got[name].int() if name == "index" else got[name], tensor)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got.double(), expected.double())
