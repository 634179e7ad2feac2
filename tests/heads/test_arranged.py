"""Reordered, padded and half-dense classifiers: to the outside, a matrix over label ids."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmc.config import ConfigError, HeadConfig, OptimizerConfig, RewireConfig, from_dict
from xmc.heads.arranged import ArrangedHead
from xmc.heads.classifier import ClassifierHead
from xmc.heads.order import label_order
from xmc.nn.fan_in import FixedFanInLinear
from xmc.types import SparseLabels

B, D, L, F = 9, 32, 46, 8
FREQUENCIES = torch.arange(L).flip(0) // 3
RATE = 0.1
ARRANGEMENTS: list[dict[str, Any]] = [
    {"order": "random"},
    {"group_size": 4},  # two phantom rows
    {"order": "random", "group_size": 8, "dense_share": 0.2, "dense_lr_scale": 0.5},
    {"order": "frequency", "dense_share": 0.02},
    {"order": "random", "group_size": 4, "pattern": "2:8", "dense_share": 0.1},
]
arrangements = pytest.mark.parametrize("options", ARRANGEMENTS, ids=str)


def make_labels() -> SparseLabels:
    rows = [[3, 10], [], [45], [0, 1, 2, 3], [3], [10, 20, 30], [0], [5], list(range(40))]
    return SparseLabels.from_lists(rows, L)


def make_head(kind: str = "sgd", weight: Tensor | None = None, **options: Any) -> ArrangedHead:
    torch.manual_seed(1)
    config = HeadConfig(fan_in=F, **options)
    head = ArrangedHead.from_config(
        D,
        L,
        config,
        OptimizerConfig(kind=kind, lr=RATE),  # type: ignore[arg-type]
        order=label_order(FREQUENCIES, config, seed=3),
        label_shares=torch.linspace(0.01, 0.6, L),
        positive_weight=weight,
    )
    head.lr = RATE
    return head


def by_label(head: ArrangedHead) -> tuple[Tensor, Tensor, Tensor]:
    """Dense weight [L, D] float64, which entries are trained, and bias [L], row by row."""
    weight, bias = torch.zeros(L, D, dtype=torch.float64), torch.zeros(L, dtype=torch.float64)
    trained = torch.zeros(L, D, dtype=torch.bool)
    num_dense = 0 if head.dense is None else head.dense.num_labels
    layer = head.sparse.layer
    assert isinstance(layer, FixedFanInLinear)
    tail, inputs = layer.matrix.to_dense().double(), layer.matrix.inputs().long()
    for row, label in enumerate(head.order.tolist()):
        if row < num_dense:
            assert head.dense is not None
            weight[label] = head.dense.layer.weight[row].double()
            bias[label] = head.dense.layer.bias[row].double()  # type: ignore[index]
            trained[label] = True
        else:
            own = row - num_dense
            weight[label], bias[label] = tail[own], layer.bias[own].double()  # type: ignore[index]
            trained[label, inputs[own // layer.group_size]] = True
    return weight, trained, bias


def rates(head: ArrangedHead) -> Tensor:
    """The learning rate of each label, [L, 1]."""
    out = torch.full((L, 1), RATE, dtype=torch.float64)
    if head.dense is not None:
        out[head.order[: head.dense.num_labels].long()] *= head.dense_lr_scale
    return out


def truth(
    head: ArrangedHead, reps: Tensor, labels: SparseLabels, weight: Tensor
) -> tuple[Tensor, ...]:
    """Mean loss over rows and its gradients in reps, weight [L, D] and bias [L] by autograd."""
    matrix, _, bias = by_label(head)
    leaves = [t.double().requires_grad_() for t in (reps, matrix, bias)]
    scores = leaves[0] @ leaves[1].T + leaves[2]
    targets = labels.to_dense().double()
    if head.loss == "bce":
        entries = nn.functional.softplus(scores) - targets * scores
    else:
        entries = torch.relu(1 - (2 * targets - 1) * scores) ** 2
    loss = (entries * (1 + targets * (weight - 1))).sum() / len(reps)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@arrangements
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bounds", [(0, B), (0, 3, 4, B)])  # whole, and in passes
def test_steps_are_sgd_on_label_ids(
    options: dict[str, Any], loss: str, weighted: bool, bounds: tuple[int, ...]
) -> None:
    weight = torch.linspace(1, 9, L)
    head = make_head(weight=weight if weighted else None, loss=loss, **options)
    labels = make_labels()
    for _ in range(2):
        reps = torch.randn(B, D)
        matrix, trained, bias = by_label(head)
        value, d_reps, d_matrix, d_bias = truth(
            head, reps, labels, weight if weighted else torch.ones(L)
        )
        results = [
            head.loss_and_grad(
                reps[start:stop], labels.slice(start, stop), num_rows=B, update=stop == B
            )
            for start, stop in pairwise(bounds)
        ]
        limits = {"rtol": 1e-4, "atol": 1e-5}
        total = torch.stack([result.loss for result in results]).sum()
        torch.testing.assert_close(total.double(), value, **limits)
        mine = torch.cat([result.d_reps for result in results])
        torch.testing.assert_close(mine.double(), d_reps, **limits)
        after = by_label(head)
        step = rates(head) * torch.where(trained, d_matrix, 0.0)
        torch.testing.assert_close(after[0], matrix - step, **limits)
        torch.testing.assert_close(after[2], bias - rates(head)[:, 0] * d_bias, **limits)
        assert torch.equal(after[1], trained)
    assert head.steps == 2


@arrangements
@pytest.mark.parametrize("k", [1, 5, L, L + 7])
@pytest.mark.parametrize("filtered", [False, True])
def test_topk_speaks_of_label_ids(
    options: dict[str, Any], k: int, filtered: bool, oracle: ModuleType
) -> None:
    head, labels, reps = make_head(**options), make_labels(), torch.randn(B, D)
    matrix, _, bias = by_label(head)
    scores = reps.double() @ matrix.T + bias
    rows = [labels.slice(row, row + 1).indices.tolist() for row in range(B)]
    expected = oracle.topk(scores, k, rows if filtered else [[]] * B)
    best = head.topk(reps, k, labels if filtered else None)
    assert best.labels.tolist() == expected[1]
    wanted = torch.tensor(expected[0], dtype=torch.float64)
    torch.testing.assert_close(best.scores.double(), wanted, rtol=1e-4, atol=1e-5)


@arrangements
def test_ties_are_in_order_of_label_ids_and_lower_rows_win_the_cut(options: dict[str, Any]) -> None:
    head = make_head(**options)
    for part in (head.dense, head.sparse):
        if part is not None:
            part.layer.weight.zero_()
            assert part.layer.bias is not None
            part.layer.bias[: L if part is head.dense else L - head._num_dense] = 0.25
    best = head.topk(torch.randn(2, D), 6)
    expected = sorted(head.order[:6].tolist())
    assert best.labels.tolist() == [expected] * 2
    assert bool((best.scores == 0.25).all())
    assert head.topk(torch.randn(1, D), L).labels[0].tolist() == list(range(L))


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", "adagrad"])
@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_phantom_rows_never_speak(weight_dtype: str, kind: str, loss: str) -> None:
    """46 labels in groups of 8: two phantoms, through steps with decay and a rewiring."""
    torch.manual_seed(1)
    config = HeadConfig(fan_in=F, group_size=8, loss=loss, weight_dtype=weight_dtype)  # type: ignore[arg-type]
    optimizer = OptimizerConfig(kind=kind, lr=RATE, weight_decay=0.1)  # type: ignore[arg-type]
    head = ArrangedHead.from_config(D, L, config, optimizer)
    assert head.layer.out_features == 48
    labels = make_labels()
    for step in range(1, 5):
        head.loss_and_grad(torch.randn(B, D), labels)
        if step == 2:
            rewire = RewireConfig(method="set", fraction=0.5, init="uniform")
            report = head.rewire_(rewire, seed=0, step=step)
            assert not len(report.dead_labels)
    layer = head.layer
    assert isinstance(layer, FixedFanInLinear)
    weight = layer.matrix.numbers().detach().float()
    assert weight[L:].abs().max() < 1e-20  # the exponential of a kernel ends at e^-86, not at 0
    assert torch.equal(layer.bias[L:], torch.full((2,), -1e30))  # type: ignore[index]
    assert weight[:L].abs().max() > 0.01
    best = head.topk(torch.randn(3, D), 48)
    assert bool((best.labels[:, L:] == -1).all())
    assert bool((best.scores[:, L:] == -torch.inf).all())
    assert best.labels[:, :L].sort().values.tolist() == [list(range(L))] * 3


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("dense_share", [0.0, 0.2])
def test_rigl_grows_by_the_gradient_of_the_labels_in_a_group(loss: str, dense_share: float) -> None:
    options = {"order": "random", "group_size": 4, "dense_share": dense_share}
    head, labels, reps = make_head(loss=loss, **options), make_labels(), torch.randn(B, D)
    gradient = truth(head, reps, labels, torch.ones(L))[2].abs()
    tail = head.order[head._num_dense :].tolist()
    layer = head.layer
    assert isinstance(layer, FixedFanInLinear)
    index = layer.index.long()
    magnitude = by_label(head)[0].abs()
    before = None if head.dense is None else head.dense.layer.weight.clone()
    expected = []
    for row in range(len(index)):
        group = tail[4 * row : 4 * row + 4]  # the last group has two labels
        own = index[row].tolist()
        lost = sorted(own, key=lambda column: float(magnitude[group, column].sum()))[:2]
        free = sorted(set(range(D)) - set(own), key=lambda c: -float(gradient[group, c].sum()))
        expected.append(sorted((set(own) - set(lost)) | set(free[:2])))
    config = RewireConfig(method="rigl", fraction=0.25)
    head.rewire_(config, seed=0, step=1, reps=reps, labels=labels)
    assert layer.index.tolist() == expected
    if head.dense is not None:
        assert before is not None
        assert torch.equal(head.dense.layer.weight, before)


def test_dead_labels_are_label_ids_without_phantoms() -> None:
    head = make_head(order="random", group_size=8, dense_share=0.2)  # 8 dense, 38 of 40 rows
    rows = torch.tensor([0, 5, 17, 37])
    head.layer.weight.data[rows] = 0
    report = head.rewire_(RewireConfig(method="set", fraction=0.1), seed=0, step=1)
    assert report.dead_labels.tolist() == sorted(head.order[rows + 8].tolist())


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_the_training_state_is_all_that_a_step_writes(kind: str) -> None:
    options = {"order": "random", "group_size": 8, "dense_share": 0.2, "weight_dtype": "bfloat16"}
    head, labels = make_head(kind, **options), make_labels()
    head.seed = 5
    head.loss_and_grad(torch.randn(B, D), labels)
    assert {name.split(".")[0] for name in head.training_state()} == {"dense", "sparse"}
    torch.manual_seed(9)
    copy = ArrangedHead.from_config(
        D, L, HeadConfig(fan_in=F, **options), OptimizerConfig(kind=kind, lr=RATE)
    )
    copy.load_state_dict(head.state_dict())
    for name, tensor in copy.training_state().items():
        tensor.copy_(head.training_state()[name])
    copy.steps, copy.seed, copy.lr = head.steps, head.seed, head.lr
    reps = torch.randn(B, D)
    results = [each.loss_and_grad(reps, labels) for each in (head, copy)]
    assert torch.equal(results[0].d_reps, results[1].d_reps)
    for name, tensor in (head.state_dict() | head.training_state()).items():
        other = (copy.state_dict() | copy.training_state())[name]
        assert tensor.view(torch.uint8).equal(other.view(torch.uint8)), name


def test_a_loaded_order_replaces_the_old_one_for_good() -> None:
    """Also after the head was used, when it holds the inverse of its old order."""
    head, labels, reps = make_head(order="random"), make_labels(), torch.randn(B, D)
    head.topk(reps, 3, labels)
    other = make_head(order="frequency")
    other.load_state_dict(head.state_dict() | {"order": head.order.flip(0)})
    head.load_state_dict(other.state_dict())
    for each in (head, other):
        matrix, _, bias = by_label(each)
        scores = (reps.double() @ matrix.T + bias).masked_fill(labels.to_dense() > 0, -torch.inf)
        assert torch.equal(each.topk(reps, 3, labels).labels, scores.topk(3).indices)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(L, dtype=torch.int32), "an order that names each of 46 labels once"),
        (torch.arange(L), r"an order of int32 and shape \[46\], got torch.int64 \[46\]"),
        (torch.arange(9).int(), r"an order of int32 and shape \[46\], got torch.int32 \[9\]"),
    ],
)
def test_an_order_that_is_none_is_refused(order: Tensor, message: str) -> None:
    head = make_head(order="random")
    with pytest.raises(RuntimeError, match=f"order: expected {message}"):
        head.load_state_dict(head.state_dict() | {"order": order})


def test_what_does_not_fit_is_named() -> None:
    layer = FixedFanInLinear(D, 48, F, group_size=4, bias=False)
    message = "expected 44 rows for 44 labels, or less than a group of 4 more, got 48"
    with pytest.raises(ValueError, match=message):
        ArrangedHead(ClassifierHead(layer), torch.arange(44))
    with pytest.raises(ValueError, match="expected a bias, which keeps phantom rows silent"):
        ArrangedHead(ClassifierHead(layer), torch.arange(46))
    with pytest.raises(ValueError, match="expected an order that names each of 46 labels once"):
        ArrangedHead(make_head(group_size=4).sparse, torch.ones(46))
    head = make_head(group_size=4)
    with pytest.raises(ValueError, match="expected rows over 46 labels, got 47"):
        head.loss_and_grad(torch.randn(1, D), SparseLabels.from_lists([[1]], 47))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "cluster"}, "head: order = 'cluster' needs kind = 'sparse', got 'dense'"),
        ({"dense_share": 0.1}, "head: dense_share = 0.1 needs kind = 'sparse', got 'dense'"),
        ({"dense_share": 1.0}, "head.dense_share: input should be less than 1, got 1.0"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict({"head": {"kind": "dense", **options}}, source="test")


def test_float8_rows_have_bfloat16_beside_them() -> None:
    head = make_head(dense_share=0.1, weight_dtype="float8")
    assert head.dense is not None
    assert head.dense.layer.weight.dtype == torch.bfloat16
    assert head.layer.weight.dtype == torch.float8_e4m3fn
