"""The score of one label for a tile of rows, and the layer it comes from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from xmc_kernels._cpu.tiles import flat
from xmc_kernels._cpu.vector import add, fill, fma, load, width_of


class Layer(NamedTuple):
    """Flat views: weight [L * F], indices [L/G * F], bias [L] or empty."""

    weight: np.ndarray
    indices: np.ndarray
    bias: np.ndarray
    num_labels: int
    fan_in: int
    group: int


def make_layer(weight: Tensor, index: Tensor, bias: Tensor | None) -> Layer:
    """Views of contiguous float32 tensors; index is copied where it is not contiguous."""
    num_labels, fan_in = weight.shape
    indices = index.contiguous().view(-1).numpy()
    return Layer(
        flat(weight), indices, flat(bias), num_labels, fan_in, num_labels // index.shape[0]
    )


def raise_bad_index(index: Tensor, num_labels: int, features: int, bad: list[int]) -> None:
    """Raise ValueError for the first label that a kernel refused; -1 stands for none."""
    refused = [label for label in bad if label >= 0]
    if refused:
        values = index[refused[0] // (num_labels // index.shape[0])].long()
        raise ValueError(
            f"expected index values in [0, {features}), label {refused[0]} has "
            f"{int(values.min())} to {int(values.max())}"
        )


@njit(forceinline=True)
def out_of_range(index, row, fan_in, features):
    """Whether a sorted index row leaves [0, features)."""
    return index[row] < 0 or index[row + fan_in - 1] >= features


@njit(forceinline=True)
def label_score(score, x, base, weight, w, index, row, fan_in):
    """`score + sum_k weight[w + k] * x[base + index[row + k] * width :][:width]`, of pointers.

    Two chains of multiply-adds hide half of their latency.
    """
    width = width_of(score)
    other = fill(score, np.float32(0))
    for k in range(0, fan_in - 1, 2):
        at = base + np.intp(index[row + k]) * width
        score = fma(fill(score, weight[w + k]), load(score, x, at), score)
        at = base + np.intp(index[row + k + 1]) * width
        other = fma(fill(score, weight[w + k + 1]), load(score, x, at), other)
    if fan_in % 2:
        k = fan_in - 1
        at = base + np.intp(index[row + k]) * width
        score = fma(fill(score, weight[w + k]), load(score, x, at), score)
    return add(score, other)
