"""A layer between encoder and classifier: what it computes, learns, saves, and who reads what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmc.config import Config, ConfigError, from_dict
from xmc.data.batches import epoch_batches, epoch_order
from xmc.heads.head import HeadResult
from xmc.model import build_model, load_model, save_model
from xmc.training.auxiliary import make_auxiliary
from xmc.training.backward import backward, pulled_back
from xmc.training.clusters import find_clusters
from xmc.training.loop import TrainingLoop
from xmc.training.run import prepare_data
from xmc.training.trainer import Trainer

D, P, L = 24, 40, 30


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "features": {"min_df": 1},
        "encoder": {"dim": D, "dropout": 0.0, "intermediate": P},
        "head": {"fan_in": 6},
        "train": {"epochs": 1, "batch_size": 40, "validation": 0.0, "warmup_steps": 0},
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().double().clone().requires_grad_()


@torch.no_grad()
def lazy_adam_(
    table: Tensor, moments: Tensor, rows: Tensor, step: int, *, lr: float, eps: float
) -> None:
    """Adam on some rows; the others and their moments stand still. Uses the gradient up."""
    assert table.grad is not None
    gradient, table.grad = table.grad[rows], None
    mean = moments[0, rows] = 0.9 * moments[0, rows] + 0.1 * gradient
    square = moments[1, rows] = 0.999 * moments[1, rows] + 0.001 * gradient**2
    root = (square / (1 - 0.999**step)).sqrt()
    table[rows] -= lr * (mean / (1 - 0.9**step)) / (root + eps)


ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "gelu": nn.functional.gelu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("auxiliary", [False, True])
def test_training_equals_plain_torch(
    tiny_data: Path, tmp_path: Path, activation: str, auxiliary: bool
) -> None:
    """Main loss behind the layer, auxiliary loss before it, by autograd on dense float64."""
    # With a large eps Adam does not magnify the rounding of a gradient near zero.
    rate, eps = 1e-2, 1e-2
    sections: dict[str, dict[str, Any]] = {
        "encoder": {"activation": activation},
        "train": {"schedule": "constant", "clip_norm": 3.0},
        "encoder_optimizer": {"lr": rate, "eps": eps},
        "classifier_optimizer": {"kind": "sgd", "lr": 0.5},
    }
    if auxiliary:
        more = {"kind": "clusters", "max_labels": 4, "cutoff_epochs": 1, "lr": 0.02}
        sections["auxiliary"] = {**more, "reduction": "sum"}
    options = config(**sections)
    features, train_set, _ = prepare_data(options, tiny_data, tmp_path / "cache")
    model = build_model(options, features, [str(n) for n in range(L)])
    clusters = find_clusters(options, train_set, [])
    head = make_auxiliary(options, clusters, train_set, D, torch.device("cpu"))

    table, shift = leaf(model.encoder.table.weight), leaf(model.encoder.bias)  # type: ignore[union-attr]
    linear = model.intermediate[0]  # type: ignore[index]
    middle, middle_bias = leaf(linear.weight), leaf(linear.bias)
    weight, bias = leaf(model.head.layer.weight), leaf(model.head.layer.bias)  # type: ignore[arg-type]
    index = model.head.layer.index.long()  # type: ignore[union-attr, operator]
    moments = torch.zeros(2, *table.shape, dtype=torch.float64)
    body = [shift, middle, middle_bias]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(body, lr=rate, eps=eps, weight_decay=0.0),
        torch.optim.SGD([weight, bias], lr=0.5),
    ]
    trained = [table, middle, middle_bias, weight]
    if head is not None:
        cluster_weight = leaf(head.classifier.layer.weight)
        cluster_bias = leaf(head.classifier.layer.bias)
        optimizers.append(torch.optim.AdamW([cluster_weight, cluster_bias], 0.02, weight_decay=0.0))
        trained.append(cluster_weight)
    starts = [tensor.detach().clone() for tensor in trained]
    losses = nn.functional.binary_cross_entropy_with_logits
    steps = list(epoch_batches(epoch_order(len(train_set), 42, 0), 40))
    for step, rows in enumerate(steps):
        batch = train_set.batch(rows)
        bag = torch.zeros(len(rows), len(table), dtype=torch.float64)
        owners = torch.arange(len(rows)).repeat_interleave(batch.inputs.offsets.diff())  # type: ignore[union-attr]
        bag[owners, batch.inputs.ids] = batch.inputs.weights.double()  # type: ignore[union-attr]
        pooled = torch.relu(bag @ table + shift)
        reps = ACTIVATIONS[activation](pooled @ middle.T + middle_bias)
        full = torch.zeros(L, P, dtype=torch.float64).scatter(1, index, weight)
        targets = batch.labels.to_dense().double()
        loss = losses(reps @ full.T + bias, targets, reduction="sum") / len(rows)
        if clusters is not None:
            members = nn.functional.one_hot(clusters.assignment.long(), len(clusters)).double()
            positive = (targets @ members > 0).double()
            scores = pooled @ cluster_weight.T + cluster_bias
            other = losses(scores, positive, reduction="sum") / len(rows)
            share = 0.2 * (1 + math.cos(math.pi * step / len(steps)))
            loss = (1 - share) * loss + share * other
        loss.backward()
        torch.nn.utils.clip_grad_norm_([table, *body], 3.0)  # the layer's gradient included
        touched = batch.inputs.ids.unique()  # type: ignore[union-attr]
        lazy_adam_(table, moments, touched, step + 1, lr=rate, eps=eps)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    (tmp_path / "run" / "model").mkdir(parents=True)
    trainer = Trainer(model, options, train_set, None, auxiliary=head)
    TrainingLoop(trainer, options.train, tmp_path / "run").fit()
    mine = [model.encoder.table.weight, linear.weight, linear.bias, model.head.layer.weight]  # type: ignore[union-attr]
    if head is not None:
        mine.append(head.classifier.layer.weight)
    for found, start, truth in zip(mine, starts, trained, strict=True):
        error = (found.detach().double() - truth.detach()).norm()
        assert error < 1e-3 * (truth.detach() - start).norm()


def test_a_model_comes_back_from_its_folder(tiny_data: Path, tmp_path: Path) -> None:
    options = config(encoder={"activation": "gelu"})
    features, train_set, _ = prepare_data(options, tiny_data, tmp_path / "cache")
    model = build_model(options, features, [str(n) for n in range(L)])
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    inputs = train_set.batch(torch.arange(9)).inputs
    ours, theirs = model.topk(inputs, 5), again.topk(inputs, 5)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.labels, theirs.labels)
    with torch.no_grad():
        linear = model.intermediate[0]  # type: ignore[index]
        hidden = nn.functional.gelu(model.encoder.eval()(inputs) @ linear.weight.T + linear.bias)
        expected = model.head.layer(hidden).topk(5).values
    torch.testing.assert_close(ours.scores, expected)


def test_two_roots_get_the_gradient_of_the_sum() -> None:
    """Gradients of two readers of one tensor, and of a tensor and what was made from it."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, dtype=torch.float64)
    d_pooled, d_reps = torch.randn(4, 3).double(), torch.randn(4, 5).double()
    pooled = x * 2
    reps = torch.tanh(pooled @ weight)
    slope = d_reps * (1 - reps.detach() ** 2) @ weight.T
    seen = pulled_back(HeadResult(torch.tensor(1.0), d_reps), reps, pooled)
    torch.testing.assert_close(seen.d_reps, slope)
    backward((reps, pooled), [d_reps, d_pooled])
    torch.testing.assert_close(x.grad, 2 * (slope + d_pooled))
    x.grad = None
    pooled = x * 2
    backward((pooled, pooled), [d_pooled, 3 * d_pooled])
    torch.testing.assert_close(x.grad, 8 * d_pooled)
    x.grad = None
    pooled = x * 2
    backward((pooled, pooled), [d_pooled])  # no auxiliary head
    torch.testing.assert_close(x.grad, 2 * d_pooled)


