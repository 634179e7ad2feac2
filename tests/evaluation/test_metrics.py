"""Metrics against a slow implementation in plain Python, row by row."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from xmc.evaluation.metrics import MetricAccumulator, evaluate
from xmc.evaluation.propensity import Propensity
from xmc.evaluation.ranking import membership
from xmc.types import Bag, Batch, SparseLabels, TopK

KS = (1, 2, 3, 5, 8)


def make_topk(scores, k):
    """Dense scores [N][L] to TopK by sorting (-score, label); None is no candidate."""
    rows = []
    for row in scores:
        ranked = sorted((-score, label) for label, score in enumerate(row) if score is not None)
        rows.append([(label, -negative) for negative, label in ranked[:k]])
    labels = torch.full((len(rows), k), -1, dtype=torch.int64)
    values = torch.full((len(rows), k), -math.inf)
    for i, row in enumerate(rows):
        for j, (label, score) in enumerate(row):
            labels[i, j], values[i, j] = label, score
    return TopK(values, labels)


def random_case(seed, num_rows, num_labels, k):
    """Scores with many ties and gaps; rows without labels, with all labels and in between."""
    rng = random.Random(seed)
    scores, truth = [], []
    for _ in range(num_rows):
        gap = rng.choice([0.0, 0.0, 0.7])
        scores.append(
            [None if rng.random() < gap else rng.randrange(4) / 4 for _ in range(num_labels)]
        )
        share = rng.choice([0.0, 0.2, 0.5, 1.0])
        truth.append([label for label in range(num_labels) if rng.random() < share])
    return make_topk(scores, k), truth


def slow_scores(topk, truth, ks, inv_p, bin_of, threshold, drop_empty=False):
    """Every metric, from the definitions, one row after the other."""
    rows = []
    for labels, scores, true in zip(topk.labels.tolist(), topk.scores.tolist(), truth, strict=True):
        pairs = [(label, score) for label, score in zip(labels, scores, strict=True) if label >= 0]
        rows.append((pairs, set(true)))
    if drop_empty:
        rows = [row for row in rows if row[1]]
    values = {}
    for k in ks:
        sums = dict.fromkeys(("P", "nDCG", "R", "RP", "abandonment"), 0.0)
        ps = {name: [0.0, 0.0] for name in ("PSP", "PSnDCG", "PSR")}
        recalls = {"head": [], "torso": [], "tail": []}
        covered, present = set(), set()
        for pairs, true in rows:
            top = [label for label, _ in pairs[:k]]
            hits = [label for label in top if label in true]
            present |= true
            covered |= set(hits)
            sums["P"] += len(hits) / k
            sums["abandonment"] += not hits
            for name in recalls:
                mine = {label for label in true if bin_of[label] == name}
                if mine:
                    recalls[name].append(len(mine & set(hits)) / len(mine))
            if not true:
                continue
            norm = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(true)) + 1))
            ideal = sorted((inv_p[label] for label in true), reverse=True)[:k]
            gain = [inv_p[label] if label in true else 0.0 for label in top]
            sums["nDCG"] += sum(dcg(1.0 if label in true else 0.0 for label in top)) / norm
            sums["R"] += len(hits) / len(true)
            sums["RP"] += len(hits) / min(k, len(true))
            for side, gains in enumerate((gain, ideal)):
                ps["PSP"][side] += sum(gains) / k
                ps["PSnDCG"][side] += sum(dcg(gains)) / norm
                ps["PSR"][side] += sum(gains) / len(true)
        values |= {f"{name}@{k}": total / len(rows) for name, total in sums.items()}
        values |= {f"{name}@{k}": divide(*pair) for name, pair in ps.items()}
        for name, shares in recalls.items():
            values[f"R@{k}/{name}"] = divide(sum(shares), len(shares))
        values[f"coverage@{k}"] = divide(len(covered), len(present))
    counts = {}
    for pairs, true in rows:
        chosen = {label for label, score in pairs if score >= threshold}
        for label in chosen | true:
            both, total = counts.get(label, (0, 0))
            hit = label in chosen and label in true
            counts[label] = both + hit, total + (label in chosen) + (label in true)
    values["micro-F1"] = divide(
        2 * sum(both for both, _ in counts.values()), sum(total for _, total in counts.values())
    )
    f1 = [2 * both / total for both, total in counts.values()]
    values["macro-F1"] = divide(sum(f1), len(f1))
    return values


def dcg(gains):
    return (gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def divide(a, b):
    return a / b if b else math.nan


def accumulate(topk, truth, num_labels, *, step=None, **options):
    accumulator = MetricAccumulator(KS, **options)
    labels = SparseLabels.from_lists(truth, num_labels)
    step = step or len(truth)
    for start in range(0, len(truth), step):
        stop = min(start + step, len(truth))
        part = TopK(topk.scores[start:stop], topk.labels[start:stop])
        accumulator.update(part, labels.slice(start, stop))
    return accumulator.compute()


def assert_same(values, expected, tolerance=1e-12):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=tolerance, rel=tolerance, nan_ok=True), name


def bins_of(num_labels):
    """Frequencies, and the bin of each label by walking down the sorted list."""
    frequencies = [(5 * label + 3) % 4 * 2 for label in range(num_labels)]
    names, seen, total = {}, 0, sum(frequencies)
    for label in sorted(range(num_labels), key=lambda label: (-frequencies[label], label)):
        covered = Fraction(seen, total) if total else Fraction(1)
        third = 0 if covered < Fraction(1, 3) else 1 if covered < Fraction(2, 3) else 2
        names[label] = ("head", "torso", "tail")[third]
        seen += frequencies[label]
    return torch.tensor(frequencies), names


def table(num_labels):
    return [1.0 + (7 * label % 11) / 3 for label in range(num_labels)]


@pytest.mark.parametrize("drop_empty", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_labels", "k"),
    [(64, 32, 8), (37, 13, 10), (41, 7, 3), (5, 1, 1), (6, 1, 4), (1, 6, 8)],
    ids=["round", "odd", "k > predictions", "one label", "one label, padded", "one row"],
)
def test_metrics_equal_a_row_by_row_implementation(num_rows, num_labels, k, drop_empty):
    frequencies, names = bins_of(num_labels)
    for seed in range(5):
        topk, truth = random_case(seed, num_rows, num_labels, k)
        if drop_empty and not any(truth):
            truth[0] = [0]
        scores = accumulate(
            topk,
            truth,
            num_labels,
            inv_propensity=torch.tensor(table(num_labels), dtype=torch.float64),
            frequencies=frequencies,
            threshold=0.5,
            drop_empty=drop_empty,
        )
        expected = slow_scores(topk, truth, KS, table(num_labels), names, 0.5, drop_empty)
        assert_same(scores.values, expected)
        empty = sum(not row for row in truth)
        assert scores.counts["rows"] == num_rows
        assert scores.counts["empty_rows"] == empty
        assert scores.counts["scored_rows"] == num_rows - (empty if drop_empty else 0)
        assert scores.counts["test_labels"] == len({label for row in truth for label in row})
        assert scores.empty_rows == ("dropped" if drop_empty else "kept")


def test_worked_example_gives_the_numbers_done_by_hand():
    # Rows: hit, miss, hit of 2 true; all miss of 1 true; no true labels.
    topk = TopK(
        torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.3, 0.2], [0.9, 0.1, 0.0]]),
        torch.tensor([[4, 0, 2], [1, 2, 3], [4, 3, 2]]),
    )
    labels = SparseLabels.from_lists([[2, 4], [0], []], 5)
    inverse = torch.tensor([2.0, 1.0, 4.0, 1.0, 3.0], dtype=torch.float64)
    accumulator = MetricAccumulator((1, 3), inv_propensity=inverse, threshold=0.65)
    accumulator.update(topk, labels)
    values = accumulator.compute().values
    assert values["P@1"] == pytest.approx(1 / 3)  # (1 + 0 + 0) / 3
    assert values["P@3"] == pytest.approx(2 / 9)  # (2/3 + 0 + 0) / 3
    # Row 1: (1 + 1/log2(4)) / (1 + 1/log2(3)) = 1.5 / 1.63093 = 0.91972
    assert values["nDCG@3"] == pytest.approx(0.91972 / 3, abs=1e-5)
    assert values["R@1"] == pytest.approx(1 / 6)  # (1/2) / 3
    assert values["R@3"] == pytest.approx(1 / 3)
    assert values["RP@1"] == pytest.approx(1 / 3)
    assert values["abandonment@1"] == pytest.approx(2 / 3)
    assert values["coverage@1"] == pytest.approx(1 / 3)  # 4 of {0, 2, 4}
    assert values["coverage@3"] == pytest.approx(2 / 3)  # 2 and 4
    assert values["PSP@1"] == pytest.approx(3 / 6)  # gain 3, ideals 4 + 2
    assert values["PSP@3"] == pytest.approx(7 / 9)  # (3 + 4) / (4 + 3 + 2)
    # Gain (3 + 4/2) / 1.63093 = 3.06574; ideals (4 + 3 * 0.63093) / 1.63093 + 2 = 5.61315
    assert values["PSnDCG@3"] == pytest.approx(3.06574 / 5.61315, abs=1e-5)
    assert values["PSR@3"] == pytest.approx(3.5 / 5.5)  # 7/2 over 7/2 + 2/1
    # Predicted at 0.65: {4, 0, 2}, {}, {4}: 2 right of 4 predicted and 3 true
    assert values["micro-F1"] == pytest.approx(4 / 7)
    assert values["macro-F1"] == pytest.approx((0 + 1 + 2 / 3) / 3)  # labels 0, 2, 4


def test_ties_are_scored_in_the_order_of_the_lower_label():
    topk = make_topk([[0.5, 0.5, 0.5, 0.9]], 3)
    assert topk.labels.tolist() == [[3, 0, 1]]
    scores = accumulate(topk, [[0]], 4)
    assert scores.values["P@1"] == 0
    assert scores.values["P@2"] == 0.5


def test_scores_do_not_depend_on_how_rows_are_cut_into_updates():
    frequencies, _ = bins_of(9)
    topk, truth = random_case(3, 101, 9, 8)
    options = {
        "inv_propensity": torch.tensor(table(9)),
        "frequencies": frequencies,
        "threshold": 0.25,
        "bootstrap": 75,  # odd: rows end inside a word of the generator
        "drop_empty": True,
    }
    whole = accumulate(topk, truth, 9, **options)
    for step in (1, 7, 50):
        parts = accumulate(topk, truth, 9, step=step, **options)
        assert_same(parts.values, whole.values)
        assert parts.counts == whole.counts
        for name, interval in whole.intervals.items():
            assert parts.intervals[name] == pytest.approx(interval, abs=1e-12, nan_ok=True)


def test_an_update_longer_than_the_internal_block_equals_single_rows():
    num_rows = 9000
    labels = SparseLabels.from_lists([[i % 7] for i in range(num_rows)], 7)
    topk = TopK(torch.zeros(num_rows, 1), (torch.arange(num_rows) % 3)[:, None])
    accumulator = MetricAccumulator((1,), bootstrap=20)
    accumulator.update(topk, labels)
    hits = sum(i % 7 == i % 3 for i in range(num_rows))
    assert accumulator.compute().values["P@1"] == pytest.approx(hits / num_rows, abs=1e-12)
    assert accumulator.compute().counts["rows"] == num_rows


cases = st.integers(0, 10**6)


@given(seed=cases, num_labels=st.integers(1, 12), k=st.integers(1, 10))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_properties_of_any_ranking(seed, num_labels, k):
    topk, truth = random_case(seed, 12, num_labels, k)
    frequencies, _ = bins_of(num_labels)
    inverse = torch.tensor(table(num_labels))
    scores = accumulate(
        topk, truth, num_labels, inv_propensity=inverse, frequencies=frequencies, threshold=0.5
    )
    values = scores.values
    assert all(0 <= value <= 1 for value in values.values() if not math.isnan(value))
    assert values["abandonment@1"] == pytest.approx(1 - values["P@1"])
    assert values["PSnDCG@1"] == pytest.approx(values["PSP@1"], nan_ok=True)
    for low, high in itertools.pairwise(KS):
        assert values[f"R@{high}"] >= values[f"R@{low}"] - 1e-12
        assert values[f"abandonment@{high}"] <= values[f"abandonment@{low}"] + 1e-12
        assert not values[f"coverage@{high}"] < values[f"coverage@{low}"]
        assert values[f"P@{high}"] * high >= values[f"P@{low}"] * low - 1e-12
        assert values[f"RP@{low}"] >= values[f"P@{low}"] - 1e-12


@given(seed=cases, num_labels=st.integers(1, 12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_best_ranking_scores_one(seed, num_labels):
    _, truth = random_case(seed, 12, num_labels, 1)
    truth[0] = truth[0] or [0]
    gains = table(num_labels)
    oracle = [
        [gains[label] if label in row else 0.0 for label in range(num_labels)] for row in truth
    ]
    scores = accumulate(
        make_topk(oracle, 8),
        truth,
        num_labels,
        inv_propensity=torch.tensor(gains),
        drop_empty=True,
    )
    for k in KS:
        for name in ("PSP", "PSnDCG", "PSR", "nDCG", "RP"):
            assert scores.values[f"{name}@{k}"] == pytest.approx(1.0, abs=1e-12)
        assert scores.values[f"abandonment@{k}"] == 0


def test_a_missing_hit_cannot_raise_a_score():
    topk, truth = random_case(11, 30, 9, 8)
    worse = topk.labels.clone()
    hit = next((i, j) for i in range(30) for j in range(8) if worse[i, j].item() in truth[i])
    worse[hit] = -1
    before = accumulate(topk, truth, 9).values
    after = accumulate(TopK(topk.scores, worse), truth, 9).values
    assert after["P@8"] < before["P@8"]
    assert after["R@8"] < before["R@8"]
    assert after["nDCG@8"] < before["nDCG@8"]


def test_short_rows_are_counted():
    topk = TopK(torch.tensor([[2.0, 1.0], [1.0, -math.inf]]), torch.tensor([[0, 1], [1, -1]]))
    accumulator = MetricAccumulator((2,))
    accumulator.update(topk, SparseLabels.from_lists([[0], [1]], 3))
    assert accumulator.compute().counts["short_rows"] == 1
    wider = MetricAccumulator((3,))
    wider.update(topk, SparseLabels.from_lists([[0], [1]], 3))
    assert wider.compute().counts["short_rows"] == 2


def test_metrics_without_a_row_that_defines_them_are_nan():
    frequencies = torch.tensor([5, 4, 3])  # head 0, torso 1, tail 2
    topk = TopK(torch.ones(2, 1), torch.tensor([[0], [1]]))
    scores = accumulate(topk, [[0], []], 3, frequencies=frequencies, bootstrap=10)
    assert scores.values["R@1/head"] == 1.0
    assert math.isnan(scores.values["R@1/tail"])
    assert all(math.isnan(end) for end in scores.intervals["R@1/tail"])
    assert scores.bins == {"head": 1, "torso": 1, "tail": 1}
    empty = accumulate(topk, [[], []], 3, inv_propensity=torch.ones(3))
    assert empty.values["P@1"] == 0
    assert math.isnan(empty.values["PSP@1"])
    assert math.isnan(empty.values["coverage@1"])


def test_rows_times_labels_may_pass_32_bits():
    num_rows, last = 4096, 299_999_999
    predicted = np.tile([last, 5], (num_rows, 1))
    truth = np.full(num_rows, last)
    hits = membership(predicted, np.arange(num_rows + 1), truth, last + 1)
    assert hits[:, 0].all()
    assert not hits[:, 1].any()


def test_f1_equals_scikit_learn():
    topk, truth = random_case(8, 60, 15, 15)
    scores = accumulate(topk, truth, 15, threshold=0.5)
    predicted = torch.zeros(60, 15)
    rows, columns = (topk.scores >= 0.5).nonzero().T
    predicted[rows, topk.labels[rows, columns]] = 1
    dense = SparseLabels.from_lists(truth, 15).to_dense()
    for kind in ("micro", "macro"):
        expected = f1_score(dense, predicted, average=kind, zero_division=np.nan)
        assert scores.values[f"{kind}-F1"] == pytest.approx(expected, abs=1e-12)


def batch(rows, num_labels):
    count = len(rows)
    bag = Bag(torch.zeros(0, dtype=torch.int64), torch.zeros(count + 1).long(), torch.zeros(0))
    return Batch(bag, SparseLabels.from_lists(rows, num_labels), torch.arange(count))


def test_evaluate_scores_batches_and_reports_progress():
    batches = [batch([[0], [1]], 2), batch([[1]], 2)]
    seen = []

    def always_zero(batch):
        assert not torch.is_grad_enabled()
        return TopK(torch.ones(len(batch), 1), torch.zeros(len(batch), 1, dtype=torch.int64))

    scores = evaluate(always_zero, batches, MetricAccumulator((1,)), progress=seen.append)
    assert scores.values["P@1"] == pytest.approx(1 / 3)
    assert seen == [2, 1]


def test_propensity_is_carried_into_the_scores():
    train = SparseLabels.from_lists([[0], [0, 1], [0], [1]], 3)
    propensity = Propensity.from_labels(train)
    topk, truth = random_case(2, 10, 3, 3)
    with_object = accumulate(topk, truth, 3, inv_propensity=propensity)
    with_tensor = accumulate(topk, truth, 3, inv_propensity=propensity.inverse)
    assert with_object.propensity is propensity
    assert with_tensor.propensity is None
    assert_same(with_object.values, with_tensor.values)


def one_update(scores, predicted, truth=((0,), (1,)), num_labels=4, **options):
    accumulator = MetricAccumulator((1, 2), **options)
    labels = SparseLabels.from_lists([list(row) for row in truth], num_labels)
    accumulator.update(TopK(torch.tensor(scores), torch.tensor(predicted)), labels)
    return accumulator


GOOD = ([[2.0, 1.0], [2.0, 1.0]], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("scores", "predicted", "message"),
    [
        ([[2.0, 1.0]], [[0, 1]], r"shape \[2, K\] to match the true labels, got \[1, 2\]"),
        ([[2.0], [1.0]], GOOD[1], r"got \[2, 1\] and \[2, 2\]"),
        (GOOD[0], [[0, 1], [2, 4]], r"predicted labels in \[0, 4\) or -1 .* row 1 has 4"),
        (GOOD[0], [[0, 1], [-2, 3]], r"row 1 has -2"),
        (GOOD[0], [[0, 1], [3, 3]], "distinct predicted labels in a row, row 1 repeats 3"),
        ([[2.0, 1.0], [1.0, 2.0]], GOOD[1], "scores in descending order, row 1 has not"),
        ([[2.0, math.nan], [2.0, 1.0]], GOOD[1], "scores that are numbers, row 0 has NaN"),
    ],
)
def test_bad_predictions_are_refused_by_rule_and_row(scores, predicted, message):
    with pytest.raises(ValueError, match=message):
        one_update(scores, predicted)


def test_padding_may_repeat():
    scores = [[1.0, -math.inf], [-math.inf, -math.inf]]
    values = one_update(scores, [[0, -1], [-1, -1]]).compute().values
    assert values["P@2"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inv_propensity": torch.ones(3)}, r"inv_propensity of shape \[4\].* got \[3\]"),
        ({"frequencies": torch.ones(5)}, r"frequencies of shape \[4\].* got \[5\]"),
        ({"inv_propensity": torch.tensor([1.0, 0, 1, 1])}, "finite, positive inverse propensities"),
        ({"inv_propensity": torch.full((4,), math.nan)}, "finite, positive inverse propensities"),
        ({"bootstrap": -1}, "at least 0 replicates, got -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        one_update(*GOOD, **options)


@pytest.mark.parametrize("ks", [(), (0, 1), (-1,)])
def test_bad_ks_are_refused(ks):
    with pytest.raises(ValueError, match="expected ks of at least 1"):
        MetricAccumulator(ks)


def test_a_refused_update_leaves_the_sums_alone():
    accumulator = one_update(*GOOD)
    before = accumulator.compute()
    with pytest.raises(ValueError, match="expected 4 labels as in earlier updates, got 5"):
        accumulator.update(
            TopK(torch.ones(1, 1), torch.ones(1, 1)), SparseLabels.from_lists([[1]], 5)
        )
    unsorted = SparseLabels(torch.tensor([0, 2]), torch.tensor([3, 1], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="sorted, distinct label indices, row 0"):
        accumulator.update(TopK(torch.ones(1, 1), torch.ones(1, 1)), unsorted)
    assert accumulator.compute() == before


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match=r"at least one row to score, got none$"):
        MetricAccumulator().compute()
    empty = one_update(*GOOD, truth=((), ()), drop_empty=True)
    with pytest.raises(ValueError, match=r"got none \(2 without labels were dropped\)"):
        empty.compute()
