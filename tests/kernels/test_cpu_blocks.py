"""Blocks of labels on the CPU: sums in registers against plain numpy, in whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from xmc_kernels._cpu import blocks, labels, vector
from xmc_kernels._cpu.tiles import WIDTHS
from xmc_kernels.layer import Layer

D, F = 40, 16


def whole_numbers(*shape):
    return np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_labels_that_share_inputs(width, count) -> None:
    inputs = 16 // count

    @njit
    def run(grads, x, d_x, weight, index, into):
        like = blocks.repeat(count, vector.splat(width, np.float32(0)))
        g = blocks.load_rows(like, vector.pointer(grads), 0)
        p_x, p_d_x, p_into = vector.pointer(x), vector.pointer(d_x), vector.pointer(into)
        p_weight, p_index = vector.pointer(weight), vector.pointer(index)
        for k in range(0, F - inputs, inputs):
            blocks.add_gradients(g, p_x, p_d_x, 0, p_weight, k, F, p_index, k, p_into, k)
        for k in range(F - inputs, F):
            blocks.add_gradient(g, p_x, p_d_x, 0, p_weight, k, F, p_index, k, p_into, k)

    grads, x, d_x = (whole_numbers(n, width) for n in (count, D, D))
    weight, into = whole_numbers(count, F), whole_numbers(count, F)
    index = np.sort(np.random.default_rng(1).permutation(D)[:F]).astype(np.uint16)
    want_d_x, want_into = d_x.copy(), into + grads @ x[index].T
    want_d_x[index] += weight.T @ grads
    run(grads, x, d_x, weight, index, into)
    assert (d_x == want_d_x).all()
    assert (into == want_into).all()


@pytest.mark.parametrize("width", [4, 8, *WIDTHS])
def test_scores_of_slots_and_of_labels(width) -> None:
    @njit
    def run(x, weight, index, scores, out):
        zero = vector.splat(width, np.float32(0))
        p_x, p_weight, p_index = vector.pointer(x), vector.pointer(weight), vector.pointer(index)
        p_scores, p_out = vector.pointer(scores), vector.pointer(out)
        slots = blocks.add_slots(blocks.repeat(4, zero), p_x, 0, p_weight, 0, p_index, 0)
        vector.store(p_out, 0, blocks.total(slots))
        sums = blocks.fill_rows(blocks.repeat(4, zero), p_scores, 0)
        for k in range(F):
            sums = blocks.add_labels(sums, p_x, np.intp(index[k]) * width, p_weight, k, F)
        blocks.store_rows(p_out, width, sums)

    x, weight, scores = whole_numbers(D, width), whole_numbers(4, F), whole_numbers(4)
    index = np.arange(0, 2 * F, 2).astype(np.int32)
    out = np.full((5, width), np.nan, np.float32)
    run(x, weight, index, scores, out)
    assert (out[0] == weight[0, :4] @ x[index[:4]]).all()
    assert (out[1:] == scores[:, None] + weight @ x[index]).all()


def test_as_many_labels_at_once_as_fit_the_registers(monkeypatch) -> None:
    def at_once(group, width):
        index = torch.zeros(96 // group, 4, dtype=torch.uint16)
        return labels.shared_labels(Layer(torch.zeros(96, 4), index, None), width)

    monkeypatch.setattr(labels, "_register_floats", lambda: 512)
    assert [at_once(group, 64) for group in (1, 2, 3, 4, 48)] == [1, 2, 2, 4, 4]
    assert [at_once(48, width) for width in (4, 16, 32)] == [8, 8, 8]
    monkeypatch.setattr(labels, "_register_floats", lambda: 128)
    assert [at_once(48, width) for width in (16, 32, 64)] == [4, 2, 1]
