"""Which label stands in which row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmc.config import HeadConfig
from xmc.heads.order import is_arranged, label_order, num_dense, renumbered
from xmc.nn.clusters import Clusters
from xmc.types import SparseLabels

L = 23
FREQUENCIES = torch.tensor([3, 9, 0, 9, 1] + [2] * 18)  # labels 1 and 3, then 0, then 5 to 22


def order_of(**options: object) -> list[int]:
    order = label_order(FREQUENCIES, HeadConfig(**options), clusters=clusters(), seed=7)  # type: ignore[arg-type]
    assert order.dtype == torch.int32
    return list(order.tolist())


def clusters() -> Clusters:
    order = torch.randperm(L, generator=torch.Generator().manual_seed(1))
    assignment = torch.empty(L, dtype=torch.int32)
    assignment[order] = (torch.arange(L) * 4 // L).int()
    return Clusters(assignment, 4, order)


def test_labels_stand_in_the_order_asked_for() -> None:
    assert order_of() == list(range(L))
    assert order_of(order="frequency") == [1, 3, 0, *range(5, L), 4, 2]
    assert order_of(order="cluster") == clusters().order.tolist()


def test_a_random_order_depends_on_the_seed_alone() -> None:
    config = HeadConfig(order="random")
    state = torch.get_rng_state()
    one, again, other = (label_order(FREQUENCIES, config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    for order in (one, other):
        assert sorted(order.tolist()) == list(range(L))
        assert (order == torch.arange(L)).sum() < 6
    large = label_order(torch.zeros(10_000), config, seed=1).double()
    correlation = torch.corrcoef(torch.stack([large, torch.arange(10_000).double()]))[0, 1]
    assert abs(float(correlation)) < 0.05  # five standard deviations


@pytest.mark.parametrize("order", ["none", "random", "frequency", "cluster"])
def test_the_most_frequent_come_first_and_the_tail_keeps_its_order(order: str) -> None:
    whole = order_of(order=order, group_size=2)
    found = order_of(order=order, group_size=2, dense_share=0.25)  # 6 labels, in 3 groups
    first = [1, 3, 0, 5, 6, 7]
    assert found == first + [label for label in whole if label not in first]


@pytest.mark.parametrize(
    ("share", "group", "expected"),
    [(0.0, 4, 0), (0.02, 1, 1), (0.02, 4, 4), (0.1, 1, 2), (0.3, 4, 8), (0.95, 1, 22)],
)
def test_dense_labels_come_in_whole_groups(share: float, group: int, expected: int) -> None:
    assert num_dense(L, HeadConfig(dense_share=share, group_size=group)) == expected


def test_what_does_not_fit_is_named() -> None:
    message = (
        r"expected to leave some of the 23 labels .* got 0.95, which is 24 labels in groups of"
    )
    with pytest.raises(ValueError, match=message):
        num_dense(L, HeadConfig(dense_share=0.95, group_size=6))
    for given, got in ((None, "none"), (clusters(), "those of 23")):
        with pytest.raises(
            ValueError, match=f"expected clusters of 5 labels for the .*, got {got}"
        ):
            label_order(torch.ones(5), HeadConfig(order="cluster"), clusters=given)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"order": "random"}, True),
        ({"dense_share": 0.1}, True),
        ({"group_size": 4}, True),  # 23 labels: one phantom row
        ({"group_size": 23}, False),
        ({"group_size": 4, "kind": "dense"}, False),
    ],
)
def test_plain_heads_stay_plain(options: dict[str, object], expected: bool) -> None:
    assert is_arranged(L, HeadConfig(**options)) is expected  # type: ignore[arg-type]


def dense(labels: SparseLabels) -> Tensor:
    labels.validate()
    return labels.to_dense()


def test_renumbered_rows_are_columns_of_the_matrix() -> None:
    rows = [[3, 10], [], [22], [0, 1, 2, 3], [], list(range(L)), [7]]
    labels = SparseLabels.from_lists(rows, L)
    order = torch.randperm(L)
    row_of = order.argsort().int()
    whole = renumbered(labels, row_of, [L])
    assert torch.equal(dense(whole[0]), labels.to_dense()[:, order])
    parts = renumbered(labels, row_of, [5, 20])  # two phantom rows at the end
    expected = torch.cat([labels.to_dense()[:, order], torch.zeros(7, 2)], 1)
    assert [part.num_labels for part in parts] == [5, 20]
    assert torch.equal(torch.cat([dense(part) for part in parts], 1), expected)
    wrong = SparseLabels(labels.indptr, labels.indices + 1, L)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 23\), got 1 to 23"):
        renumbered(wrong, row_of, [L])