def test_a_bottleneck_has_the_bytes_of_a_sparse_head(tiny_data: Path, tmp_path: Path) -> None:
    """P = 1.5 F: a dense row of P float32 is a sparse one of F float32 and F uint16."""
    sizes = []
    for encoder, head in (
        ({"intermediate": 12}, {"kind": "dense"}),
        ({"intermediate": 0}, {"fan_in": 8}),
    ):
        options = config(encoder=encoder, head=head)
        features, *_ = prepare_data(options, tiny_data, tmp_path / "cache")
        model = build_model(options, features, [str(n) for n in range(L)])
        tensors = [t for name, t in model.weights().items() if name.startswith("head.")]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors))
    assert sizes[0] == sizes[1] == L * (12 * 4 + 4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"encoder": {"activation": "relu"}}, 'encoder.activation: "relu" needs .*, got 0'),
        (
            {"encoder": {"intermediate": 50}, "head": {"fan_in": 51}},
            "head.fan_in: expected at most encoder.intermediate = 50, got 51",
        ),
        ({"head": {"fan_in": 513}}, "head.fan_in: expected at most encoder.dim = 512, got 513"),
    ],
)
def test_what_does_not_fit_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(sections, source="test")
    from_dict({"encoder": {"intermediate": 600}, "head": {"fan_in": 513}}, source="test")
