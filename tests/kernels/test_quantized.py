"""Layers of compressed models: int8 and int4 weights, indices packed into one block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_kernels import quantized
from xmc_kernels.checks import validate_index
from xmc_kernels.classifier import classifier_loss_and_grad
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.layer import Layer
from xmc_kernels.packing import one_block, pack_index, packed_bytes, unpack_index
from xmc_kernels.quantized import INT4, INT8, dequantize, quantize
from xmc_kernels.topk import fan_in_topk


def dense(x, weight, index, bias):
    """Scores [B, L] in float64, label by label."""
    group = len(weight) // len(index)
    scores = torch.empty(len(x), len(weight), dtype=torch.float64)
    for label in range(len(weight)):
        row = index[label // group].long()
        scores[:, label] = x.double()[:, row] @ weight[label].double() + bias[label].double()
    return scores


@pytest.mark.parametrize("dtype", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("fan_in", [1, 6, 7])
def test_weights_round_to_the_nearest_multiple_of_their_scale(dtype, fan_in) -> None:
    weight = torch.randn(50, fan_in)
    weight[3] = 0
    weight[4] *= 1e-30
    q, scale = quantize(weight, dtype)
    most = 127 if dtype == INT8 else 7
    assert q.shape == (50, fan_in if dtype == INT8 else (fan_in + 1) // 2)
    wide = dequantize(q, scale, fan_in, torch.float64)
    whole = wide / scale.double()[:, None]
    assert whole.abs().max() <= most
    assert torch.equal(whole, whole.round())
    inside = weight.abs() <= most * scale[:, None]
    error = (wide - weight).abs()[inside]
    assert bool((error <= 0.5001 * scale[:, None].expand_as(weight)[inside]).all())
    assert bool((wide[3] == 0).all())
    # What is cut off pays: no row errs more than without cutting.
    full = weight.abs().amax(1, keepdim=True) / most
    plain = torch.where(full > 0, (weight / full).round() * full, 0)
    errors = [(w.double() - weight).square().sum(1) for w in (wide, plain)]
    rounding = 1e-12 * weight.double().square().sum(1)
    assert bool((errors[0] <= errors[1] * (1 + 1e-4) + rounding).all())


def test_bytes_of_int4_by_the_book() -> None:
    q, scale = quantize(torch.tensor([[7.0, -7.0, 1.0]]), INT4)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[(7 + 8) | (-7 + 8) << 4, (1 + 8) | 8 << 4]]


def test_tiles_of_quantizing_do_not_matter(monkeypatch) -> None:
    weight = torch.randn(40, 6)
    whole = quantize(weight, INT4)
    monkeypatch.setattr(quantized, "_TILE", 31)
    for ours, expected in zip(quantize(weight, INT4), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("in_features", [5, 100, 300, 1000, 2000, 16_384, 32_768])
@pytest.mark.parametrize("fan_in", [1, 5, 8, 19])
def test_any_index_is_packed_into_one_block(in_features, fan_in, problem) -> None:
    fan_in = min(fan_in, in_features)
    index = problem(1, in_features, 30, fan_in).index
    pattern = one_block(fan_in, in_features)
    assert pattern is not None
    packed = pack_index(index.int(), pattern)
    bits = max(2, (in_features - 1).bit_length())
    assert packed.shape[1] == packed_bytes(fan_in, pattern) == -(-fan_in * bits // 8)
    assert torch.equal(unpack_index(packed, pattern, fan_in), index.int())
    validate_index(packed, in_features, pattern)


def test_an_index_of_16_bits_and_more_is_not_packed() -> None:
    assert one_block(4, 32_768) == (4, 32_768)
    assert one_block(4, 32_769) is None


@pytest.mark.parametrize(
    ("packed", "dtype"),
    [(False, INT8), (False, INT4), *((True, t) for t in (None, torch.bfloat16, INT8, INT4))],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("rows", "fan_in"), [(1, 32), (3, 7), (40, 12)])
def test_topk_reads_compressed_layers_as_they_are(
    packed, dtype, group, rows, fan_in, problem, as_accurate
) -> None:
    p = problem(rows, 600, 400, fan_in, group)
    weight, scale, wide = p.weight, None, p.weight
    if dtype == torch.bfloat16:
        weight = p.weight.bfloat16()
        wide = weight.float()
    elif dtype is not None:
        weight, scale = quantize(p.weight, dtype)
        wide = dequantize(weight, scale, fan_in)
    pattern = one_block(fan_in, 600) if packed else None
    index = pack_index(p.index.int(), pattern) if pattern else p.index
    truth = dense(p.x, wide, p.index, p.bias)
    exclude = (torch.arange(rows + 1), torch.full((rows,), 7, dtype=torch.int32))
    scores, labels = fan_in_topk(
        p.x, weight, index, p.bias, 5, pattern=pattern, scale=scale, exclude=exclude
    )
    truth[:, 7] = -torch.inf
    best = truth.topk(5).values
    plain = fan_in_topk(p.x, wide, p.index, p.bias, 5, exclude=exclude)[0]
    as_accurate(scores, plain, best)
    torch.testing.assert_close(truth.gather(1, labels), best, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(33, 3000), st.integers(1, 30), st.randoms())
def test_packed_topk_equals_plain_to_the_bit(fan_in, in_features, num_labels, random) -> None:
    fan_in = min(fan_in, in_features)
    rows = [sorted(random.sample(range(in_features), fan_in)) for _ in range(num_labels)]
    index = torch.tensor(rows, dtype=torch.int32)
    g = torch.Generator().manual_seed(num_labels)
    x = torch.randn(2, in_features, generator=g)
    weight = torch.randn(num_labels, fan_in, generator=g)
    pattern = one_block(fan_in, in_features)
    assert pattern is not None
    ours = fan_in_topk(x, weight, pack_index(index, pattern), None, 3, pattern=pattern)
    plain = fan_in_topk(x, weight, index.to(torch.uint16), None, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_dense_layers_of_integers_predict_too(problem) -> None:
    p = problem(3, 20, 30, 20)
    for dtype in (INT8, INT4):
        weight, scale = quantize(p.weight, dtype)
        wide = dequantize(weight, scale, 20)
        ours = fan_in_topk(p.x, weight, None, p.bias, 4, scale=scale)
        torch.testing.assert_close(ours, fan_in_topk(p.x, wide, None, p.bias, 4))


def test_errors_name_what_is_wrong(problem) -> None:
    p = problem(3, 600, 30, 8)
    weight, scale = quantize(p.weight, INT8)
    for operation in (
        lambda: fan_in_linear(p.x, weight, p.index, p.bias, scale=scale),
        lambda: classifier_loss_and_grad(
            *replace(p, weight=weight).tensors, scale=scale, loss="bce", grad_scale=1.0
        ),
    ):
        with pytest.raises(TypeError, match=r"only predict \(fan_in_topk\), got torch\.int8"):
            operation()
    with pytest.raises(TypeError, match="weight of float32"):
        fan_in_topk(p.x, weight, p.index, p.bias, 3)
    with pytest.raises(ValueError, match=r"scale of shape \[30\]"):
        fan_in_topk(p.x, weight, p.index, p.bias, 3, scale=scale[1:])
    with pytest.raises(ValueError, match=r"m of \(4, 8, 16, 32\), got m = 512"):
        fan_in_topk(p.x, weight, p.index, p.bias, 3, scale=scale, pattern=(8, 512))
    packed = pack_index(p.index.int(), (8, 1024))
    packed[4] = 255
    with pytest.raises(ValueError, match=r"in \[0, 600\), label 4 has"):
        fan_in_topk(p.x, p.weight, packed, p.bias, 3, pattern=(8, 1024))
    with pytest.raises(ValueError, match="finite weights, those of label 2 are not"):
        quantize(torch.tensor([[1.0], [2.0], [torch.nan]]), INT8)


def test_a_layer_of_half_bytes_knows_its_fan_in() -> None:
    weight = torch.zeros(4, 4, dtype=INT4)
    index = torch.zeros(4, 7, dtype=torch.uint16)
    assert Layer(weight, index, None).fan_in == 7
    assert Layer(weight, index, None, (7, 512)).fan_in == 7
    assert Layer(weight, index, None, (8, 512)).fan_in == 8


@pytest.mark.parametrize("pattern", [(1, 8), (3, 8), (5, 16), (2, 4)], ids=str)
def test_halves_of_several_blocks_give_the_scores_of_their_numbers(pattern, patterned) -> None:
    p, index = patterned(3, 32, 24, pattern)
    fan_in = index.shape[1]
    weight, scale = quantize(p.weight, INT4)
    assert Layer(weight, p.index, None, pattern, scale).fan_in == fan_in
    ours = fan_in_topk(p.x, weight, p.index, p.bias, 4, pattern=pattern, scale=scale)
    wide = dequantize(weight, scale, fan_in)
    torch.testing.assert_close(ours, fan_in_topk(p.x, wide, index, p.bias, 4))
