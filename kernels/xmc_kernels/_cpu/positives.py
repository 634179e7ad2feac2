"""Positive entries, few among very many: taken out of a vector of scores and treated one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from xmc_kernels._cpu.tiles import lower_bound
from xmc_kernels._cpu.vector import at_address

LOSSES = ("bce", "squared_hinge")
BCE = LOSSES.index("bce")
# Fields of the training step's record.
ADDRESSES = "keys columns positive_weight"
INTEGERS = "num_keys loss"
FLOATS = "as_positive as_negative"
_TAKEN = np.float32(-1e30)  # a score of which no loss and no gradient is left
_ZERO = np.float32(0)


def positive_fields(
    indptr: Tensor,  # [B+1]
    indices: Tensor,  # [nnz]
    num_labels: int,
    width: int,
    loss: str,
    smoothing: float,
    weight: Tensor | None,  # [L]
) -> dict[str, Any]:
    """The fields above: positives by tile and label (tile * L + label), with their columns there.

    Keep the result, it owns what the record points to.
    """
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr.numpy()))
    keys = rows // width * num_labels + indices.numpy()
    order = np.argsort(keys, kind="stable")
    return {
        "keys": keys[order],
        "columns": (rows % width)[order],
        "num_keys": len(keys),
        "loss": LOSSES.index(loss),
        "as_positive": 1 - smoothing,
        "as_negative": smoothing,
        "positive_weight": None if weight is None else weight.float().contiguous(),
    }


@njit(forceinline=True)
def first_positive(a, tile, label):
    """The position of the first positive of a tile from a label on."""
    return lower_bound(at_address(np.int64, a.keys), 0, a.num_keys, tile * a.num_labels + label)


@njit(forceinline=True)
def is_positive(a, position, tile, label):
    """Whether the positive at a position is one of this tile and label."""
    keys = at_address(np.int64, a.keys)
    return position < a.num_keys and keys[position] == tile * a.num_labels + label


@njit(error_model="numpy")
def take_out(a, position, tile, label, scores, gradients):
    """The value of the label's positives in this tile, and the position after the last of them.

    Puts their gradients into `gradients` and ends their part in `scores`; both are pointers.
    """
    columns = at_address(np.int64, a.columns)
    weights = at_address(np.float32, a.positive_weight)
    weight = weights[label] if a.positive_weight != 0 else np.float32(1)
    value = 0.0
    while is_positive(a, position, tile, label):
        column = columns[position]
        position += 1
        score = np.float64(scores[column])
        if scores[column] == _TAKEN:  # the row names the label twice
            continue
        scores[column] = _TAKEN
        if a.loss == BCE:
            e = math.exp(-abs(score))
            sigmoid = (1.0 if score >= 0 else e) / (1 + e)
            gradients[column] = weight * (sigmoid - a.as_positive)
            value += max(score, 0.0) + math.log1p(e) - a.as_positive * score
        else:
            one, other = max(1 - score, 0.0), max(1 + score, 0.0)
            gradients[column] = weight * 2 * (a.as_negative * other - a.as_positive * one)
            value += a.as_positive * one * one + a.as_negative * other * other
    return weight * value, position
