from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xmc.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    save_checkpoint,
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.randn(5, 3),
        "index": torch.arange(15, dtype=torch.int32).view(5, 3).to(torch.uint16),
        "rng": torch.get_rng_state(),
    }


def test_round_trip_is_bitwise(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    state = {"best": {"P@1": 0.1 + 0.2}, "steps": 7}
    path = save_checkpoint(tmp_path, step=7, tensors=tensors, state=state)
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].to(torch.float64), tensor.to(torch.float64))


def test_only_the_newest_are_kept(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for step in (900, 1000, 10_000):
        save_checkpoint(tmp_path, step=step, tensors=tensors, state={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00001000", "step-00010000"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00010000"


def test_a_crash_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_checkpoint(tmp_path, step=1, tensors=tensors, state={})

    def crash(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("xmc.training.checkpoint.write_json", crash)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, step=2, tensors=tensors, state={})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path) == first


def test_truncated_tensors_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, state={})
    file = path / "tensors.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 10)
    with pytest.raises(CheckpointError, match=rf"expected {size} bytes, got {size - 10}"):
        load_checkpoint(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, state={})
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensors.safetensors: checksum differs"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a checkpoint state"),
        ("[]", "not a checkpoint state"),
        (json.dumps({"version": 9, "bytes": 1, "sha256": "", "state": {}}), "expected version 2"),
    ],
)
def test_a_bad_state_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], content: str, message: str
) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, state={})
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"state.json: {message}"):
        load_checkpoint(path)


def test_loading_into_another_shape_is_refused(tensors: dict[str, Tensor]) -> None:
    target = {"weight": torch.zeros(5, 4)}
    with pytest.raises(
        CheckpointError, match=r"model.weight: expected .* \[5, 4\], got .* \[5, 3\]"
    ):
        load_into(target, {f"model.{k}": v for k, v in tensors.items()}, "model.")
    with pytest.raises(CheckpointError, match=r"has no tensor model.bias"):
        load_into({"bias": torch.zeros(5)}, {}, "model.")
