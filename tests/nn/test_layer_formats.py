"""FixedFanInLinear with N:M patterns and with float8 weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from xmc.nn.fan_in import FixedFanIn, FixedFanInLinear
from xmc.nn.pattern import draw_pattern_
from xmc_kernels import float8
from xmc_kernels.checks import validate_index
from xmc_kernels.packing import packed_bytes, unpack_index

PATTERNS = [(2, 4), (3, 8), (1, 16), (20, 32)]


def layer_of(pattern: tuple[int, int], group_size: int = 1) -> FixedFanInLinear:
    n, m = pattern
    layer = FixedFanInLinear(64, 12, n * 64 // m, group_size=group_size, pattern=pattern)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_is_a_layer_like_any_other(pattern, group_size) -> None:
    layer = layer_of(pattern, group_size)
    dense = layer.to_dense()
    blocks = (dense.weight != 0).unflatten(1, (-1, pattern[1])).sum(2)
    assert (blocks == pattern[0]).all()
    assert layer.index.shape == (12 // group_size, packed_bytes(layer.fan_in, pattern))
    x = torch.randn(5, 64, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    out, expected = layer(x), dense(x_dense)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, x_dense.grad)
    assert layer.weight.grad is not None
    at = layer.matrix._label_inputs().long()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad.gather(1, at))
    torch.testing.assert_close(layer.to_csr().toarray(), dense.weight.detach().numpy())


@pytest.mark.parametrize("group_size", [1, 3])
def test_from_dense_keeps_the_largest_of_each_block(group_size) -> None:
    dense = torch.randn(6, 32)
    dense[0, 8:16] = 1.0  # ties: the lower inputs
    matrix = FixedFanIn.from_dense(dense, 8, group_size, (2, 8))
    matrix.validate()
    score = dense.double().reshape(-1, group_size, 32).abs().mean(1)
    for row, inputs in enumerate(matrix.inputs().tolist()):
        for block in range(4):
            ranked = sorted(range(8 * block, 8 * block + 8), key=lambda i: (-score[row, i], i))
            assert inputs[2 * block : 2 * block + 2] == sorted(ranked[:2])
    kept = matrix.to_dense()
    assert torch.equal(kept[kept != 0], dense[kept != 0])


def test_every_subset_of_a_block_is_equally_likely() -> None:
    index = torch.empty(30_000, packed_bytes(4, (2, 4)), dtype=torch.uint8)
    draw_pattern_(index, 8, (2, 4))
    validate_index(index, 8, (2, 4))
    inputs = unpack_index(index, (2, 4), 4)
    for block in (inputs[:, :2], inputs[:, 2:] - 4):
        counts = torch.bincount((1 << block).sum(1)).double()
        counts = counts[counts > 0]
        assert len(counts) == math.comb(4, 2)
        assert float(((counts - 5_000) ** 2 / 5_000).sum()) < 25.7  # 5 degrees, p = 1e-4


def test_a_pattern_survives_files_and_refuses_a_bad_index() -> None:
    layer, other = layer_of((3, 8)), layer_of((3, 8))
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other.to_dense().weight, layer.to_dense().weight)
    state = layer.state_dict()
    state["index"] = torch.zeros_like(state["index"])
    with pytest.raises(RuntimeError, match="index: expected sorted, distinct values"):
        other.load_state_dict(state)
    state["index"] = torch.zeros(12, 24, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"index of shape \[12, 9\], got \[12, 24\]"):
        other.load_state_dict(state)
    assert "pattern=(3, 8)" in repr(layer)
    half = copy.deepcopy(layer).bfloat16()
    assert torch.equal(half.index, layer.index)
    with pytest.raises(ValueError, match="expected fan-in 24 for 3 of every 8 of 64 features"):
        FixedFanInLinear(64, 12, 23, pattern=(3, 8))


def float8_layer() -> FixedFanInLinear:
    return FixedFanInLinear(40, 30, 7, dtype=float8.DTYPE)


def test_a_float8_layer_counts_scaled_weights() -> None:
    layer = float8_layer()
    numbers = layer.matrix.numbers()
    assert numbers.dtype == torch.float32
    assert 0.9 < numbers.abs().max() * 7**0.5 <= 1.0
    assert torch.equal(float8.row_scale(numbers), layer.weight_scale)
    x = torch.randn(5, 40, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, layer.to_dense()(x))
    assert not layer.weight.requires_grad
    out.sum().backward()
    assert layer.bias is not None
    assert x.grad is not None
    torch.testing.assert_close(layer.bias.grad, torch.full((30,), 5.0))
    torch.testing.assert_close(x.grad, layer.to_dense().weight.sum(0).expand(5, 40))


def test_float8_weights_survive_casts_files_and_copies() -> None:
    layer = float8_layer()
    for cast in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        moved = cast(copy.deepcopy(layer))
        assert moved.weight.dtype == float8.DTYPE
        assert torch.equal(moved.matrix.to_dense(), layer.matrix.to_dense())
    other = float8_layer()
    other.load_state_dict(layer.state_dict())
    again = FixedFanInLinear.from_fixed_fan_in(layer.matrix, layer.bias)
    for each in (other, again):
        assert torch.equal(each.matrix.to_dense(), layer.matrix.to_dense())
    with pytest.raises(
        ValueError, match="a scale for float8, int8 and int4 weights and for no others"
    ):
        FixedFanIn(layer.weight, layer.index, 40).validate()
    with pytest.raises(ValueError, match=r"scale of shape \[30\] to match weight, got \[29\]"):
        FixedFanIn(layer.weight, layer.index, 40, scale=torch.ones(29)).validate()
