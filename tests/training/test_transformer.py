"""A transformer fine-tuned end to end through the same recipe, offline, on a tiny random model."""

from __future__ import annotations

import gzip
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import xmc
from xmc.config import Config, load_recipe
from xmc.data.formats import DataError
from xmc.model import build_model, load_model
from xmc.nn.transformer import TransformerEncoder
from xmc.nn.warm_start import model_folder, tokenizer_source
from xmc.training import trainer as trainer_module
from xmc.training.run import prepare_data
from xmc.types import Tokens


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[..., Path]) -> Path:
    """A folder with a two-layer BERT and a word tokenizer, as a user would have downloaded it."""
    words = [*(f"word{n}" for n in range(30)), *(f"noise{n}" for n in range(200))]
    folder = tmp_path_factory.mktemp("bert")
    return save_bert(folder, words, framed=True, hidden_size=32, intermediate_size=64)


BASICS = [
    "features.kind=tokens",
    "features.max_length=16",
    "encoder.kind=transformer",
    "encoder.dropout=0.0",
    "head.fan_in=16",
    "encoder_optimizer.lr=0.003",
    "train.batch_size=16",
    "train.warmup_steps=10",
]


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_a_transformer_learns_and_its_run_stands_alone(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, autocast: str
) -> None:
    source = tmp_path / "bert"
    shutil.copytree(tiny_bert, source)
    overrides = [
        *BASICS,
        f"encoder.model={source}",
        f"encoder.autocast={autocast}",
        "train.epochs=15",
    ]
    run = tmp_path / "run"
    xmc.train("quickstart", data=tiny_data, out=run, overrides=overrides, cache=tmp_path / "cache")
    shutil.rmtree(source)  # the run holds tokenizer, shape and weights
    scores = xmc.evaluate(run, "test", cache=tmp_path / "cache")
    assert scores.values["P@1"] > 0.8
    answers = xmc.Predictor.load(run).predict(["word2 noise5 word2", "word1"], k=1)
    assert [answer[0][0] for answer in answers] == ["label 2", "label 1"]
    model = load_model(run / "model")
    assert model.encoder.out_features == 32


def test_a_missing_transformer_is_named_before_anything_is_written(
    tiny_data: Path, tmp_path: Path
) -> None:
    overrides = [
        "features.kind=tokens",
        "encoder.kind=transformer",
        f"encoder.model={tmp_path}/nowhere",
    ]
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"nowhere: .*folder"):
        xmc.train(
            "quickstart", data=tiny_data, out=out, overrides=overrides, cache=tmp_path / "cache"
        )
    assert not out.exists()


EVERYTHING = [
    *BASICS,
    "features.pad_multiple=8",
    "encoder.dropout=0.1",
    "encoder.autocast=float16",
    "encoder.checkpointing=true",
    "encoder.freeze_layers=0",
    "encoder.lora_rank=4",
    "encoder_optimizer.layer_decay=0.8",
    "encoder_optimizer.weight_decay=0.01",
    "encoder_optimizer.offload=true",
    "rewire.method=rigl",
    "rewire.interval=5",
    "auxiliary.kind=clusters",
    "auxiliary.max_labels=8",
    "auxiliary.cutoff_epochs=2",
    "train.batch_size=15",
    "train.accumulation=2",
    "train.max_tokens=256",
    "train.length_pool=4",
    "train.clip_norm=1.0",
    "train.checkpoint_every=4",
    "train.epochs=3",
]


def train_everything(bert: Path, data: Path, folder: Path, *, resume: bool = False) -> Path:
    run, overrides = folder / "run", [*EVERYTHING, f"encoder.model={bert}"]
    cache = folder.parent / "cache"
    xmc.train("quickstart", data=data, out=run, overrides=overrides, cache=cache, resume=resume)
    return run


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with a scale whose gradients float16 cannot hold."""
    make = trainer_module.make_scaler

    def make_scaler(*args: Any) -> torch.amp.GradScaler:
        scaler = make(*args)
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**30})
        return scaler

    monkeypatch.setattr(trainer_module, "make_scaler", make_scaler)


@pytest.mark.usefixtures("overflowing")
def test_all_options_together_train_resume_and_answer(
    runs: ModuleType,
    tiny_bert: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float16 with skipped steps, adapters, checkpointing, buckets, clipping, rigl, clusters."""
    whole = train_everything(tiny_bert, tiny_data, tmp_path / "whole")
    start = partial(train_everything, tiny_bert, tiny_data, tmp_path / "parts")
    parts = runs.stop_and_resume(start, [11, 90])  # while the scale still falls; much later
    runs.assert_same_run(whole, parts)
    steps = runs.events(whole, "step")
    assert steps[0]["overflows"] > 3
    assert steps[-1]["overflows"] < 15 < steps[-1]["step"]
    assert steps[-1]["loss"] < steps[0]["main_loss"]

    # The saved model is plain: without peft, and with the numbers of the trained one.
    assert runs.checkpoints(parts)[-1].name == "step-00000036"
    tensors = runs.newest(parts)
    assert any("lora_A" in name for name in tensors)
    saved = load_file(parts / "model" / "weights.safetensors")
    assert not [name for name in saved if "lora" in name or "base_layer" in name]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        scores = xmc.evaluate(parts, "test", cache=tmp_path / "cache")
        answers = xmc.Predictor.load(parts).predict(["word1 noise3", "word2"], k=3)
    assert 0 < scores.values["P@1"] <= 1
    assert [len(answer) for answer in answers] == [3, 3]


