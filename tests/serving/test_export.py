"""Exported models: the scores of the numbers they store, small, and refused where damaged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import xmc
from xmc.data.label_file import LabelFile
from xmc.model import load_model
from xmc.model_files import ModelError
from xmc.nn.compressed import CompressedBagEncoder
from xmc_kernels.quantized import dequantize

TEXTS = ["word3 word7 noise1", "word1", "", "nothing that is known", "word29 word28"]
HEADS = {
    "plain": ["head.fan_in=8"],
    "groups": ["head.fan_in=8", "head.group_size=4"],
    "dense tail": ["head.fan_in=8", "head.dense_share=0.2"],
    "words": ["head.fan_in=8", "head.bag_fan_in=6"],
    "dense": ["head.kind=dense"],
    "pattern": ["head.fan_in=8", "head.pattern=4:8"],
}


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run with one of the heads, trained once."""
    folder = tmp_path_factory.mktemp("trained")

    def run(head: str) -> Path:
        out = folder / head.replace(" ", "-")
        if not out.exists():
            options = ["train.epochs=1", "encoder.dim=16", "features.min_df=1", *HEADS[head]]
            cache = folder / "cache"
            xmc.train("quickstart", data=tiny_data, out=out, cache=cache, overrides=options)
        return out

    return run


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_in_float32_the_answers_are_those_of_the_run(
    trained: Callable[[str], Path], head: str, packed: bool, tmp_path: Path
) -> None:
    run = trained(head)
    xmc.export(run, tmp_path / "out", weight_dtype="float32", packed=packed)
    ours = xmc.Predictor.load(tmp_path / "out").predict(TEXTS, k=4)
    assert ours == xmc.Predictor.load(run).predict(TEXTS, k=4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("head", HEADS)
def test_narrow_answers_are_close_and_files_small(
    trained: Callable[[str], Path], head: str, dtype: str, tmp_path: Path
) -> None:
    run = trained(head)
    wide = xmc.export(run, tmp_path / "wide", weight_dtype="float32")
    narrow = xmc.export(run, tmp_path / "out", weight_dtype=dtype)
    ratio = {"bfloat16": 0.51, "int8": 0.51, "int4": 0.4}[dtype]  # rows of 16 and a scale
    assert narrow.bytes["encoder"] <= ratio * wide.bytes["encoder"]
    assert narrow.bytes["classifier"] < wide.bytes["classifier"]
    model, original = load_model(tmp_path / "out"), load_model(run / "model")
    bag = original.features.transform(TEXTS)
    reps, theirs = model.reps(bag), original.reps(bag)
    labels = torch.arange(30).expand(len(TEXTS), -1)
    tolerance = {"bfloat16": 0.02, "int8": 0.02, "int4": 0.3}[dtype]
    ours = model.head.candidate_scores(reps, labels) if head != "dense tail" else None
    if ours is not None:
        expected = original.head.candidate_scores(theirs, labels)
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    # The k best are those of these scores.
    best = model.topk(bag, 5)
    if ours is not None:
        torch.testing.assert_close(best.scores, ours.topk(5).values, rtol=1e-4, atol=1e-5)


def test_the_encoder_sums_the_numbers_it_stores(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    xmc.export(trained("plain"), tmp_path / "out", weight_dtype="int4")
    model = load_model(tmp_path / "out")
    encoder = model.encoder
    assert isinstance(encoder, CompressedBagEncoder)
    assert encoder.scale is not None
    table = dequantize(encoder.table, encoder.scale, 16, torch.float64)
    bag = model.features.transform(TEXTS)
    for row in range(len(TEXTS)):
        part = slice(int(bag.offsets[row]), int(bag.offsets[row + 1]))
        total = bag.weights[part].double() @ table[bag.ids[part]] + encoder.bias.double()
        torch.testing.assert_close(encoder(bag)[row].double(), total.relu(), rtol=1e-5, atol=1e-6)


def test_an_export_is_evaluated_with_the_data_it_is_given(
    trained: Callable[[str], Path],
    tiny_data: Path,
    tmp_path: Path,
    xmc: Callable[..., tuple[int, str, str]],
) -> None:
    run, out = trained("plain"), tmp_path / "out"
    code, text, _ = xmc("export", run, "--out", out, "--weight-dtype", "float32")
    assert code == 0
    assert "classifier" in text
    cache = ("--cache", run.parent / "cache")
    assert xmc("evaluate", run, *cache)[0] == 0
    assert xmc("evaluate", out, "--data", tiny_data, *cache)[0] == 0
    ours, theirs = (
        json.loads((folder / "evaluation-test.json").read_text()) for folder in (out, run)
    )
    assert ours == theirs
    code, _, error = xmc("evaluate", out, *cache)
    assert code == 2
    assert "a model folder does not say what it was trained on: give data" in error
    code, text, _ = xmc("predict", out, "--text", "word3 word3")
    assert (code, "label 3" in text) == (0, True)


def test_what_cannot_be_exported_is_said(
    trained: Callable[[str], Path], tmp_path: Path, xmc: Callable[..., tuple[int, str, str]]
) -> None:
    run, out = trained("plain"), tmp_path / "out"
    for arguments, message in (
        ((run, "--out", run), "already exists"),
        ((run, "--out", out, "--weight-dtype", "int3"), "expected one of float32, bfloat16, int8"),
        ((tmp_path, "--out", out), "no model here"),
    ):
        code, _, error = xmc("export", *arguments)
        assert code == 2
        assert message in error
        assert not out.exists()
    assert xmc("export", run, "--out", out)[0] == 0
    code, _, error = xmc("export", out, "--out", tmp_path / "again")
    assert code == 2
    assert "expected a model as it was trained" in error
    assert list(tmp_path.iterdir()) == [out]


def test_a_model_in_memory_is_exported_and_stays(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(trained("plain") / "model")
    before = model.topk(model.features.transform(TEXTS), 3)
    done = xmc.export(model, tmp_path / "out")
    after = model.topk(model.features.transform(TEXTS), 3)
    assert torch.equal(before.scores, after.scores)
    assert done.total == sum(done.bytes.values())
    assert done.bytes["classifier"] == 30 * (8 + 4 + 4 + 4)  # weights, 4 bits an input, scale, bias


def test_damage_is_named(trained: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    xmc.export(trained("plain"), out)
    weights, record = out / "weights.safetensors", out / "model.json"
    good, text = weights.read_bytes(), record.read_text()

    def message() -> str:
        with pytest.raises(ModelError) as error:
            load_model(out)
        weights.write_bytes(good)
        record.write_text(text)
        return str(error.value)

    flipped = bytearray(good)
    flipped[-7] ^= 4
    weights.write_bytes(flipped)
    assert "weights.safetensors: checksum of head." in message()
    weights.write_bytes(good[:-9])
    assert "weights.safetensors" in message()
    weights.unlink()
    assert "weights.safetensors: missing" in message()
    record.write_text(text.replace('"version": 2', '"version": 3'))
    assert "expected version 1 or 2, got 3" in message()
    record.write_text(text.replace('"int8"', '"int4"'))
    assert "weights.safetensors: not the weights of this model" in message()
    record.write_text(text.replace('"storage"', '"stored"'))
    assert "model.json: not a model description" in message()
    tensors = load_file(weights)
    tensors["head.layer.index"][3] = 255  # edited by hand, and its checksum too
    save_file(tensors, weights)
    sums = json.loads(text)
    from xmc.model_files import checksum

    sums["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    record.write_text(json.dumps(sums))
    assert "head.layer.index" in message()
    (out / "labels.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"labels\.safetensors: not a file of labels"):
        load_model(out)


def test_threads_may_ask_together(trained: Callable[[str], Path], tmp_path: Path) -> None:
    xmc.export(trained("plain"), tmp_path / "out")
    predictor = xmc.Predictor.load(tmp_path / "out")
    assert isinstance(predictor.model.labels, LabelFile)
    expected = predictor.predict(TEXTS)
    answers: list[object] = []

    def ask() -> None:
        answers.extend(predictor.predict(TEXTS) == expected for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 80
