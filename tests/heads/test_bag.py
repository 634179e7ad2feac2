"""A head that reads bags beside representations, against the same layer over all features."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import xmc
from xmc.config import Config, ConfigError, HeadConfig, OptimizerConfig, from_dict
from xmc.heads.bag import BagClassifierHead, _completed
from xmc.heads.classifier import ClassifierHead
from xmc.nn.bag_reps import join_bag
from xmc.types import Bag, SparseLabels

DIM, FEATURES, LABELS = 6, 50, 40
OPTIONS = HeadConfig(fan_in=3, bag_fan_in=5)
SCALE = 2.5


def a_bag(num_rows: int) -> Bag:
    """Random bags of 0 to 8 features."""
    rows = [torch.randperm(FEATURES)[: int(torch.randint(9, ()))] for _ in range(num_rows)]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return Bag(torch.cat(rows), offsets, torch.rand(int(offsets[-1])) + 0.1)


def dense(bag: Bag) -> Tensor:  # [B, V] float64, rows of length SCALE
    out = torch.zeros(len(bag), FEATURES, dtype=torch.float64)
    for row, (start, stop) in enumerate(zip(bag.offsets[:-1], bag.offsets[1:], strict=True)):
        values = bag.weights[start:stop].double()
        out[row, bag.ids[start:stop]] = SCALE * values / values.norm() if len(values) else values
    return out


def a_head(kind: str = "adamw") -> BagClassifierHead:
    head = BagClassifierHead.from_options(
        DIM, FEATURES, LABELS, OPTIONS, OptimizerConfig(kind=kind, lr=0.1)
    )
    features = scipy.sparse.lil_matrix((LABELS, FEATURES), dtype=np.float32)
    for label in range(LABELS):
        own = torch.randperm(FEATURES)[: label % 6]  # up to bag_fan_in
        features[label, own.tolist()] = torch.rand(len(own)).tolist()
    head.choose_features_(features.tocsr(), 1.5)
    return head


def some_labels(num_rows: int) -> SparseLabels:
    return SparseLabels.from_lists(
        [torch.randint(LABELS, (3,)).tolist() for _ in range(num_rows)], LABELS
    )


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_equals_that_of_a_head_over_all_features(kind: str) -> None:
    head = a_head(kind)
    plain = ClassifierHead(copy.deepcopy(head.layer), optimizer=OptimizerConfig(kind=kind, lr=0.1))
    plain.layer.double()
    for _ in range(4):
        reps, bag, labels = torch.randn(5, DIM), a_bag(5), some_labels(5)
        joined = join_bag(reps, bag, SCALE, least=8)
        ours = head.loss_and_grad(joined, labels)
        all_of_it = torch.cat([reps.double(), dense(bag)], 1)
        truth = plain.loss_and_grad(all_of_it, labels)
        torch.testing.assert_close(ours.loss.double(), truth.loss.double(), rtol=1e-5, atol=1e-5)
        # The columns of the batch; that of zeros stands for all others.
        present = torch.cat([torch.arange(DIM), DIM + joined.active])
        torch.testing.assert_close(
            ours.d_reps[:, : len(present)].double(), truth.d_reps[:, present], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            head.layer.weight.double(), plain.layer.weight, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(head.layer.index_bytes, plain.layer.index_bytes)


def test_best_labels_and_candidates_are_those_of_all_features() -> None:
    head, bag, reps = a_head(), a_bag(7), torch.randn(7, DIM)
    torch.nn.init.normal_(head.layer.bias)
    joined = join_bag(reps, bag, SCALE, least=8)
    assert isinstance(head.layer, xmc.FixedFanInLinear)
    weight = head.layer.matrix.to_dense().double()
    scores = torch.cat([reps.double(), dense(bag)], 1) @ weight.T + head.layer.bias.double()
    best = head.topk(joined, 4)
    torch.testing.assert_close(best.scores.double(), scores.topk(4).values, rtol=1e-5, atol=1e-5)
    labels = torch.randint(-1, LABELS, (7, 9))
    wanted = torch.where(labels < 0, -torch.inf, scores.gather(1, labels.clamp(min=0)))
    torch.testing.assert_close(
        head.candidate_scores(joined, labels).double(), wanted, rtol=1e-5, atol=1e-5
    )


def test_only_representations_get_a_gradient_through_the_join() -> None:
    reps, bag = torch.randn(5, DIM, requires_grad=True), a_bag(5)
    joined = join_bag(reps, bag, SCALE, least=8)
    assert joined.values.shape == (5, max(8, DIM + len(joined.active) + 1))
    assert not joined.detach().values.requires_grad
    d_values = torch.randn_like(joined.values)
    joined.values.backward(d_values)
    torch.testing.assert_close(reps.grad, d_values[:, :DIM])
    with pytest.raises(ValueError, match="expected 5 bags to match the representations, got 4"):
        join_bag(reps, a_bag(4), SCALE)


@given(st.data())
def test_chosen_features_are_kept_and_rows_filled_with_distinct_ones(data: st.DataObject) -> None:
    count, width = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 7))
    columns = st.lists(st.integers(0, width - 1), unique=True)
    rows = data.draw(st.lists(columns.filter(lambda row: len(row) <= count), max_size=4))
    spare = [data.draw(st.permutations(range(width)))[:count] for _ in rows]
    matrix = scipy.sparse.lil_matrix((len(rows), width), dtype=np.float32)
    for row, own in enumerate(rows):
        matrix[row, own] = 1 + np.arange(len(own))
    wanted = matrix.tocsr()
    index, weight = _completed(wanted, np.array(spare, np.int64).reshape(len(rows), count))
    assert index.shape == weight.shape == (len(rows), count)
    assert (np.diff(index, axis=1) > 0).all()
    for row, own in enumerate(rows):
        assert set(own) <= set(index[row].tolist()) <= {*own, *spare[row]}
        np.testing.assert_array_equal(weight[row], wanted[row].toarray()[0, index[row]])


def test_too_many_features_are_refused() -> None:
    features = scipy.sparse.csr_matrix(np.ones((LABELS, FEATURES), np.float32))
    with pytest.raises(ValueError, match="expected at most 5 features a label, got 50"):
        a_head().choose_features_(features, 1.0)
    with pytest.raises(ValueError, match="bag_fan_in: expected at most the 4 features, got 5"):
        BagClassifierHead.from_options(DIM, 4, LABELS, OPTIONS)
    with pytest.raises(TypeError, match=r"expected BagReps .* got Tensor"):
        a_head().topk(torch.randn(2, DIM), 1)


def recipe(**sections: dict[str, Any]) -> dict[str, Any]:
    plain = {
        "features": {"min_df": 1},
        "encoder": {"dim": 8},
        "head": {"fan_in": 4, "bag_fan_in": 6},
        "train": {"epochs": 2, "batch_size": 32, "checkpoint_every": 5},
    }
    return {name: plain.get(name, {}) | sections.get(name, {}) for name in plain | sections}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"kind": "dense"}}, "bag_fan_in = 6 needs kind = 'sparse', got 'dense'"),
        ({"head": {"group_size": 2}}, "bag_fan_in: expected group_size = 1 beside it, got 2"),
        ({"head": {"weight_dtype": "float8"}}, "weights of 16 bits or more"),
        ({"rewire": {"method": "set"}}, 'expected rewire.method = "static", got "set"'),
        (
            {"features": {"kind": "tokens"}, "encoder": {"kind": "transformer", "model": "x"}},
            'head.bag_fan_in: needs features.kind = "bag", got "tokens"',
        ),
    ],
)
def test_recipes_that_do_not_fit(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(recipe(**sections), source="here")


@pytest.fixture(scope="module")
def config() -> Config:
    return from_dict(recipe(), source="test")


@pytest.fixture(scope="module")
def whole_run(
    runs: ModuleType, config: Config, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return runs.train(config, tiny_data, tmp_path_factory.mktemp("whole"))


def test_interrupted_and_resumed_equals_uninterrupted(
    runs: ModuleType, config: Config, whole_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    start = partial(runs.train, config, tiny_data, tmp_path)
    runs.assert_same_run(whole_run, runs.stop_and_resume(start, [7]))


def test_a_saved_model_predicts_and_accumulated_passes_are_one_step(
    runs: ModuleType, config: Config, whole_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = xmc.Predictor.load(whole_run)
    assert len(model.predict(["a text"], k=3)[0]) == 3
    assert xmc.evaluate(whole_run, "test", cache=tiny_data.parent / "cache").values["P@1"] > 0
    # Without dropout, passes of 8 rows train what passes of 32 do.
    encoder = dataclasses.replace(config.encoder, dropout=0.0)
    train = dataclasses.replace(config.train, epochs=1)
    weights = []
    for name, size in (("whole", 0), ("cut", 8)):
        options = dataclasses.replace(
            config, encoder=encoder, train=dataclasses.replace(train, micro_batch=size)
        )
        run = runs.train(options, tiny_data, tmp_path / name)
        weights.append(runs.newest(run)["model.head.layer.weight"])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
