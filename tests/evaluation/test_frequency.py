import math

import numpy as np
import pytest
import torch

from xmc.evaluation.frequency import frequency_bins, frequency_topk


def test_most_frequent_labels_come_first_and_ties_by_label():
    topk = frequency_topk(torch.tensor([3, 7, 3, 0, 7]), 4, 2)
    assert topk.labels.tolist() == [[1, 4, 0, 2]] * 2
    assert topk.scores.tolist() == [[7.0, 7.0, 3.0, 3.0]] * 2
    assert topk.labels.dtype == torch.int64
    assert topk.scores.dtype == torch.float32


def test_fewer_labels_than_k_are_padded():
    topk = frequency_topk(torch.tensor([1, 2]), 3, 1)
    assert topk.labels.tolist() == [[1, 0, -1]]
    assert topk.scores.tolist() == [[2.0, 1.0, -math.inf]]


def test_rows_share_storage():
    topk = frequency_topk(torch.tensor([1, 2, 3]), 2, 10**9)
    assert topk.labels.shape == (10**9, 2)
    assert topk.labels.untyped_storage().nbytes() <= 64


@pytest.mark.parametrize(
    ("frequencies", "expected"),
    [
        ([9, 5, 4, 3, 3, 2, 1], "head torso torso tail tail tail tail"),
        ([1, 1, 1], "head torso tail"),
        ([2, 9, 4, 3, 0], "tail head torso tail tail"),
        ([1, 100], "tail head"),
        ([5], "head"),
        ([0, 0], "tail tail"),
    ],
)
def test_bins_cover_a_third_of_the_occurrences_each(frequencies, expected):
    bins = frequency_bins(np.array(frequencies))
    assert " ".join(("head", "torso", "tail")[number] for number in bins) == expected


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"frequencies of shape \[L\], got \[1, 2\]"):
        frequency_topk(torch.ones(1, 2), 1, 1)
    with pytest.raises(ValueError, match="expected k of at least 1, got 0"):
        frequency_topk(torch.ones(2), 0, 1)
