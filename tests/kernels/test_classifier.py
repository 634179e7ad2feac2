"""The fused training step against dense float64 autograd and torch.optim."""

from __future__ import annotations

import threading

import pytest
import torch

from xmc_kernels.classifier import (
    ClassifierState,
    UpdateRule,
    classifier_loss_and_grad,
    classifier_step_,
    make_state,
)

LOSSES = ["bce", "squared_hinge"]
KINDS = ["sgd", "momentum", "adamw", "adagrad"]
SHAPES = [
    # B, D, L, F, G: round, odd in one, odd in all, and the corners
    (64, 128, 512, 32, 1),
    (64, 128, 515, 32, 1),
    (70, 53, 517, 17, 1),
    (150, 40, 601, 33, 1),
    (1, 16, 600, 5, 1),
    (33, 40, 64, 1, 1),
    (17, 24, 33, 24, 1),
    (5, 9, 1, 4, 1),
    (1, 1, 1, 1, 1),
    (48, 64, 512, 16, 4),
    (64, 96, 560, 35, 10),
]
losses = pytest.mark.parametrize("loss", LOSSES)
kinds = pytest.mark.parametrize("kind", KINDS)
OPTIONS = {"momentum": 0.8, "betas": (0.7, 0.95), "eps": 1e-6}


def step(p, state, rule, loss, number=1, *, lr=0.05, update=True, rows=None):
    return classifier_step_(
        *p.tensors,
        loss=loss,
        rule=rule,
        state=state,
        lr=lr,
        step=number,
        grad_scale=1 / (rows or len(p.x)),
        update=update,
    )


@losses
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_equal_dense_autograd(
    shape, loss, problem, oracle, as_accurate, poisoned, two_threads
) -> None:
    p = problem(*shape)
    num_rows, features, num_labels = shape[:3]
    dense = oracle.dense_weight(p.weight, p.index, features)
    targets = oracle.dense_targets(p.indptr, p.indices, num_labels)
    arguments = (p.x, dense, p.bias, targets, loss, 1 / num_rows)
    truth = list(oracle.loss_and_grads(*arguments))
    naive = list(oracle.loss_and_grads(*arguments, torch.float32))
    for grads in (truth, naive):
        grads[2] = oracle.at_index(grads[2], p.index)
    ours = classifier_loss_and_grad(*p.tensors, loss=loss, grad_scale=1 / num_rows)
    for a, b, c in zip(ours, naive, truth, strict=True):
        as_accurate(a, b, c)


@losses
def test_reference_equals_dense_autograd(loss, problem, oracle) -> None:
    p = problem(7, 20, 31, 5).to(torch.float64)
    dense = oracle.dense_weight(p.weight, p.index, 20)
    targets = oracle.dense_targets(p.indptr, p.indices, 31)
    truth = oracle.loss_and_grads(p.x, dense, p.bias, targets, loss, 0.25)
    value, d_x, d_weight, d_bias = classifier_loss_and_grad(*p.tensors, loss=loss, grad_scale=0.25)
    torch.testing.assert_close(value, truth[0].float())
    torch.testing.assert_close(d_x, truth[1])
    torch.testing.assert_close(d_weight, oracle.at_index(truth[2], p.index))
    torch.testing.assert_close(d_bias, truth[3])


@losses
@kinds
@pytest.mark.parametrize("shape", [(20, 48, 300, 16, 1), (9, 31, 37, 7, 1)], ids=str)
def test_updates_equal_torch_optim_over_steps(
    shape, kind, loss, problem, oracle, as_accurate
) -> None:
    num_rows, features, num_labels = shape[:3]
    p = problem(*shape)
    start = p.copy()
    rule = UpdateRule(kind, **OPTIONS, weight_decay=0.02)
    state = make_state(p.weight, p.bias, rule)
    targets = oracle.dense_targets(p.indptr, p.indices, num_labels)
    finals = []
    for dtype in (torch.float64, torch.float32):
        weight, bias = start.weight.to(dtype), start.bias.to(dtype)
        groups = [{"params": [weight], "weight_decay": 0.02}, {"params": [bias], "weight_decay": 0}]
        optimizer = oracle.optimizer(kind, groups, lr=0.05, **OPTIONS)
        d_x = []
        for _ in range(4):
            dense = oracle.dense_weight(weight, p.index, features)
            _, d, d_weight, d_bias = oracle.loss_and_grads(
                p.x, dense, bias, targets, loss, 1 / num_rows, dtype
            )
            d_x.append(d)
            weight.grad = oracle.at_index(d_weight, p.index).to(dtype)
            bias.grad = d_bias.to(dtype)
            optimizer.step()
        finals.append((weight, bias, d_x[-1]))
    for number in range(1, 5):
        _, d_x = step(p, state, rule, loss, number)
    for ours, truth, naive in zip((p.weight, p.bias, d_x), *finals, strict=True):
        as_accurate(ours, naive, truth)


