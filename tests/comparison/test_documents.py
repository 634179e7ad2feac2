"""Scores by document against the accumulator, and paired differences against a plain bootstrap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from xmc.comparison.documents import (
    METRICS,
    Documents,
    document_columns,
    evaluation_set,
    paired_differences,
)
from xmc.config import Config, from_dict
from xmc.evaluation.metrics import MetricAccumulator
from xmc.evaluation.propensity import Propensity
from xmc.training.run import prepare_data
from xmc.types import SparseLabels, TopK

NUM_LABELS = 40


def make_labels(num_rows: int, generator: torch.Generator) -> SparseLabels:
    """0 to 4 labels a row."""
    rows = [
        torch.randperm(NUM_LABELS, generator=generator)[: int(count)].sort().values.int()
        for count in torch.randint(0, 5, (num_rows,), generator=generator)
    ]
    counts = torch.tensor([0, *map(len, rows)])
    return SparseLabels(counts.cumsum(0), torch.cat(rows), NUM_LABELS)


def predictions(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Five distinct labels a row, some rows padded."""
    found = torch.stack(
        [torch.randperm(NUM_LABELS, generator=generator)[:5] for _ in range(num_rows)]
    )
    found[::7, 3:] = -1
    return found.int()


def scored(seed: int, rows: torch.Tensor) -> Documents:
    """Labels belong to the document, predictions to the seed."""
    labels = make_labels(100, torch.Generator().manual_seed(0))
    propensity = Propensity.from_labels(labels)
    chosen = predictions(100, torch.Generator().manual_seed(seed))[rows]
    return Documents(rows, document_columns(chosen, labels.rows(rows), propensity))


def test_values_are_those_of_the_accumulator() -> None:
    generator = torch.Generator().manual_seed(1)
    labels, best = make_labels(300, generator), predictions(300, generator)
    propensity = Propensity.from_labels(labels, "amazon")
    accumulator = MetricAccumulator((1, 3, 5), inv_propensity=propensity)
    scores = -torch.arange(5.0).expand(300, 5).clone()
    scores[best < 0] = -torch.inf
    accumulator.update(TopK(scores, best.long()), labels)
    expected = accumulator.compute().values
    documents = Documents(torch.arange(300), document_columns(best, labels, propensity))
    assert documents.values() == pytest.approx({name: expected[name] for name in METRICS})
    assert 0 < expected["P@1"] < 1


def plain_bootstrap(ours: list[Documents], theirs: list[Documents], metric: str) -> list[float]:
    """[mean, low, high] by drawing documents with replacement, each with all of its seeds."""
    below = f"ideal {metric}" if metric.startswith("PS") else "rows"
    rows = sorted({int(row) for documents in ours for row in documents.rows})
    numerator, denominator = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    for mine, other in zip(ours, theirs, strict=True):
        for place, row in enumerate(mine.rows.tolist()):
            numerator[row] += mine.columns[metric][place] - other.columns[metric][place]
            denominator[row] += mine.columns[below][place]
    above = np.array([numerator[row] for row in rows])
    under = np.array([denominator[row] for row in rows])
    drawn = np.random.default_rng(3).integers(0, len(rows), (20_000, len(rows)))
    ratios = above[drawn].sum(1) / under[drawn].sum(1)
    return [above.sum() / under.sum(), *np.quantile(ratios, [0.025, 0.975])]


def test_differences_agree_with_a_plain_bootstrap_over_documents() -> None:
    """Two seeds with documents of their own, half of them shared."""
    rows = [torch.arange(0, 60), torch.arange(30, 100)]
    ours = [scored(seed, part) for seed, part in zip((1, 2), rows, strict=True)]
    theirs = [scored(seed, part) for seed, part in zip((3, 4), rows, strict=True)]
    found = paired_differences(ours, theirs, replicates=20_000)
    for metric in METRICS:
        mean, low, high = plain_bootstrap(ours, theirs, metric)
        difference = found[metric]
        assert difference.mean == pytest.approx(mean, abs=1e-12)
        assert [difference.low, difference.high] == pytest.approx(
            [low, high], abs=0.05 * (high - low)
        )
        assert low < mean < high


def test_with_the_same_documents_the_difference_is_that_of_the_means() -> None:
    rows = torch.arange(100)
    ours, theirs = [scored(1, rows), scored(2, rows)], [scored(3, rows), scored(4, rows)]
    found = paired_differences(ours, theirs, replicates=10)
    for metric in METRICS:
        means = [np.mean([d.values()[metric] for d in part]) for part in (ours, theirs)]
        assert found[metric].mean == pytest.approx(means[0] - means[1])
    nothing = paired_differences(ours, ours, replicates=10)
    assert {(d.mean, d.low, d.high) for d in nothing.values()} == {(0.0, 0.0, 0.0)}


def test_other_documents_are_refused() -> None:
    ours, theirs = [scored(1, torch.arange(50))], [scored(1, torch.arange(1, 51))]
    with pytest.raises(ValueError, match="expected the same documents"):
        paired_differences(ours, theirs, replicates=10)


@pytest.mark.parametrize("seed", [42, 43])
def test_the_documents_are_those_that_training_held_out(
    tiny_data: Path, tmp_path: Path, seed: int
) -> None:
    config: Config = from_dict(
        {"features": {"min_df": 1}, "train": {"seed": seed, "validation": 0.2}}, source="test"
    )
    _, train_set, held_out = prepare_data(config, tiny_data, tmp_path)
    assert held_out is not None
    documents = evaluation_set(config, tiny_data, "val", cache=tmp_path)
    assert len(documents.rows) == len(held_out) == 80 == 400 - len(train_set)
    assert torch.equal(documents.dataset.labels.indices, held_out.labels.indices)
    every = torch.arange(80)
    assert torch.equal(
        documents.dataset.features.rows(every).ids,  # type: ignore[union-attr]
        held_out.features.rows(every).ids,  # type: ignore[union-attr]
    )
    whole = prepare_data(
        from_dict({"features": {"min_df": 1}, "train": {"validation": 0.0}}, source="test"),
        tiny_data,
        tmp_path,
    )[1]
    assert torch.equal(whole.labels.rows(documents.rows).indices, held_out.labels.indices)
    test = evaluation_set(config, tiny_data, "tst", cache=tmp_path)
    assert test.rows.tolist() == list(range(100))
