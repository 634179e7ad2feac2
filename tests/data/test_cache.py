"""Cache entries: whole or not there, rebuilt when damaged, renewed when their source changes."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from xmc.config import FeatureConfig
from xmc.data import encoded
from xmc.data.batches import Dataset, load_dataset
from xmc.data.cache import ArrayWriter, CacheWarning, cache_root, load_array, open_entry
from xmc.data.features import fit_features
from xmc.data.formats import DataError, Document, Label, write_folder
from xmc.types import Bag


def make(folder: Path, *, extra: str = "", rows: int = 30) -> Path:
    """Texts whose words are their row's digits; labels are the digits."""
    documents = []
    for row in range(rows):
        digits = [int(digit) for digit in str(row)]
        text = " ".join(f"digit{digit}" for digit in digits)
        documents.append(Document(str(row), text, f"always {extra}", sorted(set(digits))))
    labels = [Label(str(digit), f"label {digit}") for digit in range(10)]
    splits = {"trn": documents, "tst": documents[5:15]}
    write_folder(folder, splits, labels, filters={"tst": np.array([[2, 7], [5, 0]])})
    return folder


def same(first: Dataset, second: Dataset) -> bool:
    one, two = (data.batch(torch.arange(len(data))) for data in (first, second))
    assert isinstance(one.inputs, Bag)
    assert isinstance(two.inputs, Bag)
    return (
        torch.equal(one.inputs.ids, two.inputs.ids)
        and torch.equal(one.inputs.weights, two.inputs.weights)
        and torch.equal(one.inputs.offsets, two.inputs.offsets)
        and torch.equal(one.labels.indices, two.labels.indices)
        and torch.equal(one.labels.indptr, two.labels.indptr)
    )