@losses
@kinds
def test_dense_layer_follows_the_same_rules(kind, loss, problem, oracle) -> None:
    p = problem(6, 12, 40, 12)  # fan-in = features: the sparse layer is dense
    rule = UpdateRule(kind, **OPTIONS, weight_decay=0.02)
    sparse, dense = p.copy(), p.copy()
    results = []
    for layer, index in ((sparse, p.index), (dense, None)):
        state = make_state(layer.weight, layer.bias, rule)
        options = {"loss": loss, "rule": rule, "state": state, "lr": 0.05, "grad_scale": 0.5}
        tensors = (layer.weight, index, layer.bias, p.indptr, p.indices)
        for number in (1, 2):
            result = classifier_step_(p.x, *tensors, step=number, **options)
        results.append((*result, layer.weight, layer.bias))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_accumulation_equals_one_big_batch(kind, sparse, problem) -> None:
    p = problem(80, 16, 600, 16)
    if not sparse:
        p = type(p)(p.x, p.weight, None, p.bias, p.indptr, p.indices)
    rule = UpdateRule(kind, **OPTIONS)
    whole, parts = p.copy(), p.copy()
    whole_state, state = (make_state(p.weight, p.bias, rule) for _ in range(2))
    for number in (1, 2):
        value, d_x = step(whole, whole_state, rule, "bce", number)
        before = parts.weight.clone()
        pieces = []
        for first, last in ((0, 17), (17, 60)):
            pieces.append(
                step(parts.rows(first, last), state, rule, "bce", number, update=False, rows=80)
            )
            assert torch.equal(parts.weight, before)
            assert state.grad_weight is not None
        pieces.append(step(parts.rows(60, 80), state, rule, "bce", number, rows=80))
        assert state.grad_weight is None
        assert state.grad_bias is None
        torch.testing.assert_close(sum(v for v, _ in pieces), value)
        torch.testing.assert_close(torch.cat([d for _, d in pieces]), d_x, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_cost_only_their_rounding(problem, oracle, as_accurate) -> None:
    p = problem(30, 64, 200, 16)
    x = p.x.bfloat16()
    dense = oracle.dense_weight(p.weight, p.index, 64)
    targets = oracle.dense_targets(p.indptr, p.indices, 200)
    truth = oracle.loss_and_grads(x, dense, p.bias, targets, "bce", 1 / 30)
    naive = oracle.loss_and_grads(x, dense, p.bias, targets, "bce", 1 / 30, torch.bfloat16)
    ours = classifier_loss_and_grad(x, *p.tensors[1:], loss="bce", grad_scale=1 / 30)
    assert ours[1].dtype == torch.bfloat16
    as_accurate(ours[0], naive[0], truth[0])
    as_accurate(ours[1], naive[1], truth[1])
    as_accurate(ours[2], *(oracle.at_index(t[2], p.index) for t in (naive, truth)))


def test_bfloat16_weights_train(problem, oracle) -> None:
    p = problem(8, 16, 20, 4).to(torch.bfloat16)
    rule = UpdateRule("adamw")
    state = make_state(p.weight, p.bias, rule)
    assert state.weight_m is not None
    assert state.weight_m.dtype == torch.float32
    first = step(p, state, rule, "bce")[0]
    for number in range(2, 12):
        last = step(p, state, rule, "bce", number)[0]
    assert p.weight.dtype == torch.bfloat16
    assert last < 0.8 * first


def test_a_layer_without_bias(problem, oracle) -> None:
    p = problem(10, 20, 300, 4)
    zero = torch.zeros(300)
    rule = UpdateRule("adamw")
    with_bias, without = p.copy(), p.copy()
    options = {"loss": "bce", "rule": rule, "lr": 0.1, "step": 1, "grad_scale": 0.1}
    tensors = (p.index, None, p.indptr, p.indices)
    state = make_state(without.weight, None, rule)
    assert state.bias_m is None
    ours = classifier_step_(p.x, without.weight, *tensors, state=state, **options)
    state = make_state(with_bias.weight, zero, rule)
    tensors = (p.index, zero, p.indptr, p.indices)
    theirs = classifier_step_(p.x, with_bias.weight, *tensors, state=state, **options)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(without.weight, with_bias.weight)
    gradient = classifier_loss_and_grad(
        p.x, p.weight, p.index, None, p.indptr, p.indices, loss="bce", grad_scale=0.1
    )
    torch.testing.assert_close(gradient[0], ours[0])


def test_large_scores_stay_finite_and_exact(oracle) -> None:
    x = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[0.0], [1e-3], [30.0], [100.0], [1e4], [3e8]])
    index = torch.zeros(6, 1, dtype=torch.uint16)
    bias = torch.zeros(6)
    indptr, indices = torch.tensor([0, 3, 6]), torch.tensor([0, 2, 4, 1, 3, 5]).int()
    targets = oracle.dense_targets(indptr, indices, 6)
    for loss in LOSSES:
        truth = oracle.loss_and_grads(x, weight, bias, targets, loss, 1.0)
        ours = classifier_loss_and_grad(
            x, weight, index, bias, indptr, indices, loss=loss, grad_scale=1.0
        )
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=6e-8)


