"""The shipped recipes: the published settings, and a dry run of each on data of its shape."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xmc
from xmc.config import Config, load_recipe, shipped_recipes
from xmc.data.batches import BagStore
from xmc.data.synthetic import make_synthetic
from xmc.training.log import read_log

# Of arXiv 2411.03171, in the order of `row` below; None: not used.
BERT = "google-bert/bert-base-uncased"
DISTILBERT = "sentence-transformers/msmarco-distilbert-base-v4"
DISTILROBERTA = "sentence-transformers/paraphrase-distilroberta-base-v2"
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "wiki10_31k": (
        *(BERT, "mean", 128, 32, 1, 0.6, 4096, 64, "threshold", 0.01, 300, None),
        *("squared_hinge", 1e-5, 0.01, "adamw", 0.01, 100, 1000, False),
    ),
    "wiki_500k": (
        *(BERT, "mean", 128, 128, 1, 0.5, 0, 128, "threshold", 0.05, 600, (8, 0.4)),
        *("squared_hinge", 5e-5, 0.01, "adamw", 0.05, 50, 1000, False),
    ),
    "amazon_670k": (
        *(BERT, "cls", 128, 64, 1, 0.6, 0, 128, "threshold", 0.01, 800, (15, 0.4)),
        *("squared_hinge", 1e-5, 0.01, "adamw", 0.01, 110, 1000, False),
    ),
    "amazon_3m": (
        *(BERT, "cls", 128, 128, 2, 0.35, 0, 128, "fraction", 0.25, 1500, None),
        *("squared_hinge", 5e-5, 0.01, "adamw", 0.05, 51, 10000, False),
    ),
    "lf_amazontitles_131k": (
        *(DISTILBERT, "mean", 32, 512, 1, 0.7, 0, 128, "fraction", 0.15, 1000, (12, 0.4)),
        *("bce", 1e-5, 0.01, "momentum", 0.08, 100, 5000, True),
    ),
    "lf_wikiseealso_320k": (
        *(DISTILROBERTA, "mean", 32, 128, 1, 0.55, 0, 128, "threshold", 0.02, 800, None),
        *("squared_hinge", 2e-4, 1e-3, "adamw", 0.01, 101, 5000, True),
    ),
}
LABELS = {  # a thousandth of the set's
    "wiki10_31k": 31,
    "wiki_500k": 501,
    "amazon_670k": 670,
    "amazon_3m": 2812,
    "lf_amazontitles_131k": 131,
    "lf_wikiseealso_320k": 312,
}
ROWS, WORDS, HIDDEN = 120, 300, 32


def row(config: Config) -> tuple[Any, ...]:
    """The settings of a recipe that the paper gives."""
    auxiliary, rewire = config.auxiliary, config.rewire
    clusters = (auxiliary.cutoff_epochs, auxiliary.scale)
    return (
        config.encoder.model,
        config.encoder.pooling,
        config.features.max_length,
        config.train.batch_size,
        config.train.accumulation,
        config.encoder.dropout,
        config.encoder.intermediate,
        config.head.fan_in,
        rewire.prune,
        rewire.fraction if rewire.prune == "fraction" else rewire.threshold,
        rewire.interval,
        clusters if auxiliary.kind == "clusters" else None,
        config.head.loss,
        config.encoder_optimizer.lr,
        config.encoder_optimizer.weight_decay,
        config.classifier_optimizer.kind,
        config.classifier_optimizer.lr,
        config.train.epochs,
        config.train.warmup_steps,
        config.train.label_texts,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_settings(name: str) -> None:
    config = load_recipe(name)
    assert row(config) == PUBLISHED[name]
    assert config.head.kind == "sparse"
    assert config.rewire.method == "set"
    assert config.classifier_optimizer.weight_decay == 1e-4
    assert config.classifier_optimizer.momentum == 0.9
    assert config.auxiliary.lr == 5e-4
    assert config.train.seed == 42
    assert config.train.patience == 0


def test_every_shipped_recipe_is_valid_and_says_what_it_is() -> None:
    root = Path(__file__).resolve().parents[1] / "scripts" / "recipes"
    names = shipped_recipes()
    assert set(PUBLISHED) < set(names)
    for name in names:
        load_recipe(name)
        first = (root / f"{name}.toml").read_text("ascii").splitlines()[0]
        assert first.startswith("# "), name


def test_the_recipe_of_tags_is_that_of_eurlex() -> None:
    ours = load_recipe("stackexchange_tags_bag", ["features.min_df=5"])
    assert ours == load_recipe("eurlex57k_bag")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[..., Path]) -> Path:
    """A folder with a one-layer BERT of random weights that knows the words w0, w1, ..."""
    return save_bert(
        tmp_path_factory.mktemp("bert"),
        (f"w{n}" for n in range(WORDS)),
        framed=True,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=128,
    )


def write_data(folder: Path, num_labels: int) -> Path:
    """A canonical folder of synthetic rows, their features spelt out as words."""
    folder.mkdir()
    data = make_synthetic(ROWS, num_labels, WORDS, seed=1)
    store, labels = data.features, data.labels
    assert isinstance(store, BagStore)
    with gzip.open(folder / "lbl.json.gz", "wt", encoding="utf-8") as file:
        for label in range(num_labels):
            title = f"w{label % WORDS} w{(7 * label + 1) % WORDS}"
            file.write(json.dumps({"uid": str(label), "title": title}) + "\n")
    with gzip.open(folder / "trn.json.gz", "wt", encoding="utf-8") as file:
        for number in range(ROWS):
            ids = store.ids[store.indptr[number] : store.indptr[number + 1]].tolist()
            positives = labels.indices[labels.indptr[number] : labels.indptr[number + 1]]
            document = {
                "title": " ".join(f"w{word}" for word in ids),
                "target_ind": positives.tolist(),
            }
            file.write(json.dumps(document) + "\n")
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_dry_run_on_data_of_the_same_shape(tiny_bert: Path, tmp_path: Path, name: str) -> None:
    """Labels, hidden size, fan-in, batch and intervals scaled down, all else as shipped."""
    config = load_recipe(name)
    scale = HIDDEN / 768
    overrides = [
        f"encoder.model={tiny_bert}",
        f"encoder.intermediate={round(config.encoder.intermediate * scale)}",
        f"head.fan_in={max(round(config.head.fan_in * scale), 4)}",
        "rewire.interval=3",
        "auxiliary.cutoff_epochs=1",
        "auxiliary.max_labels=20",
        "train.epochs=2",
        f"train.batch_size={max(config.train.batch_size // 32, 4)}",
        "train.validation=0.1",
    ]
    data = write_data(tmp_path / "data", LABELS[name])
    run = tmp_path / "run"
    model = xmc.train(name, data=data, out=run, overrides=overrides, cache=tmp_path / "cache")
    events = read_log(run / "log.jsonl")
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "end"
    assert kinds.count("validation") == 2
    assert kinds.count("auxiliary_end") == (config.auxiliary.kind == "clusters")
    rewirings = [event for event in events if event["event"] == "rewire"]
    assert sum(event["pruned"] for event in rewirings) > 0
    # With scores near 0 a label costs 1 (squared hinge) or log 2 (bce).
    start = LABELS[name] * (math.log(2) if config.head.loss == "bce" else 1.0)
    losses = [event.get("main_loss", event["loss"]) for event in events if event["event"] == "step"]
    assert losses[-1] < 0.7 * start
    extra = LABELS[name] if config.train.label_texts else 0
    record = json.loads((run / "run.json").read_text())
    assert (record["train_rows"], record["label_text_rows"]) == (108, extra)
    answers = model.features.transform(["w1 w2 w3"])
    best = model.topk(answers, 5)
    assert len(set(best.labels[0].tolist())) == 5
    assert bool(torch.isfinite(best.scores).all())


@pytest.mark.parametrize("name", ["oewn_glosses_dual", "quickstart_dual"])
def test_dry_run_of_a_dual_encoder(tiny_data: Path, tmp_path: Path, name: str) -> None:
    """Sizes scaled down, all else as shipped; the classes of documents are found by their text."""
    run = tmp_path / "run"
    overrides = [
        "features.hash_bits=12",
        "encoder.dim=32",
        "train.batch_size=64",
        "train.validation=0.1",
        "negatives.pool=4",
    ]
    xmc.train(name, data=tiny_data, out=run, overrides=overrides, cache=tmp_path / "cache")
    config = load_recipe(name)
    assert config.train.objective == "contrastive"
    events = read_log(run / "log.jsonl")
    found = [event["R@10"] for event in events if event["event"] == "validation"]
    assert len(found) == config.train.epochs
    assert max(found) > 0.8 > 10 / 30  # of chance
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["loss"] < math.log(30)
