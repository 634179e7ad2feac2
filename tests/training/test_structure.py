"""Order, groups, dense rows, intermediate layer, losses and label texts together, in whole runs."""

from __future__ import annotations

import gzip
import json
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import xmc
from xmc.config import Config, from_dict
from xmc.data.formats import read_documents
from xmc.heads.arranged import ArrangedHead
from xmc.model import ModelError, load_model
from xmc.nn.clusters import Clusters
from xmc.nn.fan_in import FixedFanInLinear


def config(**sections: dict[str, Any]) -> Config:
    """30 labels in groups of 4: 4 dense ones, then 26 sparse ones on 28 rows."""
    values: dict[str, dict[str, Any]] = {
        "features": {"min_df": 1},
        "encoder": {"dim": 24, "intermediate": 32, "activation": "relu", "dropout": 0.2},
        "head": {
            "fan_in": 8,
            "group_size": 4,
            "order": "cluster",
            "dense_share": 0.1,
            "dense_lr_scale": 0.5,
            "label_smoothing": 0.05,
            "positive_weight": "propensity",
        },
        "rewire": {"method": "rigl", "interval": 5, "fraction": 0.3, "end": 0.9},
        "auxiliary": {"kind": "clusters", "max_labels": 8, "cutoff_epochs": 2, "lr": 0.01},
        "encoder_optimizer": {"lr": 0.02},
        "classifier_optimizer": {"kind": "adamw", "lr": 0.02},
        "train": {
            "epochs": 3,
            "batch_size": 20,
            "accumulation": 2,
            "warmup_steps": 3,
            "checkpoint_every": 4,
            "label_texts": True,
        },
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels named by the word that gives them away; label 0 is filtered from some test rows."""
    target = tmp_path_factory.mktemp("structure") / "data"
    shutil.copytree(tiny_data, target)
    with gzip.open(target / "lbl.json.gz", "wt", encoding="utf-8") as file:
        for number in range(30):
            file.write(json.dumps({"uid": f"L{number}", "title": f"word{number}"}) + "\n")
    filtered = "".join(f"{row} 0\n" for row in range(0, 100, 3))
    (target / "filter_labels_test.txt").write_text(filtered)
    return target


@pytest.fixture(scope="module")
def whole_run(runs: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.train(config(), data, tmp_path_factory.mktemp("whole"))


# 360 documents and 30 titles: 10 steps of two passes an epoch. A pass calls the dense rows, the
# sparse ones and, in the first 20 steps, the auxiliary head.
@pytest.mark.parametrize("call", [30, 119, 131])
def test_interrupted_and_resumed_equals_uninterrupted(
    runs: ModuleType, whole_run: Path, data: Path, tmp_path: Path, call: int
) -> None:
    start = partial(runs.train, config(), data, tmp_path)
    runs.assert_same_run(whole_run, runs.stop_and_resume(start, [call]))


def test_the_checkpoint_holds_all_of_it(runs: ModuleType, whole_run: Path) -> None:
    names = set(runs.newest(whole_run))
    for part in ("dense", "sparse"):
        for name in ("weight_m", "weight_v", "bias_m", "bias_v"):
            assert f"head.{part}.{name}" in names
        assert f"model.head.{part}.layer.weight" in names
    assert {"model.head.order", "model.intermediate.0.weight", "rewire.slot_age"} <= names
    assert not any("positive_weight" in name or "row_of" in name for name in names)


def test_order_and_auxiliary_objective_share_one_clustering(whole_run: Path, data: Path) -> None:
    """Leaves of at most a group; the auxiliary head has their parents, of at most 8 labels."""
    clusters = Clusters.load(whole_run / "clusters.safetensors")
    clusters.validate()
    assert len(clusters) == 8
    assert int(clusters.sizes().max()) == 4
    head = load_model(whole_run / "model").head
    assert isinstance(head, ArrangedHead)
    dense = head.order[:4].tolist()
    assert head.order[4:].tolist() == [n for n in clusters.order.tolist() if n not in dense]


def test_the_order_is_invisible(whole_run: Path, data: Path) -> None:
    """Answers, evaluation and filters against a dense float64 matrix over label ids."""
    cache = data.parent / "cache"
    model = load_model(whole_run / "model")
    head = model.head
    assert isinstance(head, ArrangedHead)
    assert isinstance(head.sparse.layer, FixedFanInLinear)
    assert head.dense is not None
    assert (head.dense.num_labels, head.sparse.num_labels) == (4, 28)
    weights = torch.cat([head.dense.layer.weight, head.sparse.layer.to_dense().weight]).double()
    biases = torch.cat([head.dense.layer.bias, head.sparse.layer.bias]).double()  # type: ignore[list-item]
    matrix, bias = torch.zeros(30, 32, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    for row, label in enumerate(head.order.tolist()):
        matrix[label], bias[label] = weights[row], biases[row]
    documents = list(read_documents(data, "tst"))
    hits, answers = 0, []
    for row, document in enumerate(documents):
        with torch.no_grad():
            pooled = model.encoder(model.features.transform([document.text]))
            linear = model.intermediate[0]  # type: ignore[index]
            reps = torch.relu(pooled @ linear.weight.T + linear.bias).double()
        scores = (reps @ matrix.T + bias)[0].detach()
        answers.append([f"word{label}" for label in scores.topk(3).indices.tolist()])
        if row % 3 == 0:
            scores[0] = -torch.inf
        hits += int(scores.argmax()) in document.labels
    found = xmc.Predictor.load(whole_run).predict([d.text for d in documents], k=3)
    assert [[label for label, _ in row] for row in found] == answers
    scores_of_run = xmc.evaluate(whole_run, "test", cache=cache)
    assert scores_of_run.values["P@1"] == pytest.approx(hits / 100)
    assert hits > 10  # after three epochs; 3 by chance
    assert model.labels == [f"word{n}" for n in range(30)]


def test_bytes_are_counted_as_they_lie_in_memory(whole_run: Path) -> None:
    model = load_model(whole_run / "model")
    before = model.num_bytes()
    rows = 4 * (4 * 32 + 4) + 28 * (4 * 8 + 4) + 7 * 8 * 2  # dense; sparse with phantoms; indices
    table = model.encoder.table.weight.numel() * 4 + 24 * 4  # type: ignore[union-attr]
    assert before == table + 4 * (32 * 24 + 32) + rows + 4 * 30
    empty = xmc.types.SparseLabels.from_lists([[]], 30)
    with torch.inference_mode():
        model.head.topk(torch.zeros(1, 32), 1, empty)
    assert model.num_bytes() == before + 4 * 30  # the order's inverse


def test_a_damaged_order_is_named(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "model", tmp_path / "model")
    file = tmp_path / "model" / "weights.safetensors"
    tensors = load_file(file)
    tensors["head.order"][3] = tensors["head.order"][4]
    save_file(tensors, file)
    message = r"weights.safetensors: .*head.order: expected an order that names each of 30 labels"
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("order", "loss"),
    [("random", "squared_hinge"), ("cluster", "bce")],
)
def test_every_order_learns(
    runs: ModuleType, data: Path, tmp_path: Path, order: str, loss: str
) -> None:
    """Words give labels away; the most frequent label alone is right for 20 of 100 test rows."""
    options = config(
        head={"order": order, "loss": loss},
        encoder={"dropout": 0.0, "intermediate": 0, "activation": "none"},
        auxiliary={"kind": "none"},
        classifier_optimizer={"lr": 0.05},
        train={"epochs": 15},
    )
    run = runs.train(options, data, tmp_path)
    assert (run / "clusters.safetensors").exists() == (order == "cluster")
    assert xmc.evaluate(run, "test", cache=data.parent / "cache").values["P@1"] > 0.8
