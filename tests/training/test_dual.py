"""Dual encoders from recipe to model: what they learn, mine, save, and lend to classifiers."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import xmc
from xmc.config import Config, ConfigError, from_dict
from xmc.data.batches import load_dataset
from xmc.data.formats import DataError
from xmc.data.label_store import load_label_texts
from xmc.model import ModelError, XMCModel, load_model, read_label_embeddings
from xmc.nn.clusters import Clusters, cluster_labels
from xmc.runs import RunError
from xmc.serving.ensemble import Ensemble
from xmc.training.dual_trainer import DualTrainer
from xmc.training.log import read_log
from xmc.training.loop import TrainingError
from xmc.training.mining import mine, mining_is_due
from xmc.training.planner import plan_recipe

NUM_LABELS = 20
SMALL: dict[str, dict[str, Any]] = {
    "features": {"vocabulary": "hashing", "hash_bits": 12},
    "encoder": {"dim": 48, "dropout": 0.1, "intermediate": 32},
    "train": {
        "objective": "contrastive",
        "epochs": 6,
        "batch_size": 32,
        "warmup_steps": 5,
        "eval_batch_size": 64,
    },
    "encoder_optimizer": {"lr": 0.02},
}
STEP = (DualTrainer, "_loss_and_gradients")


def config(**changes: dict[str, Any]) -> Config:
    sections = {name: dict(options) for name, options in SMALL.items()}
    for name, options in changes.items():
        sections.setdefault(name, {}).update(options)
    return from_dict(sections, source="test")


def classifier(**changes: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {
        "features": dict(SMALL["features"]),
        "encoder": {"dim": 48},
        "head": {"fan_in": 8},
        "train": {"epochs": 1, "batch_size": 64},
    }
    for name, options in changes.items():
        sections.setdefault(name, {}).update(options)
    return from_dict(sections, source="test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents share no word with the titles of their labels: that they belong is to be learned.

    Label 18 has no title, label 19 that of label 17.
    """
    folder = tmp_path_factory.mktemp("retrieval") / "data"
    folder.mkdir()
    draw = random.Random(3)
    titles = [f"name{label} other{label}" for label in range(NUM_LABELS)]
    titles[18], titles[19] = "", titles[17]
    with gzip.open(folder / "lbl.json.gz", "wt", encoding="utf-8") as file:
        for label, title in enumerate(titles):
            file.write(json.dumps({"uid": str(label), "title": title}) + "\n")
    for split, size in (("trn", 600), ("tst", 100)):
        with gzip.open(folder / f"{split}.json.gz", "wt", encoding="utf-8") as file:
            for _ in range(size):
                positives = sorted({draw.randrange(NUM_LABELS) for _ in range(2)})
                words = [f"word{label}" for label in positives for _ in range(2)]
                words += [f"noise{draw.randrange(40)}" for _ in range(2)]
                row = {"title": " ".join(words), "target_ind": positives}
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(runs: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with mined negatives."""
    options = config(negatives={"per_document": 2, "pool": 4, "every": 2})
    return Path(runs.train(options, data, tmp_path_factory.mktemp("run")))


def test_it_learns_which_titles_belong_to_a_document(run: Path, data: Path) -> None:
    """By chance R@3 is 0.15, at most 0.95: label 18 cannot be found, 19 only guessed."""
    scores = xmc.evaluate(run, "test", cache=data.parent / "cache").values
    assert scores["R@3"] > 0.75
    assert {"P@1", "R@10", "R@100", "nDCG@5"} <= scores.keys()
    answer = xmc.Predictor.load(run).predict(["word4 word4 noise1"], k=2)[0]
    assert answer[0][0] == "name4 other4"
    assert 1 >= answer[0][1] > answer[1][1] >= -1  # cosines


def test_separate_encoders_learn_too_and_part(runs: ModuleType, data: Path, tmp_path: Path) -> None:
    options = config(contrastive={"encoders": "separate", "symmetric": True})
    run = runs.train(options, data, tmp_path)
    assert xmc.evaluate(run, "test", cache=data.parent / "cache").values["R@3"] > 0.75
    model = load_model(run / "model")
    tower = model.retrieval.label_tower
    assert tower is not None
    assert bool((tower.encoder.table.weight != model.encoder.table.weight).any())  # type: ignore[union-attr]
    check_embeddings(model, data)


def check_embeddings(model: XMCModel, data: Path) -> None:
    """What the model holds is what its label tower says of the titles."""
    head, texts = model.retrieval, load_label_texts(data, model.features)
    if head.label_tower is None:
        encoder, intermediate = model.encoder, model.intermediate
    else:
        encoder, intermediate = head.label_tower.encoder, head.label_tower.intermediate  # type: ignore[assignment]
    with torch.no_grad():
        titles = intermediate(encoder(texts.features.rows(torch.arange(NUM_LABELS))))
    expected = F.normalize(titles, dim=1) * texts.known[:, None]
    torch.testing.assert_close(head.embeddings, expected)
    assert head.known.tolist() == texts.known.tolist() == [n != 18 for n in range(NUM_LABELS)]


def test_the_model_holds_the_embeddings_of_its_weights(run: Path, data: Path) -> None:
    model = load_model(run / "model")
    check_embeddings(model, data)
    found = read_label_embeddings(run, model.labels)
    assert torch.equal(found, model.retrieval.embeddings)


def test_a_label_without_a_title_is_never_predicted(run: Path) -> None:
    predictor = xmc.Predictor.load(run)
    labels = [label for label, _ in predictor.predict(["word18 word18"], k=NUM_LABELS)[0]]
    assert len(labels) == NUM_LABELS - 1
    assert "18" not in labels


@pytest.mark.parametrize("calls", [[1], [4, 23, 41]])
def test_a_resumed_run_ends_with_the_same_bits(
    runs: ModuleType, run: Path, data: Path, tmp_path: Path, calls: list[int]
) -> None:
    """Stopped in the first step, before and between minings (after epochs 1, 3 and 5)."""
    options = config(negatives={"per_document": 2, "pool": 4, "every": 2})

    def start(*, resume: bool) -> Path:
        return Path(runs.train(options, data, tmp_path, resume=resume))

    other = runs.stop_and_resume(start, calls, within=STEP)
    runs.assert_same_run(run, other)


def test_the_cache_of_gradients_changes_no_result(
    runs: ModuleType, data: Path, tmp_path: Path
) -> None:
    """Without dropout, which is drawn by chunk: the same losses to rounding."""
    still = {"encoder": {"dropout": 0.0}, "train": {"epochs": 3}}
    whole = runs.train(config(**still), data, tmp_path / "whole")
    cut = runs.train(config(**still, contrastive={"chunk": 5}), data, tmp_path / "cut")
    for one, other in zip(*(runs.events(r, "validation") for r in (whole, cut)), strict=True):
        assert one == pytest.approx(other, abs=0.05)
    losses = [[event["loss"] for event in runs.events(r, "step")] for r in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == 3


def test_the_log_tells_temperature_and_keys(run: Path) -> None:
    steps = [event for event in read_log(run / "log.jsonl") if event["event"] == "step"]
    assert all(0.01 <= event["temperature"] < 0.1 for event in steps)
    assert all(event["keys"] <= NUM_LABELS for event in steps)
    assert all(event["encoder_grad_norm"] > 0 for event in steps)


def test_mining_finds_the_nearest_wrong_labels(run: Path, data: Path) -> None:
    model = load_model(run / "model")
    dataset = load_dataset(data, "trn", model.features, cache=data.parent / "cache")
    options = config(negatives={"per_document": 1, "pool": 3, "skip": 1}).negatives
    mined = mine(model, dataset, options, batch_size=37)
    reps = F.normalize(model.reps(dataset.features.rows(torch.arange(len(dataset)))), dim=1)
    cosines = (reps.double() @ model.retrieval.embeddings.double().T).numpy()
    cosines[:, 18] = -np.inf
    cosines[dataset.labels.to_dense().bool().numpy()] = -np.inf
    assert mined.shape == (len(dataset), 3)
    found = np.take_along_axis(cosines, mined.long().numpy(), 1)
    expected = -np.sort(-cosines, axis=1)[:, 1:4]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_when_mining_is_due() -> None:
    options = config(negatives={"per_document": 1, "start": 2, "every": 3}).negatives
    assert [epoch for epoch in range(12) if mining_is_due(options, epoch)] == [2, 5, 8, 11]
    assert not any(mining_is_due(config().negatives, epoch) for epoch in range(5))


def test_approximate_search_in_training_and_prediction(
    runs: ModuleType, data: Path, tmp_path: Path
) -> None:
    """So few labels are one cell, so that what is approximate is exact."""
    pytest.importorskip("faiss", reason="needs the extra ann")
    options = config(contrastive={"search": "ann"}, negatives={"per_document": 1})
    run = runs.train(options, data, tmp_path)
    model = load_model(run / "model")
    inputs = model.features.transform(["word4 word4 noise1", "word7"])
    best = model.topk(inputs, 5)
    model.retrieval.search = "exact"
    assert model.topk(inputs, 5).labels.tolist() == best.labels.tolist()


def test_a_dual_encoder_and_a_classifier_answer_together(
    runs: ModuleType, run: Path, data: Path, tmp_path: Path
) -> None:
    other = runs.train(classifier(), data, tmp_path)
    dual, linear = load_model(run / "model"), load_model(other / "model")
    ensemble = Ensemble([dual, linear], (3, 1))
    texts = ["word4 noise1", "word9 word2", "word18"]
    best = ensemble.topk(ensemble.transform(texts), 4)
    reps = F.normalize(dual.reps(dual.features.transform(texts)), dim=1)
    cosines = (reps @ dual.retrieval.embeddings.T).masked_fill(~dual.retrieval.known, -torch.inf)
    scores = torch.softmax(cosines * dual.retrieval.scale, 1).detach()
    dense = linear.classifier.layer.to_dense()  # type: ignore[union-attr]
    reps = linear.reps(linear.features.transform(texts))
    own = reps @ dense.weight.detach().T + dense.bias.detach()
    mean = 0.75 * scores + 0.25 * torch.sigmoid(own)
    expected = mean.topk(4)
    assert best.labels.tolist() == expected.indices.tolist()
    torch.testing.assert_close(best.scores, expected.values, rtol=1e-4, atol=1e-6)
    cache = data.parent / "cache"
    assert "R@100" in xmc.evaluate([run, other], weights=(3, 1), cache=cache).values


def test_labels_are_clustered_by_their_embeddings(
    runs: ModuleType, run: Path, data: Path, tmp_path: Path
) -> None:
    options = classifier(
        train={"label_embeddings": str(run)},
        head={"order": "cluster"},
        auxiliary={"kind": "clusters", "max_labels": 5},
    )
    other = runs.train(options, data, tmp_path)
    model = load_model(other / "model")
    embeddings = read_label_embeddings(run, model.labels)
    expected = cluster_labels(embeddings, max_labels=5, seed=42)
    found = Clusters.load(other / "clusters.safetensors")
    assert torch.equal(found.order, expected.order)
    assert model.head.order.tolist() == expected.order.tolist()


def test_a_bag_classifier_starts_from_the_dual_encoder(
    runs: ModuleType, run: Path, data: Path, tmp_path: Path
) -> None:
    """Weights before the first step; the vocabulary comes along."""
    options = classifier(encoder={"model": str(run)}, encoder_optimizer={"lr": 0.0})
    other = load_model(runs.train(options, data, tmp_path) / "model")
    first = load_model(run / "model")
    assert torch.equal(other.encoder.table.weight, first.encoder.table.weight)  # type: ignore[union-attr]
    assert torch.equal(other.encoder.bias, first.encoder.bias)  # type: ignore[union-attr]
    assert other.features.digest() == first.features.digest()


def test_a_start_that_does_not_fit_is_refused(
    runs: ModuleType, run: Path, data: Path, tmp_path: Path
) -> None:
    def start(**changes: dict[str, Any]) -> None:
        runs.train(classifier(**changes), data, tmp_path)

    encoder = {"model": str(run)}
    with pytest.raises(ValueError, match=r"encoder.bias of shape \[32\] .*got \[48\]"):
        start(encoder={**encoder, "dim": 32})
    with pytest.raises(DataError, match=r"expected features of .*'ngrams': 2.*, as the recipe has"):
        start(encoder=encoder, features={"ngrams": 2})
    with pytest.raises(ValueError, match="expected a run or model of xmc to start a bag encoder"):
        start(encoder={"model": str(data)})


def test_label_embeddings_that_do_not_fit_are_refused(
    runs: ModuleType, run: Path, data: Path, tiny_data: Path, tmp_path: Path
) -> None:
    linear = runs.train(classifier(), data, tmp_path / "linear")
    labels = load_model(run / "model").labels
    with pytest.raises(ModelError, match="expected the model of a dual encoder, got a classif"):
        read_label_embeddings(linear, labels)
    with pytest.raises(RunError, match="expected the 3 labels of this data set, got 20"):
        read_label_embeddings(run, labels[:3])
    with pytest.raises(ModelError, match="missing: no model here"):
        read_label_embeddings(tmp_path, labels)
    with pytest.raises(ValueError, match="expected the model of a classifier, got a dual enc"):
        _ = load_model(run / "model").classifier
    with pytest.raises(ValueError, match="expected the model of a dual encoder, got a classif"):
        _ = load_model(linear / "model").retrieval


def test_data_without_titles_are_refused(runs: ModuleType, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("trn.json.gz", "tst.json.gz"):
        (folder / name).write_bytes((data / name).read_bytes())
    lines = "".join(json.dumps({"uid": f"u{n}"}) + "\n" for n in range(NUM_LABELS))
    (folder / "lbl.json.gz").write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(DataError, match="expected titles with words that the features know, got"):
        runs.train(config(), folder, tmp_path)
    lines = "".join(json.dumps({"title": "a" * (n == 18)}) + "\n" for n in range(NUM_LABELS))
    lines = lines.replace('{"title": ""}', '{"uid": "x", "title": ""}')
    (folder / "lbl.json.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "trn.json.gz").write_bytes(
        gzip.compress(b'{"title": "a", "target_ind": [1]}\n{"title": "a b", "target_ind": [2]}\n')
    )
    with pytest.raises(TrainingError, match="no training row has a label with a text"):
        runs.train(config(train={"validation": 0.0}), folder, tmp_path / "second")


def test_a_plan_of_a_dual_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match='plan predicts the training of classifiers, got "contr'):
        plan_recipe(config(), num_labels=10)
