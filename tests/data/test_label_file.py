"""Files of label strings: read lazily, equal to the list they were written from."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xmc.data.label_file import LabelFile, LabelFileError, write_label_file


def written(folder: Path, labels: list[str]) -> LabelFile:
    write_label_file(iter(labels), folder / "labels.safetensors")
    return LabelFile(folder / "labels.safetensors")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), max_size=600))
def test_labels_come_back(tmp_path_factory: pytest.TempPathFactory, labels: list[str]) -> None:
    # A file may hold what JSON can: a lone surrogate is no character.
    labels = [label.encode("utf-8", "replace").decode() for label in labels]
    read = written(tmp_path_factory.mktemp("labels"), labels)
    assert len(read) == len(labels)
    assert list(read) == labels
    assert read == labels
    assert read != [*labels, "more"]
    assert [read[i] for i in range(len(labels))] == labels
    assert read[3:700:7] == labels[3:700:7]


def test_one_label_costs_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = written(tmp_path, [f"label {i}" for i in range(10_000)])
    sizes = []
    unpack = zlib.decompressobj

    class Counting:
        def __init__(self) -> None:
            self.inner = unpack()

        def decompress(self, data: bytes, most: int) -> bytes:
            sizes.append(len(data))
            return self.inner.decompress(data, most)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    assert read[9_999] == read[-1] == "label 9999"
    assert read[9_984] == "label 9984"
    assert len(sizes) == 1
    with pytest.raises(IndexError, match=r"in \[0, 10000\), got 10000"):
        read[10_000]


def test_damage_is_named(tmp_path: Path) -> None:
    read = written(tmp_path, [f"label {i}" for i in range(1_000)])
    path = read.path
    tensors, metadata = load_file(path), {"labels": "1000", "block": "256"}

    def saved(text: torch.Tensor, ends: torch.Tensor, **values: str) -> LabelFile:
        save_file({"text": text, "ends": ends}, path, metadata=metadata | values)
        return LabelFile(path)

    text, ends = tensors["text"], tensors["ends"]
    flipped = text.clone()
    flipped[int(ends[1]) + 40] ^= 255
    damaged = saved(flipped, ends)
    assert damaged[0] == "label 0"
    with pytest.raises(LabelFileError, match=r"labels\.safetensors: labels from 512 on"):
        damaged[600]
    for bad in (
        lambda: saved(text, ends, labels="2000"),
        lambda: saved(text[:-1], ends),
        lambda: saved(text, ends.flip(0)),
        lambda: saved(text, ends, block="0"),
        lambda: saved(text, ends, labels="many"),
    ):
        with pytest.raises(LabelFileError, match=r"labels\.safetensors"):
            bad()
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(2**27))), dtype=torch.uint8)
    swollen = saved(bomb, torch.tensor([len(bomb)]), labels="5")
    with pytest.raises(LabelFileError, match="more than 67108864 bytes"):
        swollen[0]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(LabelFileError, match="not a file of labels"):
        LabelFile(path)
    with pytest.raises(LabelFileError, match="not a file of labels"):
        LabelFile(tmp_path / "missing")
