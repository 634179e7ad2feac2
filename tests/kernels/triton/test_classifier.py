"""The Triton training step against dense float64 autograd and torch.optim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xmc_kernels.classifier import UpdateRule, classifier_loss_and_grad, classifier_step_
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, make_state

OPTIONS = {"momentum": 0.8, "betas": (0.7, 0.95), "eps": 1e-6}
KINDS = ["sgd", "momentum", "adamw", "adagrad"]
LOSSES = ["bce", "squared_hinge"]
SHAPES = [
    # B, D, L, F, G: round, odd in one, odd in all, and the corners
    (16, 32, 32, 16, 1),
    (16, 32, 35, 16, 1),
    (21, 19, 37, 7, 1),
    (150, 12, 5, 9, 1),
    (140, 90, 3, 77, 1),
    (1, 16, 33, 5, 1),
    (9, 10, 8, 1, 1),
    (5, 24, 7, 24, 1),
    (5, 9, 1, 4, 1),
    (1, 1, 1, 1, 1),
    (16, 32, 32, 16, 16),
    (5, 40, 64, 33, 32),
    (70, 70, 65, 66, 65),
    (6, 20, 12, 5, 4),
]
FORMS = {
    "atomic": {"by": "walk", "deterministic": False},
    "deterministic": {"by": "walk", "deterministic": True},
    "densify": {"by": "densify", "deterministic": False},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def train(device, monkeypatch):
    """`train(p, form, rule, loss, steps, ...)`: (loss, d_x, weight, bias, state) on the CPU."""
    from xmc_kernels._triton import classifier, densify

    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 16))

    def to(tensor, where):
        return None if tensor is None else tensor.to(where, copy=True)

    def run(p, form, rule, loss, steps=1, *, update=True, lr=0.05, seed=0):
        x, weight, index, bias, indptr, indices = (to(t, device) for t in p.tensors)
        state = make_state(weight, bias, rule)
        if not update:
            state.grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            state.grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for step in range(1, steps + 1):
            value, d_x = classifier.classifier_step(
                *(x, Layer(weight, index, bias), indptr, indices, state, loss, rule, lr, step),
                *(1 / max(1, len(p.x)), update, seed),
                **form,
            )
        state = ClassifierState(**{k: to(v, "cpu") for k, v in vars(state).items()})
        return value.cpu(), d_x.cpu(), to(weight, "cpu"), to(bias, "cpu"), state

    return run


@pytest.mark.parametrize(
    ("form", "loss", "shape"),
    [
        *(("atomic", "bce", shape) for shape in SHAPES),
        *(("densify", "squared_hinge", shape) for shape in SHAPES),
        *(("deterministic", "squared_hinge", shape) for shape in SHAPES[2::5]),
        ("atomic", "squared_hinge", SHAPES[1]),
        ("densify", "bce", SHAPES[1]),
    ],
    ids=str,
)
def test_loss_and_gradients_equal_dense_autograd(
    shape, form, loss, problem, oracle, close, train, poisoned
) -> None:
    p = problem(*shape)
    dense = oracle.dense_weight(p.weight, p.index, shape[1])
    targets = oracle.dense_targets(p.indptr, p.indices, shape[2])
    arguments = (p.x, dense, p.bias, targets, loss, 1 / shape[0])
    truth = list(oracle.loss_and_grads(*arguments))
    naive = list(oracle.loss_and_grads(*arguments, torch.float32))
    for grads in (truth, naive):
        grads[2] = oracle.at_index(grads[2], p.index)
    value, d_x, weight, bias, state = train(p, FORMS[form], UpdateRule("sgd"), loss, update=False)
    assert torch.equal(weight, p.weight)
    assert torch.equal(bias, p.bias)
    ours = (value, d_x, state.grad_weight, state.grad_bias)
    for a, b, c in zip(ours, naive, truth, strict=True):
        close(a, b, c, torch.float32)


@kinds
@pytest.mark.parametrize(
    ("form", "loss", "shape"),
    [
        ("atomic", "bce", (9, 31, 18, 7, 1)),
        ("atomic", "squared_hinge", (130, 20, 16, 5, 16)),
        ("deterministic", "squared_hinge", (9, 31, 10, 7, 1)),
        ("densify", "bce", (9, 31, 18, 7, 1)),
    ],
    ids=str,
)
def test_updates_equal_torch_optim_over_steps(
    shape, form, kind, loss, problem, oracle, close, train
) -> None:
    p = problem(*shape)
    rule = UpdateRule(kind, **OPTIONS, weight_decay=0.02)
    targets = oracle.dense_targets(p.indptr, p.indices, shape[2])
    finals = []
    for dtype in (torch.float32, torch.float64):
        weight, bias = p.weight.to(dtype, copy=True), p.bias.to(dtype, copy=True)
        groups = [{"params": [weight], "weight_decay": 0.02}, {"params": [bias], "weight_decay": 0}]
        optimizer = oracle.optimizer(kind, groups, lr=0.05, **OPTIONS)
        for _ in range(2):
            dense = oracle.dense_weight(weight, p.index, shape[1])
            _, d_x, d_weight, d_bias = oracle.loss_and_grads(
                p.x, dense, bias, targets, loss, 1 / shape[0], dtype
            )
            weight.grad = oracle.at_index(d_weight, p.index).to(dtype)
            bias.grad = d_bias.to(dtype)
            optimizer.step()
        finals.append((d_x, weight, bias))
    _, *ours, _ = train(p, FORMS[form], rule, loss, 2)
    for a, b, c in zip(ours, *finals, strict=True):
        close(a, b, c, torch.float32)


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 32, 32, 16, 1), (16, 32, 32, 16, 16)], ids=str)
def test_half_precision_costs_only_its_rounding(
    shape, dtype, form, problem, oracle, close, train
) -> None:
    p = problem(*shape).to(dtype)
    dense = oracle.dense_weight(p.weight, p.index, shape[1])
    targets = oracle.dense_targets(p.indptr, p.indices, shape[2])
    arguments = (p.x, dense, p.bias, targets, "bce", 1 / shape[0])
    truth = oracle.loss_and_grads(*arguments)
    naive = oracle.loss_and_grads(*arguments, torch.float32)
    value, d_x, *_, state = train(p, form, UpdateRule("sgd"), "bce", update=False)
    assert d_x.dtype == dtype
    close(value, naive[0], truth[0], torch.float32)
    close(d_x, naive[1], truth[1], dtype)
    expected = [oracle.at_index(t[2], p.index) for t in (naive, truth)]
    close(state.grad_weight, *expected, dtype)

    # One step of bfloat16 weights goes to either neighbour, by the reference's own draw.
    _, _, weight, bias, _ = train(p, form, UpdateRule("sgd"), "bce", lr=0.1, seed=4)
    assert weight.dtype == dtype
    own = p.copy()
    classifier_step_(
        *own.tensors,
        loss="bce",
        rule=UpdateRule("sgd"),
        state=ClassifierState(),
        lr=0.1,
        step=1,
        grad_scale=1 / shape[0],
        seed=4,
    )
    for ours, theirs in ((weight, own.weight), (bias, own.bias)):
        same = (ours == theirs).double().mean().item()
        assert same > 0.9, same
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@forms
def test_accumulated_gradients_are_applied_with_the_last_part(form, problem, train) -> None:
    from xmc_kernels._triton import classifier

    p = problem(12, 16, 20, 16)
    rule = UpdateRule("momentum", **OPTIONS)
    _, _, weight, bias, state = train(p, form, rule, "bce")
    own = p.copy()
    kept = make_state(own.weight, own.bias, rule)
    for first, last in ((0, 5), (5, 12)):
        part = own.rows(first, last)
        if first == 0:
            kept.grad_weight, kept.grad_bias = torch.zeros(20, 16), torch.zeros(20)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        part = replace(part, **{k: v.to(device) for k, v in vars(part).items()})
        kept = ClassifierState(
            **{k: v if v is None else v.to(device) for k, v in vars(kept).items()}
        )
        classifier.classifier_step(
            *(
                part.x,
                part.as_layer,
                part.indptr,
                part.indices,
                kept,
                "bce",
                rule,
                0.05,
                1,
                1 / 12,
                last == 12,
            ),
            **form,
        )
        own = replace(own, weight=part.weight.cpu(), bias=part.bias.cpu())
        assert torch.equal(own.weight, p.weight) == (last == 5)
    torch.testing.assert_close(own.weight, weight)
    torch.testing.assert_close(own.bias, bias)
    torch.testing.assert_close(kept.weight_m.cpu(), state.weight_m)


def test_a_dense_layer_equals_a_sparse_one_of_full_fan_in(problem, train) -> None:
    p = problem(6, 12, 20, 12)
    dense = replace(p, index=None)
    rule = UpdateRule("adamw", **OPTIONS, weight_decay=0.02)
    results = [train(q, FORMS["atomic"], rule, "squared_hinge", 2)[:4] for q in (p, dense)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@forms
def test_without_bias_without_positives_without_rows(form, problem, train) -> None:
    p = problem(4, 8, 9, 4)
    rule = UpdateRule("sgd", weight_decay=0.5)
    none = replace(p, indptr=torch.zeros_like(p.indptr), indices=p.indices[:0])
    no_bias = train(replace(none, bias=None), form, rule, "bce")
    zero_bias = train(replace(none, bias=torch.zeros(9)), form, rule, "bce")
    for a, b in zip(no_bias[:3], zero_bias[:3], strict=True):
        torch.testing.assert_close(a, b)
    value, d_x, weight, bias, _ = train(p.rows(0, 0), form, rule, "bce", lr=0.1)
    assert value == 0
    assert d_x.shape == (0, 8)
    torch.testing.assert_close(weight, 0.95 * p.weight)
    assert torch.equal(bias, p.bias)


@pytest.mark.parametrize("form", ["atomic", "densify"])
def test_large_scores_stay_finite_and_exact(form, oracle, train, problem) -> None:
    p = problem(2, 1, 6, 1)
    p = replace(
        p,
        x=torch.tensor([[1.0], [-1.0]]),
        weight=torch.tensor([[0.0], [1e-3], [30.0], [100.0], [1e4], [3e8]]),
        bias=torch.zeros(6),
        indptr=torch.tensor([0, 3, 6]),
        indices=torch.tensor([0, 2, 4, 1, 3, 5]).int(),
    )
    targets = oracle.dense_targets(p.indptr, p.indices, 6)
    for loss in LOSSES:
        truth = oracle.loss_and_grads(p.x, p.weight, p.bias, targets, loss, 0.5)
        value, d_x, *_, state = train(p, FORMS[form], UpdateRule("sgd"), loss, update=False)
        ours = (value, d_x, state.grad_weight, state.grad_bias)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=6e-8)


def test_small_losses_keep_their_digits(device) -> None:
    from xmc_kernels._triton import densify
    from xmc_kernels._triton.losses import Objective

    scores = torch.linspace(-20, -1, 60, device=device)[None]
    target = torch.zeros(1, 60, dtype=torch.uint8, device=device)
    grad, d_bias, parts = scores.clone(), scores[0].clone(), torch.zeros(1, device=device)
    for number in range(0, 60, 7):
        one = (scores[:, number : number + 1].clone(), None, target[:, :1], grad[:, :1])
        densify.gradient_launch(*one, d_bias[:1], parts, Objective("bce"), 1.0).run()
        truth = torch.nn.functional.softplus(scores[0, number].double())
        torch.testing.assert_close(parts[0].double(), truth, rtol=3e-7, atol=0)


def test_strategies(problem) -> None:
    from xmc_kernels._triton.tiles import strategy

    p, shared = problem(32, 8, 64, 4), problem(32, 8, 64, 4, 16)
    half, shared = p.to(torch.bfloat16), shared.to(torch.bfloat16)
    assert strategy(half.x, half.as_layer, False) == "densify"
    assert strategy(half.x, half.as_layer, True) == "walk"
    assert strategy(half.x[:8], half.as_layer, False) == "walk"
    assert strategy(p.x, p.as_layer, False) == "walk"
    assert strategy(shared.x, shared.as_layer, False) == "walk"


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [1, 16])
def test_the_operation_on_a_gpu_equals_the_cpu(group, dtype, kind, problem) -> None:
    p = problem(100, 256, 4096, 64, group, density=0.001).to(dtype)
    rule = UpdateRule(kind, **OPTIONS)
    results = []
    for device in ("cpu", "cuda"):
        tensors = [t.to(device, copy=True) for t in p.tensors]
        state = make_state(tensors[1], tensors[3], rule)
        gradients = classifier_loss_and_grad(*tensors, loss="bce", grad_scale=0.01)
        for step in (1, 2):
            value, d_x = classifier_step_(
                *tensors,
                loss="bce",
                rule=rule,
                state=state,
                lr=0.01,
                step=step,
                grad_scale=0.01,
            )
        results.append([t.cpu() for t in (*gradients, value, d_x, tensors[1], tensors[3])])
    for ours, expected in zip(results[1], results[0], strict=True):
        eps = max(4 * torch.finfo(dtype).eps, 1e-5)
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=eps, atol=scale * eps)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 16])
def test_the_deterministic_setting_repeats_bit_for_bit_on_a_gpu(group, problem, poisoned) -> None:
    p = problem(64, 128, 16384, 32, group, density=0.001).to(torch.bfloat16)
    results = []
    for _ in range(2):
        tensors = [t.to("cuda", copy=True) for t in p.tensors]
        state = make_state(tensors[1], tensors[3], UpdateRule("adamw"))
        result = classifier_step_(
            *tensors,
            loss="bce",
            rule=UpdateRule("adamw"),
            state=state,
            lr=0.01,
            step=1,
            grad_scale=0.01,
        )
        results.append((*result, tensors[1], tensors[3]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
