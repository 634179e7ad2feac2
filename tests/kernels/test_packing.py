"""N:M patterns: packed indices, and the operations on them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from xmc_kernels.checks import validate_index
from xmc_kernels.classifier import (
    UpdateRule,
    classifier_loss_and_grad,
    classifier_step_,
    make_state,
)
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.packing import pack_index, packed_bytes, unpack_index
from xmc_kernels.topk import fan_in_topk

PATTERNS = [(2, 4), (1, 8), (3, 8), (2, 16), (5, 32), (8, 8)]


def bits_of(row: list[int], pattern: tuple[int, int]) -> list[int]:
    """A row's bytes by the book: a string of bits, lowest first."""
    n, m = pattern
    width = m.bit_length() - 1
    stream = "".join(format(value % m, f"0{width}b")[::-1] for value in row)
    assert all(value // m == k // n for k, value in enumerate(row))
    return [int(stream[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(stream), 8)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_are_packed_bit_after_bit(pattern, patterned) -> None:
    p, index = patterned(3, 96, 10, pattern)
    expected = [bits_of(row, pattern) for row in index.tolist()]
    assert pack_index(index, pattern).tolist() == expected
    assert p.index.shape[1] == packed_bytes(index.shape[1], pattern) == len(expected[0])
    assert torch.equal(unpack_index(p.index, pattern, index.shape[1]), index)
    validate_index(p.index, 96, pattern)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_operations_equal_those_on_the_unpacked_index(pattern, group, patterned) -> None:
    """Those are tested against the dense truth."""
    p, index = patterned(9, 32, 24, pattern, group)
    plain = replace(p, index=index)
    leaves = [[t.clone().requires_grad_() for t in (p.x, p.weight, p.bias)] for _ in range(2)]
    outs = []
    for q, (x, weight, bias), options in zip(
        (plain, p), leaves, ({}, {"pattern": pattern}), strict=True
    ):
        outs.append(fan_in_linear(x, weight, q.index, bias, **options))
        outs[-1].square().sum().backward()
    torch.testing.assert_close(*outs)
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        fan_in_topk(*p.layer, 4, pattern=pattern), fan_in_topk(*plain.layer, 4)
    )
    options = {"loss": "bce", "grad_scale": 0.2}
    torch.testing.assert_close(
        classifier_loss_and_grad(*p.tensors, pattern=pattern, **options),
        classifier_loss_and_grad(*plain.tensors, **options),
    )
    rule = UpdateRule("adamw", weight_decay=0.1)
    results = []
    for q, form in ((p, {"pattern": pattern}), (plain, {})):
        own = q.copy()
        state = make_state(own.weight, own.bias, rule)
        for step in (1, 2):
            value, d_x = classifier_step_(
                *own.tensors, rule=rule, state=state, lr=0.1, step=step, **options, **form
            )
        results.append((value, d_x, own.weight, own.bias, state.weight_m, state.weight_v))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_a_pattern_is_named(patterned) -> None:
    p, index = patterned(3, 32, 6, (2, 8))

    def call(*layer, **options):
        return fan_in_linear(p.x, *layer, **options)

    for pattern, message in (
        ((2, 7), r"m of \(4, 8, 16, 32\), got m = 7"),
        ((9, 8), r"n in \[1, 8\], got n = 9"),
        ((1, 8), "expected fan-in 4 for 1 of every 8 of 32 features, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call(p.weight, p.index, pattern=pattern)
    with pytest.raises(ValueError, match="divide 12 features by 8"):
        fan_in_linear(p.x[:, :12], p.weight, p.index, pattern=(2, 8))
    with pytest.raises(TypeError, match="index of uint8 for pattern"):
        call(p.weight, index, pattern=(2, 8))
    with pytest.raises(ValueError, match=r"shape \[6, 3\] to match weight, got \[6, 2\]"):
        call(p.weight, p.index[:, :2], pattern=(2, 8))
    with pytest.raises(TypeError, match=r"uint16 or int32, got torch\.uint8"):
        call(p.weight, p.index)
    with pytest.raises(ValueError, match="an index for pattern"):
        fan_in_topk(p.x, torch.ones(6, 32), None, None, 1, pattern=(2, 8))


def test_validation_finds_a_repeated_input(patterned) -> None:
    p, index = patterned(3, 32, 6, (2, 8))
    index[4, 3] = index[4, 2]
    with pytest.raises(ValueError, match="row 4 has not"):
        validate_index(pack_index(index, (2, 8)), 32, (2, 8))
    with pytest.raises(ValueError, match="rows of 3 bytes for pattern"):
        validate_index(p.index[:, :1], 32, (2, 8))
    with pytest.raises(TypeError, match="index of uint8"):
        validate_index(index, 32, (2, 8))


def test_tiles_of_packing_do_not_matter(patterned, monkeypatch) -> None:
    from xmc_kernels import packing

    p, index = patterned(1, 96, 50, (3, 8))
    monkeypatch.setattr(packing, "_TILE", random.Random(0).randrange(40, 400))
    assert torch.equal(pack_index(index, (3, 8)), p.index)
    assert torch.equal(unpack_index(p.index, (3, 8), 36), index)
