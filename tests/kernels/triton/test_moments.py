"""float8 moments in the Triton step: codes of the definition from what a float32 step makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xmc_kernels import float8, rounding
from xmc_kernels.classifier import UpdateRule, classifier_step_
from xmc_kernels.layer import Layer
from xmc_kernels.update import ClassifierState, make_state

CASES = [
    # form, (B, D, L, F or pattern, G), dtype: rows of slots whole and in parts, tiles of the batch
    ("walk", (9, 31, 18, 7, 1), torch.float32),
    ("walk", (5, 90, 6, 77, 1), torch.float32),
    ("walk", (140, 20, 3, 5, 1), torch.bfloat16),
    ("walk", (140, 80, 20, 70, 20), float8.DTYPE),
    ("walk", (16, 32, 32, 16, 16), torch.float32),
    ("walk", (9, 32, 12, (3, 8), 1), float8.DTYPE),
    ("densify", (9, 31, 18, 7, 1), torch.float32),
    ("densify", (9, 32, 12, (3, 8), 4), float8.DTYPE),
    ("densify", (6, 12, 20, None, 1), torch.float32),
    ("blocks", (9, 40, 33, (3, 8), 1), torch.bfloat16),
    ("blocks", (140, 64, 20, (2, 32), 20), float8.DTYPE),
]
cases = pytest.mark.parametrize(("form", "shape", "dtype"), CASES, ids=str)
kinds = pytest.mark.parametrize("kind", ["adamw", "momentum"])


@pytest.fixture
def few_labels(monkeypatch):
    """Chunks of some labels, so that there are several."""
    from xmc_kernels._triton import densify, tiles

    monkeypatch.setattr(densify, "dense_labels", lambda x, num_labels: min(num_labels, 8))
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 0)


@pytest.fixture
def make(problem, patterned, device):
    """`make(shape, dtype)`: a problem and its layer, gradients of its rows far apart."""

    def build(shape, dtype):
        B, D, L, slots, group = shape
        if isinstance(slots, tuple):
            p, _ = patterned(B, D, L, slots, group)
        else:
            p = problem(B, D, L, slots or D, group)
        p = replace(p, x=p.x * torch.logspace(0, -20, D, base=2))
        weight, scale, pattern = p.weight, None, slots if isinstance(slots, tuple) else None
        if dtype == float8.DTYPE:
            scale = float8.row_scale(weight)
            weight, scale = float8.quantize(weight, scale), scale.to(device)
        index = None if slots is None else p.index.to(device)
        layer = Layer(weight.to(device, dtype), index, p.bias.to(device), pattern, scale)
        return p, layer

    return build


def copied(layer: Layer) -> Layer:
    tensors = (layer.weight, layer.index, layer.bias, layer.scale)
    weight, index, bias, scale = (None if t is None else t.clone() for t in tensors)
    return Layer(weight, index, bias, layer.pattern, scale)


def step(p, layer, rule, state, form, number, *, update=True, rows=None, row_offset=0):
    from xmc_kernels._triton import classifier

    device = layer.weight.device
    return classifier.classifier_step(
        *(p.x.to(device), layer, p.indptr.to(device), p.indices.to(device), state),
        *("squared_hinge", rule, 0.1, number, 1 / (rows or len(p.x)), update, 7),
        by=form,
        deterministic=True,
        row_offset=row_offset,
    )


@pytest.mark.parametrize(("form", "shape", "dtype"), [CASES[n] for n in (1, 5, 7, 9)], ids=str)
def test_a_part_of_the_labels_rounds_like_the_whole(form, shape, dtype, make) -> None:
    p, layer = make(shape, dtype)
    p = replace(p, indptr=torch.zeros_like(p.indptr), indices=p.indices[:0])
    rule, group = UpdateRule("adamw", moment_dtype="float8"), layer.group

    def after(first: int) -> list[torch.Tensor]:
        """Of the labels from the groups `first` on."""
        tensors = (layer.weight, layer.bias, layer.scale)
        weight, bias, scale = (None if t is None else t[first * group :].clone() for t in tensors)
        index = None if layer.index is None else layer.index[first:]
        own = Layer(weight, index, bias, layer.pattern, scale)
        state = make_state(weight, bias, rule)
        step(p, own, rule, state, form, 1, row_offset=first * group)
        made = (weight, scale, state.weight_m, state.weight_v, state.weight_m_scale)
        return [t.float() for t in made if t is not None]

    first = layer.num_labels // group // 2
    for whole, part in zip(after(0), after(first), strict=True):
        assert torch.equal(part, whole[first * group :])


@kinds
@cases
def test_a_step_rounds_what_a_float32_step_makes(
    form, shape, dtype, kind, make, few_labels, poisoned
) -> None:
    from xmc_kernels._triton.launch import INTERPRETED

    p, layer = make(shape, dtype)
    rule = UpdateRule(kind, weight_decay=0.1, moment_dtype="float8")
    plain = replace(rule, moment_dtype="float32")
    state = make_state(layer.weight, layer.bias, rule)
    for number in (1, 2):
        exact, wide = copied(layer), ClassifierState(bias_m=state.bias_m.clone())
        wide.bias_v = None if state.bias_v is None else state.bias_v.clone()
        wide.weight_m = float8.dequantize(state.weight_m, state.weight_m_scale)
        if kind == "adamw":
            wide.weight_v = float8.dequantize(state.weight_v, state.weight_v_scale).square()
        expected = step(p, exact, plain, wide, form, number)
        got = step(p, layer, rule, state, form, number)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(layer.bias, exact.bias)
        torch.testing.assert_close(layer.weight.float(), exact.weight.float(), rtol=1e-5, atol=1e-6)
        stored = [(state.weight_m, state.weight_m_scale, wide.weight_m, rounding.MEAN)]
        if kind == "adamw":
            root = wide.weight_v.sqrt()
            stored.append((state.weight_v, state.weight_v_scale, root, rounding.ROOT))
        for codes, scale, value, stream in stored:
            value = value.cpu()
            rows, columns = (torch.arange(size) for size in value.shape)
            key = rounding.stream_key(7, number, stream)
            bits = rounding.noise(key, rows[:, None], columns, float8.NOISE_BITS)
            expected_scale = float8.row_scale(value)
            vanish = stream == rounding.MEAN
            defined = float8.quantize(value, expected_scale, bits, vanish=vanish)
            assert torch.equal(scale.cpu(), expected_scale)
            same = codes.cpu().view(torch.uint8) == defined.view(torch.uint8)
            share = same.double().mean().item()
            # Compiled for float8 or float32 a kernel may add and multiply in another order.
            assert share == 1 if INTERPRETED else share > 0.98, share


@pytest.mark.parametrize("form", ["walk", "densify"])
def test_accumulated_gradients_are_applied_with_the_last_part(form, make, few_labels) -> None:
    p, layer = make((12, 16, 20, 16, 1), torch.float32)
    rule = UpdateRule("adamw", moment_dtype="float8")
    whole = copied(layer)
    whole_state, state = (make_state(layer.weight, layer.bias, rule) for _ in range(2))
    step(p, whole, rule, whole_state, form, 1)
    state.grad_weight, state.grad_bias = (
        torch.zeros_like(layer.weight),
        torch.zeros_like(layer.bias),
    )
    before = layer.weight.clone()
    step(p.rows(0, 5), layer, rule, state, form, 1, update=False, rows=12)
    assert torch.equal(layer.weight, before)
    assert not state.weight_m.view(torch.uint8).any()
    step(p.rows(5, 12), layer, rule, state, form, 1, rows=12)
    torch.testing.assert_close(layer.weight, whole.weight, rtol=1e-3, atol=1e-4)
    same = state.weight_m.view(torch.uint8) == whole_state.weight_m.view(torch.uint8)
    assert same.double().mean() > 0.95


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, float8.DTYPE], ids=str)
@pytest.mark.parametrize("slots", [64, 200, (4, 8), (4, 32), None], ids=str)
@pytest.mark.parametrize("group", [1, 16])
def test_the_operation_on_a_gpu_equals_the_cpu(group, slots, dtype, kind, make) -> None:
    if slots is None and (group > 1 or dtype == float8.DTYPE):
        pytest.skip("a dense layer has no groups")
    p, layer = make((150, 256, 16 * 150, slots, group), dtype)
    rule = UpdateRule(kind, moment_dtype="float8")
    results, codes = [], []
    for where in ("cpu", "cuda"):
        tensors = (layer.weight, layer.index, layer.bias, layer.scale)
        weight, index, bias, scale = (
            None if t is None else t.to(where, copy=True) for t in tensors
        )
        state = make_state(weight, bias, rule)
        for number in (1, 2):
            value, d_x = classifier_step_(
                *(p.x.to(where), weight, index, bias, p.indptr.to(where), p.indices.to(where)),
                **{"pattern": layer.pattern, "scale": scale, "loss": "bce", "rule": rule},
                **{"state": state, "lr": 1e-4, "step": number, "grad_scale": 1 / 150, "seed": 3},
            )
        results.append([t.float().cpu() for t in (value, d_x, bias)])
        codes.append(float8.dequantize(state.weight_m.cpu(), state.weight_m_scale.cpu()))
    for ours, expected in zip(results[1], results[0], strict=True):
        error = expected.abs().max().item() * 1e-2
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=error)
    # A sum that differs in its last bits may draw the other of two neighbours.
    assert (codes[0] == codes[1]).double().mean() > 0.9
