import math

import pytest
import torch

from xmc.evaluation.propensity import PRESETS, Propensity, inverse_propensity
from xmc.types import SparseLabels


def test_values_done_by_hand():
    # N = e^3, rounded to 20: C = (ln 20 - 1) (0.4 + 1)^0.5 = 1.995732 * 1.183216 = 2.361382
    inverse = inverse_propensity(torch.tensor([0, 4, 20]), 20, 0.5, 0.4)
    assert inverse.dtype == torch.float64
    expected = [
        1 + 2.361382 / math.sqrt(0.4),
        1 + 2.361382 / math.sqrt(4.4),
        1 + 2.361382 / math.sqrt(20.4),
    ]
    torch.testing.assert_close(
        inverse, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_a_label_seen_once_counts_as_the_logarithm_of_n():
    # (N_l + b)^-a (b + 1)^a = 1 at N_l = 1, whatever a and b: inv_p = ln N.
    for a, b in PRESETS.values():
        inverse = inverse_propensity(torch.tensor([1]), 45_000, a, b)
        assert inverse.item() == pytest.approx(math.log(45_000), rel=1e-14)


def test_rarer_labels_count_more_and_none_less_than_one():
    inverse = inverse_propensity(torch.arange(1000), 1000, 0.55, 1.5)
    assert bool((inverse[1:] < inverse[:-1]).all())
    assert bool((inverse > 1).all())


def test_presets_are_those_of_the_paper():
    assert PRESETS == {
        "amazon": (0.6, 2.6),
        "wikipedia": (0.5, 0.4),
        "default": (0.55, 1.5),
    }


def test_from_labels_counts_the_training_rows():
    labels = SparseLabels.from_lists([[0, 1], [1], [], [1, 3]], 4)
    propensity = Propensity.from_labels(labels, "wikipedia")
    assert (propensity.a, propensity.b, propensity.num_rows) == (0.5, 0.4, 4)
    assert propensity.source == 'preset "wikipedia"; N and label counts of the training rows'
    expected = inverse_propensity(torch.tensor([1, 3, 0, 1]), 4, 0.5, 0.4)
    torch.testing.assert_close(propensity.inverse, expected, atol=0, rtol=0)

    given = Propensity.from_labels(labels, a=0.7, b=2.0)
    assert (given.a, given.b) == (0.7, 2.0)
    assert given.source == "a and b given; N and label counts of the training rows"


@pytest.mark.parametrize(
    ("counts", "num_rows", "a", "b", "message"),
    [
        ([1], 2, 0.5, 0.4, "expected at least 3 training rows for propensities, got 2"),
        ([1], 10, 0.0, 0.4, "expected a finite a > 0, got 0.0"),
        ([1], 10, math.nan, 0.4, "expected a finite a > 0, got nan"),
        ([1], 10, 0.5, -1.0, "expected a finite b > 0, got -1.0"),
        ([1], 10, 0.5, math.inf, "expected a finite b > 0, got inf"),
        ([1, 11], 10, 0.5, 0.4, r"label counts in \[0, 10\] .*, got 1 to 11"),
        ([-1, 3], 10, 0.5, 0.4, r"label counts in \[0, 10\] .*, got -1 to 3"),
        ([[1, 3]], 10, 0.5, 0.4, r"label_counts of shape \[L\], got \[1, 2\]"),
    ],
)
def test_values_out_of_range_are_refused(counts, num_rows, a, b, message):
    with pytest.raises(ValueError, match=message):
        inverse_propensity(torch.tensor(counts), num_rows, a, b)


def test_bad_choices_of_constants_are_refused():
    labels = SparseLabels.from_lists([[0]] * 5, 1)
    with pytest.raises(ValueError, match='a preset of amazon, wikipedia, default, got "wiki"'):
        Propensity.from_labels(labels, "wiki")
    with pytest.raises(ValueError, match=r"both a and b, or neither, got a=0.5 and b=None"):
        Propensity.from_labels(labels, a=0.5)
