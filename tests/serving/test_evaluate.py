"""Evaluation of a whole run against scores computed from its weights, one row at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import xmc
from xmc.data.formats import read_documents
from xmc.nn.fan_in import FixedFanInLinear

FILTER = [(row, label) for row in range(0, 100, 3) for label in (0, 1)]


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data with a filter: labels 0 and 1 may not be given to every third test row."""
    folder = tmp_path_factory.mktemp("filtered")
    data = folder / "data"
    shutil.copytree(tiny_data, data)
    lines = "".join(f"{row} {label}\n" for row, label in FILTER)
    (data / "filter_labels_test.txt").write_text(lines)
    xmc.train(
        "quickstart",
        data=data,
        out=folder / "run",
        cache=folder / "cache",
        overrides=["train.epochs=2", "encoder.dim=16", "head.fan_in=8", "features.min_df=1"],
    )
    return folder / "run"


def test_scores_equal_a_row_by_row_computation_with_the_filter(run: Path) -> None:
    cache = run.parent / "cache"
    scores = xmc.evaluate(run, "test", ks=(1, 3), cache=cache).values
    predictor = xmc.Predictor.load(run)
    model, layer = predictor.model, predictor.model.head.layer
    assert isinstance(layer, FixedFanInLinear)
    weight = layer.to_dense().weight.detach().double()
    hits = {1: 0, 3: 0}
    recall = 0.0
    documents = list(read_documents(run.parent / "data", "tst"))
    for row, document in enumerate(documents):
        bag = model.features.transform([document.text])
        with torch.no_grad():
            reps = model.encoder(bag).double()
        all_scores = (reps @ weight.T + layer.bias.double())[0]
        for filtered_row, label in FILTER:
            if filtered_row == row:
                all_scores[label] = -torch.inf
        best = all_scores.topk(3).indices.tolist()
        for k in hits:
            hits[k] += len(set(best[:k]) & set(document.labels))
        recall += len(set(best) & set(document.labels)) / len(document.labels)
    assert scores["P@1"] == pytest.approx(hits[1] / 100)
    assert scores["P@3"] == pytest.approx(hits[3] / 300)
    assert scores["R@3"] == pytest.approx(recall / 100)


def test_a_returned_model_evaluates_like_its_folder(run: Path) -> None:
    from xmc.model import load_model

    cache = run.parent / "cache"
    by_model = xmc.evaluate(load_model(run / "model"), "test", cache=cache)
    assert by_model.values == xmc.evaluate(run, "test", cache=cache).values


def test_predictions_do_not_depend_on_the_texts_around_them(run: Path) -> None:
    predictor = xmc.Predictor.load(run)
    texts = [f"word{n} noise{n}" for n in range(7)] + [""]
    together = list(predictor.stream(texts, 4, batch_size=3))
    alone = [predictor.predict([text], k=4)[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert [label for label, _ in one] == [label for label, _ in other]
        assert [s for _, s in one] == pytest.approx([s for _, s in other], rel=1e-5)


def test_predict_refuses_one_string_and_k_below_one(run: Path) -> None:
    predictor = xmc.Predictor.load(run)
    with pytest.raises(TypeError, match="expected a list of texts, got one string 'word1'"):
        predictor.predict("word1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected k of at least 1, got 0"):
        predictor.predict(["word1"], k=0)
