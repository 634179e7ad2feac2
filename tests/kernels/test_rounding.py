"""Stochastic rounding to bfloat16: unbiased, reproducible, and what makes small steps count."""

from __future__ import annotations

import pytest
import torch

from xmc_kernels import float8, rounding
from xmc_kernels.classifier import ClassifierState, UpdateRule, classifier_step_, make_state


def by_torch(value, key):
    rows, columns = (torch.arange(size) for size in value.shape)
    return rounding.stochastic_round(value, rounding.noise(key, rows[:, None], columns))


def by_triton(value, key):
    pytest.importorskip("triton")
    from xmc_kernels._triton.update import round_to_bfloat16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return round_to_bfloat16(value.to(device), key).cpu()


both = pytest.mark.parametrize("rounded", [by_torch, by_triton])


@both
def test_is_unbiased_and_only_goes_to_a_neighbour(rounded) -> None:
    # A value p of the way from one bfloat16 number to the next goes up with probability p.
    up = torch.tensor([0.0, 1 / 65536, 0.1, 0.25, 0.5, 0.9, 65535 / 65536])
    count = 40_000
    for low, step in ((1.0, 2**-7), (-3.0, -(2**-6)), (1e-30, None)):
        low = torch.tensor(low).bfloat16()
        following = (low.view(torch.int16) + 1).view(torch.bfloat16).float()
        low = low.float()
        assert step is None or following - low == step
        value = (low + up * (following - low)).repeat(count, 1)
        got = rounded(value, rounding.stream_key(1, 2, rounding.WEIGHT)).float()
        assert ((got == low) | (got == following)).all()
        share = (got == following).double().mean(0)
        # Five standard deviations of a mean of `count` draws.
        exact = ((value[0] - low) / (following - low)).double()
        assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / count).sqrt() + 1e-12).all()


@both
def test_keeps_what_needs_no_rounding_and_what_is_not_finite(rounded) -> None:
    value = torch.randn(30, 30).bfloat16().float()
    value[0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    value[1, 0] = torch.nan
    got = rounded(value, 12345).float()
    torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)


def test_every_backend_draws_the_same() -> None:
    value = torch.randn(50, 37) * torch.logspace(-8, 8, 37)
    key = rounding.stream_key(5, 7, rounding.BIAS)
    assert torch.equal(by_torch(value, key), by_triton(value, key))


def test_rows_under_an_offset_draw_like_those_of_the_whole() -> None:
    columns = torch.arange(30)
    whole = rounding.noise(rounding.stream_key(4, 9, 1), torch.arange(100)[:, None], columns)
    for offset in (1, 7, 64):
        key = rounding.stream_key(4, 9, 1, offset)
        part = rounding.noise(key, torch.arange(100 - offset)[:, None], columns)
        assert torch.equal(part, whole[offset:])


def test_an_offset_below_zero_is_refused(problem) -> None:
    with pytest.raises(ValueError, match="expected row_offset of at least 0, got -1"):
        classifier_step_(
            *problem(3, 8, 6, 2).tensors,
            **{"loss": "bce", "rule": UpdateRule("sgd"), "state": ClassifierState(), "lr": 0.1},
            **{"step": 1, "grad_scale": 1.0, "row_offset": -1},
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, float8.DTYPE])  # compiled, and the reference
def test_a_part_of_the_labels_rounds_like_the_whole(dtype, problem) -> None:
    p = problem(6, 20, 50, 8)
    rule = UpdateRule("adamw", moment_dtype="float8" if dtype == float8.DTYPE else "float32")
    scale = float8.row_scale(p.weight) if dtype == float8.DTYPE else None
    weight = p.weight.to(dtype) if scale is None else float8.quantize(p.weight, scale)
    bias = p.bias.bfloat16() if scale is None else p.bias
    none = torch.zeros_like(p.indptr), torch.zeros(0, dtype=torch.int32)

    def step(start: int, stop: int) -> list[torch.Tensor]:
        tensors = (weight, p.index, bias, scale)
        own = [None if t is None else t[start:stop].clone() for t in tensors]
        state = make_state(own[0], own[2], rule)
        options = {"loss": "bce", "rule": rule, "state": state, "lr": 0.1, "step": 2, "seed": 3}
        classifier_step_(
            *(p.x, *own[:3], *none), **options, grad_scale=0.2, scale=own[3], row_offset=start
        )
        after = (own[0], own[2], own[3], state.weight_m, state.weight_v)
        return [t.float() for t in after if t is not None]

    for whole, part in zip(step(0, 50), step(31, 50), strict=True):
        assert torch.equal(part, whole[31:])


def test_draws_depend_on_seed_step_tensor_row_and_column() -> None:
    rows, columns = torch.arange(200)[:, None], torch.arange(200)
    draws = [
        rounding.noise(rounding.stream_key(*key), rows, columns).double()
        for key in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**40 - 1, 1, 0))
    ]
    draws += [draws[0].roll(1, 0), draws[0].roll(1, 1), draws[0].T]
    flat = torch.stack([d.flatten() for d in draws])
    assert flat.min() >= 0
    assert flat.max() < 65536
    # Uncorrelated: five standard deviations of a correlation of n pairs.
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5
    mean = flat.mean(1)
    assert ((mean - 32767.5).abs() < 5 * 65536 / (12 * flat.shape[1]) ** 0.5).all()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_too_small_for_bfloat16_arrive_on_average(kind, problem) -> None:
    # 4096 labels with the same weights: a step of 1/50 of the spacing, a hundred times.
    lr = 2**-8 / 50
    weight = torch.ones(4096, 1, dtype=torch.bfloat16) * 0.75
    index = torch.zeros(4096, 1, dtype=torch.uint16)
    x, empty = torch.ones(1, 1), torch.zeros(0, dtype=torch.int32)
    moments = {
        "weight_m": torch.zeros(4096, 1),
        "weight_v": torch.zeros(4096, 1),
    }
    state = ClassifierState(**moments) if kind == "adamw" else ClassifierState()
    for step in range(1, 101):
        classifier_step_(
            *(x, weight, index, None, torch.zeros(2, dtype=torch.int64), empty),
            loss="bce",
            rule=UpdateRule(kind),
            state=state,
            lr=lr,
            step=step,
            grad_scale=1.0,
            seed=3,
        )
    gradient = torch.sigmoid(torch.tensor(0.75)).item()
    expected = 0.75 - 100 * lr * (1.0 if kind == "adamw" else gradient)
    # Five standard deviations of a mean of 4096 sums of 100 draws, each up by 2^-8 or not.
    assert weight.float().mean().item() == pytest.approx(expected, abs=5 * 2**-8 * 1.4 / 64)


def test_a_step_repeats_with_its_seed_and_differs_with_another(problem) -> None:
    p = problem(6, 20, 50, 8).to(torch.bfloat16)
    results = []
    for seed in (1, 1, 2):
        own = p.copy()
        classifier_step_(
            *own.tensors,
            loss="bce",
            rule=UpdateRule("sgd"),
            state=ClassifierState(),
            lr=0.01,
            step=1,
            grad_scale=1.0,
            seed=seed,
        )
        results.append(own.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