def test_arrays_are_written_piece_by_piece(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a.npy", np.int32) as writer:
        writer.append([1, 2])
        writer.append(np.empty(0))
        writer.append(np.arange(3))
        assert writer.length == 5
    assert np.load(tmp_path / "a.npy").tolist() == [1, 2, 0, 1, 2]
    tensor = load_array(tmp_path / "a.npy")
    assert tensor.dtype == torch.int32
    tensor[0] = 9  # in memory only
    assert load_array(tmp_path / "a.npy").tolist() == [1, 2, 0, 1, 2]
    with ArrayWriter(tmp_path / "none.npy", np.float32):
        pass
    assert load_array(tmp_path / "none.npy").shape == (0,)


def test_default_root_is_in_the_home_folder() -> None:
    assert cache_root(None) == Path.home() / ".cache" / "xmc"
    assert cache_root("here") == Path("here")


def test_a_second_opening_reads_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    features = fit_features(FeatureConfig(), folder, cache=cache)
    first = load_dataset(folder, "trn", features, cache=cache)
    load_dataset(folder, "tst", features, cache=cache)
    entries = sorted(path.name for path in cache.iterdir())
    assert [name.partition("-")[0] for name in entries] == ["split", "split", "vocabulary"]

    monkeypatch.setattr(encoded, "read_documents", lambda *args, **options: 1 / 0)
    again = fit_features(FeatureConfig(), folder, cache=cache)
    second = load_dataset(folder, "trn", again, cache=cache)
    load_dataset(folder, "tst", again, cache=cache)
    assert same(first, second)
    assert first.key == second.key
    copied = shutil.copytree(folder, tmp_path / "copy")  # content counts, not the place
    load_dataset(copied, "trn", fit_features(FeatureConfig(), copied, cache=cache), cache=cache)
    assert sorted(path.name for path in cache.iterdir()) == entries


@pytest.mark.parametrize(
    "options",
    [{"ngrams": 2}, {"min_df": 1}, {"max_features": 5}, {"vocabulary": "hashing"}],
)
def test_other_options_make_another_entry(tmp_path: Path, options: dict[str, int]) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    keys = set()
    for config in (FeatureConfig(), FeatureConfig(**options)):
        features = fit_features(config, folder, cache=cache)
        keys.add(load_dataset(folder, "trn", features, cache=cache).key)
    assert len(keys) == 2


def test_options_without_effect_share_an_entry(tmp_path: Path) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    keys = set()
    for config in (FeatureConfig(), FeatureConfig(hash_bits=11, max_length=7)):
        features = fit_features(config, folder, cache=cache)
        keys.add(load_dataset(folder, "trn", features, cache=cache).key)
    assert len(keys) == 1
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("changed", ["trn.json.gz", "lbl.json.gz", "filter_labels_train.txt"])
def test_changed_files_are_encoded_anew(tmp_path: Path, changed: str) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    features = fit_features(FeatureConfig(), folder, cache=cache)
    before = load_dataset(folder, "trn", features, cache=cache)
    if changed == "trn.json.gz":
        shutil.copy(make(tmp_path / "new", extra="digit3") / changed, folder / changed)
    elif changed == "lbl.json.gz":
        with gzip.open(folder / changed, "at") as file:
            file.write('{"uid": "new", "title": "new"}\n')
    else:
        (folder / changed).write_text("12 2\n")
    after = load_dataset(folder, "trn", features, cache=cache)
    assert before.key != after.key
    if changed == "lbl.json.gz":
        assert (before.num_labels, after.num_labels) == (10, 11)
    else:
        assert not same(before, after)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("cut", r"expected \d+ bytes in ids\.npy, got 140"),
        ("gone", r"ids\.npy is missing"),
        ("no manifest", r"manifest\.json is missing"),
        ("bad manifest", r"manifest\.json is damaged"),
    ],
)
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str, problem: str) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    features = fit_features(FeatureConfig(), folder, cache=cache)
    shutil.copytree(cache, tmp_path / "good")
    key = load_dataset(folder, "trn", features, cache=cache).key
    if damage == "cut":
        (cache / key / "ids.npy").write_bytes((cache / key / "ids.npy").read_bytes()[:140])
    elif damage == "gone":
        (cache / key / "ids.npy").unlink()
    elif damage == "no manifest":
        (cache / key / "manifest.json").unlink()
    else:
        (cache / key / "manifest.json").write_text("{")
    with pytest.warns(CacheWarning, match=f"{key}: {problem}; computing it again"):
        repaired = load_dataset(folder, "trn", features, cache=cache)
    assert same(repaired, load_dataset(folder, "trn", features, cache=tmp_path / "good"))
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_vocabulary_is_fitted_again(tmp_path: Path) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    features = fit_features(FeatureConfig(), folder, cache=cache)
    path = next(cache.glob("vocabulary-*")) / "vocabulary.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(CacheWarning, match="vocabulary"):
        again = fit_features(FeatureConfig(), folder, cache=cache)
    assert again.digest() == features.digest()
    assert fit_features(FeatureConfig(), folder, cache=cache).digest() == features.digest()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    with gzip.open(folder / "trn.json.gz", "at") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"trn\.json\.gz:31: expected a JSON object"):
        fit_features(FeatureConfig(), folder, cache=cache)
    assert list(cache.iterdir()) == []


def test_a_filter_row_out_of_range_is_found_while_encoding(tmp_path: Path) -> None:
    folder, cache = make(tmp_path / "data"), tmp_path / "cache"
    (folder / "filter_labels_train.txt").write_text("0 0\n30 1\n")
    message = r"train\.txt:2: expected a document index in \[0, 30\), got 30"
    with pytest.raises(DataError, match=message):
        fit_features(FeatureConfig(), folder, cache=cache)


def test_racing_builders_agree(tmp_path: Path) -> None:
    """Several threads find no entry, all build it, one wins and all go on with its files."""
    started = threading.Barrier(4)
    results: list[str] = []

    def build(work: Path) -> None:
        started.wait(timeout=30)
        (work / "value.json").write_text(json.dumps("same"))

    def run() -> None:
        entry = open_entry(tmp_path, "entry", build)
        results.append((entry / "value.json").read_text())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ['"same"'] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