def test_a_label_beyond_the_margin_is_left_alone(problem) -> None:
    p = problem(20, 16, 300, 4)
    p.bias[:] = -100
    p.indptr[:] = 0
    arguments = (*p.layer, p.indptr, p.indices[:0])
    before = p.copy()
    value, d_x, d_weight, d_bias = classifier_loss_and_grad(
        *arguments, loss="squared_hinge", grad_scale=1.0
    )
    assert value == 0
    assert not any(t.any() for t in (d_x, d_weight, d_bias))
    rule = UpdateRule("sgd")
    classifier_step_(
        *arguments,
        loss="squared_hinge",
        rule=rule,
        state=ClassifierState(),
        lr=1.0,
        step=1,
        grad_scale=1.0,
    )
    assert torch.equal(p.weight, before.weight)


def test_no_rows_still_decay_the_weights(problem) -> None:
    p = problem(4, 8, 300, 4)
    rule = UpdateRule("sgd", weight_decay=0.5)
    before = p.copy()
    value, d_x = step(p.rows(0, 0), ClassifierState(), rule, "bce", lr=0.1, rows=1)
    assert value == 0
    assert d_x.shape == (0, 8)
    torch.testing.assert_close(p.weight, before.weight * 0.95)
    assert torch.equal(p.bias, before.bias)


@kinds
def test_repeats_bit_for_bit(kind, problem, two_threads) -> None:
    p = problem(100, 64, 2048, 16)
    rule = UpdateRule(kind)
    results = []
    for _ in range(2):
        own = p.copy()
        state = make_state(own.weight, own.bias, rule)
        for number in (1, 2):
            result = step(own, state, rule, "bce", number)
        results.append((*result, own.weight, own.bias))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_holds_what_the_rule_needs_and_no_more() -> None:
    weight, bias = torch.zeros(10, 3), torch.zeros(10)
    sizes = {}
    for kind in KINDS:
        state = make_state(weight, bias, UpdateRule(kind))
        sizes[kind] = sum(t.numel() for t in vars(state).values() if t is not None)
    assert sizes == {"sgd": 0, "momentum": 40, "adamw": 80, "adagrad": 40}