def recipe(*overrides: str) -> Config:
    return load_recipe("quickstart", [*BASICS, *overrides])


def test_adapters_learn_and_the_best_epoch_is_merged(
    runs: ModuleType, tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Scores of the last checkpoint with its adapters equal those of the saved model."""
    overrides = [
        *BASICS,
        f"encoder.model={tiny_bert}",
        "encoder.lora_rank=8",
        "encoder_optimizer.lr=0.01",
        "train.epochs=10",
        "train.validation=0.0",
    ]
    run, cache = tmp_path / "run", tmp_path / "cache"
    merged = xmc.train("quickstart", data=tiny_data, out=run, overrides=overrides, cache=cache)
    assert xmc.evaluate(run, "test", cache=cache).values["P@1"] > 0.7
    options = load_recipe("quickstart", overrides)
    features, train_set, _ = prepare_data(options, tiny_data, cache)
    adapted = build_model(options, features, [str(n) for n in range(30)])
    tensors = runs.newest(run)
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    adapted.load_state_dict(state)
    inputs = train_set.batch(torch.arange(20)).inputs
    expected, found = adapted.topk(inputs, 5), merged.topk(inputs, 5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.labels, expected.labels)


def test_a_run_lends_its_encoder_and_tokenizer_to_another(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    overrides = [*BASICS, f"encoder.model={tiny_bert}", "train.epochs=1"]
    first = tmp_path / "first"
    trained = xmc.train("quickstart", data=tiny_data, out=first, overrides=overrides, cache=cache)
    for source in (first, first / "model"):
        options = recipe(f"encoder.model={source}")
        features, train_set, _ = prepare_data(options, tiny_data, cache)
        model = build_model(options, features, [str(n) for n in range(30)])
        inputs = train_set.batch(torch.arange(9)).inputs
        assert isinstance(inputs, Tokens)
        with torch.no_grad():
            found, expected = model.eval().encoder(inputs), trained.encoder(inputs)
        assert torch.equal(found, expected)
        assert features.digest() == trained.features.digest()
    with torch.no_grad():
        fresh = TransformerEncoder(str(tiny_bert)).eval()(inputs)
    assert not torch.allclose(fresh, expected, atol=1e-3)

    weights = first / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"weights\.safetensors: not the weights of this encoder: "
    ):
        build_model(options, features, ["a"])
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors: missing"):
        build_model(options, features, ["a"])


def test_where_a_transformer_comes_from(tmp_path: Path) -> None:
    assert model_folder(tmp_path) is None
    assert tokenizer_source("someone/bert") == "someone/bert"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    message = f"^{tmp_path}/model: expected the model of a transformer, got a bag's$"
    for source in (tmp_path, tmp_path / "model"):
        with pytest.raises(ValueError, match=message):
            model_folder(source)
    with pytest.raises(DataError, match="expected a folder or hub name with a tokenizer"):
        prepare_data(recipe(f"encoder.model={tmp_path}/nowhere"), tmp_path, tmp_path)


def test_a_dual_encoder_of_transformers_lends_its_encoder(
    runs: ModuleType, tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Titles of one word each, told from others in chunks of 24; then a classifier's start."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    titles = "".join(f'{{"uid": "{n}", "title": "noise{170 + n}"}}\n' for n in range(30))
    (data / "lbl.json.gz").write_bytes(gzip.compress(titles.encode()))
    tokens = [*BASICS[:4], f"encoder.model={tiny_bert}", "features.pad_multiple=4"]
    overrides = [
        *tokens,
        "train.batch_size=80",
        "train.epochs=8",
        "encoder_optimizer.lr=0.003",
        "contrastive.chunk=24",
        "contrastive.encoders=separate",
        "encoder.autocast=bfloat16",
    ]
    recipe = load_recipe("quickstart_dual", overrides)
    run = runs.train(recipe, data, tmp_path)
    found = [event["R@10"] for event in runs.events(run, "validation")]
    assert max(found) > 0.6 > 10 / 30  # of chance
    model = load_model(run / "model")
    assert model.retrieval.label_tower is not None
    answer = xmc.Predictor.load(run).predict(["word2 word2"], k=30)[0]
    assert len({label for label, _ in answer}) == 30
    # Its documents' encoder is where a classifier starts.
    options = load_recipe("quickstart", [*tokens[:4], "head.fan_in=16", f"encoder.model={run}"])
    features, train_set, _ = prepare_data(options, data, None)
    classifier = build_model(
        options, features, model.labels, label_shares=train_set.label_frequencies() / 1000
    )
    mine, theirs = classifier.encoder.state_dict(), model.encoder.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
