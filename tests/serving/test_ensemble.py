"""Several models as one, against the mean of the probabilities of all labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import xmc
from xmc.data.formats import read_documents
from xmc.evaluation.metrics import MetricAccumulator
from xmc.heads.arranged import ArrangedHead
from xmc.model import XMCModel, load_model
from xmc.runs import RunError
from xmc.serving.ensemble import Ensemble, union
from xmc.types import SparseLabels, TopK

SMALL = ["train.epochs=2", "encoder.dim=16", "head.fan_in=8", "features.min_df=1"]
KINDS = {
    "words": [],
    "pairs": ["features.ngrams=2", "head.loss=squared_hinge", "head.weight_dtype=bfloat16"],
    "arranged": ["head.order=frequency", "head.dense_share=0.2", "head.group_size=4"],
}


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of different features, losses and heads on the same data."""
    folder = tmp_path_factory.mktemp("members")
    for name, extra in KINDS.items():
        xmc.train(
            "quickstart",
            data=tiny_data,
            out=folder / name,
            cache=folder / "cache",
            overrides=[*SMALL, *extra],
        )
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def models(runs: dict[str, Path]) -> list[XMCModel]:
    return [load_model(run / "model") for run in runs.values()]


def all_probabilities(model: XMCModel, texts: list[str]) -> np.ndarray:
    """[B, L], from the dense weights in float64."""
    head = model.head
    parts = [head.dense, head.sparse] if isinstance(head, ArrangedHead) else [head]
    reps = model.reps(model.features.transform(texts)).double()
    scores = []
    for part in parts:
        layer = part.layer
        weight = layer.weight if part.index is None else layer.to_dense().weight
        scores.append(reps @ weight.double().T + layer.bias.double())
    joined = torch.cat(scores, 1)[:, : len(model.labels)]
    if isinstance(head, ArrangedHead):
        joined = joined[:, head.order.long().argsort()]
    factor = 1 if head.loss == "bce" else 2
    return 1 / (1 + np.exp(-factor * joined.detach().numpy()))


def texts_of(data: Path) -> tuple[list[str], list[list[int]]]:
    documents = list(read_documents(data, "tst"))
    return [d.text for d in documents], [d.labels for d in documents]


@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.1)])
def test_scores_are_the_weighted_mean_of_probabilities(
    models: list[XMCModel], tiny_data: Path, weights: tuple[float, ...] | None
) -> None:
    texts, _ = texts_of(tiny_data)
    ensemble = Ensemble(models, weights)  # 100 candidates: more than the labels, so exact
    best = ensemble.topk(ensemble.transform(texts), 7)
    share = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    parts = [all_probabilities(model, texts) for model in models]
    expected = sum(s * part for s, part in zip(share, parts, strict=True))
    np.testing.assert_allclose(
        best.scores, -np.sort(-expected, axis=1)[:, :7], rtol=1e-5, atol=1e-6
    )
    found = np.take_along_axis(expected, best.labels.numpy(), 1)
    np.testing.assert_allclose(found, best.scores, rtol=1e-5, atol=1e-6)


def test_every_member_scores_the_candidates_of_the_others(models: list[XMCModel]) -> None:
    """With one candidate each, the scores are still those of all members together."""
    texts = ["word3 word7 noise1", "word1 noise4 noise9", ""]
    best = Ensemble(models, candidates=1).topk(Ensemble(models).transform(texts), 1)
    parts = [all_probabilities(model, texts) for model in models]
    mean = sum(parts) / len(parts)
    for row in range(len(texts)):
        candidates = sorted({int(part[row].argmax()) for part in parts})
        winner = max(candidates, key=lambda label: mean[row, label])
        assert best.labels[row].tolist() == [winner]
        assert best.scores[row].item() == pytest.approx(mean[row, winner], rel=1e-5)


def test_evaluate_and_predict_take_several_runs(runs: dict[str, Path], tiny_data: Path) -> None:
    folders, cache = list(runs.values()), next(iter(runs.values())).parent / "cache"
    weights = (2.0, 1.0, 1.0)
    scores = xmc.evaluate(folders, weights=weights, cache=cache, ks=(1, 3)).values
    texts, labels = texts_of(tiny_data)
    parts = [all_probabilities(load_model(run / "model"), texts) for run in folders]
    mean = torch.from_numpy(sum(w / 4 * p for w, p in zip(weights, parts, strict=True)))
    best = mean.topk(3)
    accumulator = MetricAccumulator((1, 3))
    accumulator.update(TopK(best.values, best.indices), SparseLabels.from_lists(labels, 30))
    expected = accumulator.compute().values
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    answer = xmc.Predictor.load(folders, weights).predict(texts[:1], k=3)[0]
    assert [label for label, _ in answer] == [f"label {n}" for n in best.indices[0].tolist()]
    assert [s for _, s in answer] == pytest.approx(best.values[0].tolist(), rel=1e-5)


def test_excluded_labels_are_nobodys_candidates(models: list[XMCModel]) -> None:
    ensemble = Ensemble(models)
    inputs = ensemble.transform(["word3", "word4"])
    exclude = SparseLabels.from_lists([[3, 5], list(range(28))], 30)
    best = ensemble.topk(inputs, 30, exclude)
    assert {3, 5}.isdisjoint(best.labels[0].tolist())
    assert sorted(best.labels[1].tolist()) == [-1] * 28 + [28, 29]
    assert best.scores[1, 2:].isneginf().all()


def test_union_of_candidates() -> None:
    one, other = torch.tensor([[5, 1, 3], [2, -1, -1]]), torch.tensor([[3, 7], [-1, -1]])
    assert union([one, other]).tolist() == [[1, 3, 5, 7], [2, -1, -1, -1]]


def test_models_that_do_not_fit_together(models: list[XMCModel], runs: dict[str, Path]) -> None:
    one = models[0]
    other = XMCModel(one.config, one.features, ["x", *one.labels[1:]], one.encoder, one.head)
    with pytest.raises(RunError, match="model 2: label 0 is 'x', in the first it is 'label 0'"):
        Ensemble([one, other])
    with pytest.raises(ValueError, match="expected 2 weights, one a model, got 3"):
        Ensemble([one, one], (1, 1, 1))
    with pytest.raises(ValueError, match=r"expected finite weights above 0, got \[1, 0\]"):
        Ensemble([one, one], (1, 0))
    with pytest.raises(ValueError, match="expected candidates of at least 1, got 0"):
        Ensemble([one, one], candidates=0)
    with pytest.raises(ValueError, match="expected at least one model to combine, got none"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"expected several runs with weights \[1.0\], got one"):
        xmc.evaluate(runs["words"], weights=[1.0])
    with pytest.raises(ValueError, match=r"expected several runs with weights \[1.0\], got one"):
        xmc.Predictor.load(runs["words"], [1.0])