def test_two_python_threads_train_two_layers_at_once(problem, two_threads) -> None:
    p = problem(32, 64, 4096, 16)
    rule = UpdateRule("adamw")

    def train() -> torch.Tensor:
        own = p.copy()
        state = make_state(own.weight, own.bias, rule)
        for number in range(1, 9):
            step(own, state, rule, "bce", number)
        return own.weight

    expected, results = train(), []
    workers = [threading.Thread(target=lambda: results.append(train())) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_operator_contract(sparse, problem) -> None:
    p = problem(4, 6, 10, 6)
    index = p.index if sparse else None
    tensors = (p.x, p.weight, index, p.bias, None, None, p.indptr, p.indices)
    state = make_state(p.weight, p.bias, UpdateRule("adamw"))
    narrow = make_state(p.weight, p.bias, UpdateRule("adamw", moment_dtype="float8"))
    kept = ClassifierState(grad_weight=0 * p.weight, grad_bias=0 * p.bias)
    numbers = ([0.9, 0.9, 0.99, 1e-8, 0.1], 0.1, 1, 0.25)
    for arguments in (
        (*tensors, *vars(state).values(), "bce", "adamw", *numbers, True),
        (*tensors, *vars(kept).values(), "squared_hinge", "sgd", *numbers, False),
    ):
        torch.library.opcheck(torch.ops.xmc.classifier_step.default, arguments)
    # Its other checks compare tensors, which torch cannot do in float8.
    arguments = (*tensors, *vars(narrow).values(), "bce", "adamw", *numbers, True)
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.xmc.classifier_step.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.xmc.classifier_loss_and_grad.default, (*tensors, "bce", 0.25))


def test_compiles_as_one_graph(problem) -> None:
    p = problem(6, 12, 20, 3)
    rule = UpdateRule("momentum")

    def train(layer, state):
        x = torch.tanh(p.x)
        return classifier_step_(
            x,
            layer.weight,
            p.index,
            layer.bias,
            p.indptr,
            p.indices,
            loss="bce",
            rule=rule,
            state=state,
            lr=0.1,
            step=1,
            grad_scale=0.5,
        )

    results = []
    for function in (train, torch.compile(train, backend="aot_eager", fullgraph=True)):
        own = p.copy()
        results.append((*function(own, make_state(own.weight, own.bias, rule)), own.weight))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "expected a loss of bce, squared_hinge, got 'mse'"),
        ({"step": 0}, "expected step from 1 on, got 0"),
        (
            {"state": ClassifierState()},
            r"expected state.weight_m of shape \[10, 3\] for adamw, got None",
        ),
        (
            {"state": make_state(torch.zeros(9, 3), torch.zeros(10), UpdateRule("adamw"))},
            r"expected state.weight_m of shape \[10, 3\] for adamw, got \[9, 3\]",
        ),
    ],
)
def test_wrong_options(changes, message, problem) -> None:
    p = problem(4, 8, 10, 3)
    rule = UpdateRule("adamw")
    options = {
        "loss": "bce",
        "rule": rule,
        "state": make_state(p.weight, p.bias, rule),
        "lr": 0.1,
        "step": 1,
        "grad_scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        classifier_step_(*p.tensors, **(options | changes))


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"expected an update rule of sgd, .* got 'lion'"):
        UpdateRule("lion")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.full((4, 8), float("nan")), "expected finite features, row 0 has NaN"),
        (4, torch.tensor([0, 1, 2, 3, 9]), "expected labels with an indptr from 0 to"),
        (5, torch.full((13,), 10).int(), r"expected labels in \[0, 10\), got 10 to 10"),
    ],
)
def test_wrong_values_are_found_before_anything_is_written(
    position, value, message, problem
) -> None:
    p = problem(4, 8, 10, 3, density=0.05)
    tensors = list(p.tensors)
    if position == 5:
        value = value[:1].repeat(len(p.indices))
    tensors[position] = value
    before = p.copy()
    with pytest.raises(ValueError, match=message):
        classifier_step_(
            *tensors,
            loss="bce",
            rule=UpdateRule("sgd"),
            state=ClassifierState(),
            lr=0.1,
            step=1,
            grad_scale=1.0,
        )
    assert torch.equal(p.weight, before.weight)


def test_a_column_out_of_range_is_an_error_not_a_crash(problem) -> None:
    p = problem(3, 8, 5, 2)
    p.index[4, 1] = 9
    with pytest.raises(ValueError, match=r"expected index values in \[0, 8\), label 4 has \d to 9"):
        step(p, ClassifierState(), UpdateRule("sgd"), "bce")
