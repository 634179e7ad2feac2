"""Label clusters: what was planted is found, sizes are equal, nothing depends on threads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from xmc.nn.clusters import Clusters, cluster_labels, num_clusters_for
from xmc.types import SparseLabels


def random_features(num_labels: int, seed: int = 0, num_features: int = 300) -> np.ndarray:
    generator = np.random.default_rng(seed)
    dense = generator.exponential(size=(num_labels, num_features))
    return dense * (generator.random(dense.shape) < 0.05)


def planted(num_clusters: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled features of clusters with words of their own and shared noise; and the truth."""
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.repeat(np.arange(num_clusters), size))
    own = generator.random((num_clusters * size, 10)) < 0.5
    own[:, 0] = True
    features = 0.3 * generator.random((num_clusters * size, 10 * num_clusters + 50))
    features *= generator.random(features.shape) < 0.05
    for label, cluster in enumerate(truth):
        features[label, 10 * cluster : 10 * cluster + 10] += own[label]
    return features * generator.uniform(0.1, 10, (len(truth), 1)), truth


@pytest.mark.parametrize("form", ["csr", "dense", "tensor"])
@pytest.mark.parametrize(("num_clusters", "size"), [(2, 9), (4, 12), (8, 25)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_clusters_are_found(form: str, num_clusters: int, size: int, seed: int) -> None:
    dense, truth = planted(num_clusters, size, seed)
    features = {
        "csr": scipy.sparse.csr_matrix(dense),
        "dense": dense,
        "tensor": torch.from_numpy(dense),
    }[form]
    found = cluster_labels(features, max_labels=size, seed=seed)
    assert len(found) == num_clusters
    pairs = {(int(a), int(b)) for a, b in zip(found.assignment, truth, strict=True)}
    assert len(pairs) == num_clusters


@pytest.mark.parametrize(
    ("num_labels", "max_labels", "expected"),
    [
        (1, 100, 1),
        (100, 100, 1),
        (101, 100, 2),
        (5, 1, 8),
        (131_073, 100, 2048),  # the sizes of the design
        (670_091, 100, 8192),
        (2_812_281, 100, 32_768),
    ],
)
def test_the_number_of_clusters(num_labels: int, max_labels: int, expected: int) -> None:
    assert num_clusters_for(num_labels, max_labels) == expected


@pytest.mark.parametrize(
    ("num_labels", "max_labels"), [(64, 4), (77, 5), (301, 10), (2, 1), (3, 2), (9, 1)]
)
def test_sizes_differ_by_one_at_most(num_labels: int, max_labels: int) -> None:
    found = cluster_labels(random_features(num_labels), max_labels=max_labels, seed=3)
    found.validate()
    sizes = np.bincount(found.assignment.numpy(), minlength=len(found))
    assert sizes.max() <= max_labels
    assert sizes.max() - sizes.min() <= 1
    assert sorted(found.order.tolist()) == list(range(num_labels))
    # In leaf order the clusters follow one another, and labels rise within each.
    keys = [(int(found.assignment[label]), label) for label in found.order.tolist()]
    assert keys == sorted(keys)


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, np.asarray])
def test_threads_and_scale_do_not_matter_and_the_seed_does(form: type) -> None:
    dense = random_features(500, seed=4).astype(np.float32)
    runs = [
        cluster_labels(form(dense * scale), max_labels=10, seed=seed, num_threads=threads)
        for threads, scale, seed in ((1, 1, 5), (2, 1, 5), (7, 4, 5), (1, 1, 6))
    ]
    for other in runs[1:3]:
        assert torch.equal(runs[0].order, other.order)
        assert torch.equal(runs[0].assignment, other.assignment)
    assert not torch.equal(runs[0].order, runs[3].order)


def test_neighbouring_clusters_are_similar() -> None:
    """The order serves groups: siblings of the tree share more than clusters far apart."""
    dense, truth = planted(8, 16, seed=1)
    dense[:, :80] += 0.8 * np.repeat(dense[:, :80].reshape(-1, 4, 20).max(2), 20, axis=1)
    found = cluster_labels(dense, max_labels=16, seed=0)
    found_pairs = {
        frozenset(truth[(found.assignment // 2 == pair).numpy()].tolist()) for pair in range(4)
    }
    assert found_pairs == {frozenset((2 * pair, 2 * pair + 1)) for pair in range(4)}


@pytest.mark.parametrize("empty", [1, 10, 31, 39, 40])
def test_labels_with_empty_rows_are_dealt_evenly(empty: int) -> None:
    dense = random_features(40, seed=8) + 1e-3
    rows = np.random.default_rng(empty).permutation(40)[:empty]
    dense[rows] = 0
    stored = scipy.sparse.csr_matrix(np.where(dense == 0, 7.0, dense))
    stored.data[stored.data == 7.0] = 0  # zeros that are stored are zeros still
    for features in (dense, scipy.sparse.csr_matrix(dense), stored):
        found = cluster_labels(features, max_labels=5, seed=0)
        found.validate()
        counts = np.bincount(found.assignment.numpy()[rows], minlength=8)
        assert counts.max() - counts.min() <= 1


def test_identical_labels_are_split_all_the_same() -> None:
    found = cluster_labels(np.ones((16, 3)), max_labels=2, seed=0)
    found.validate()
    assert len(found) == 8


@pytest.mark.parametrize("num_labels", [1, 5])
def test_few_labels_are_one_cluster(num_labels: int) -> None:
    found = cluster_labels(random_features(num_labels), max_labels=5, seed=0)
    found.validate()
    assert len(found) == 1
    assert found.assignment.tolist() == [0] * num_labels
    assert found.order.tolist() == list(range(num_labels))


def test_repeated_entries_count_as_their_sum_and_the_input_stays() -> None:
    dense = random_features(60, seed=2)
    whole = scipy.sparse.csr_matrix(dense)
    halves = [np.repeat(part, 2) for part in (whole.data / 2, whole.indices)]
    split = scipy.sparse.csr_matrix((*halves, 2 * whole.indptr), shape=whole.shape)
    found = cluster_labels(split, max_labels=5, seed=0)
    assert torch.equal(found.order, cluster_labels(whole, max_labels=5, seed=0).order)
    assert split.nnz == 2 * whole.nnz


def test_progress_is_by_level() -> None:
    seen: list[int] = []

    def track(levels):
        for level in levels:
            seen.append(level)
            yield level

    cluster_labels(random_features(40), max_labels=5, seed=0, track=track)
    assert seen == [0, 1, 2]


def test_targets_are_the_sets_of_the_positives_clusters() -> None:
    found = cluster_labels(random_features(50), max_labels=7, seed=0)
    generator = np.random.default_rng(0)
    sizes = [0, 1, 5, 20, 0, 50, 3, 0]
    rows = [sorted(generator.choice(50, size, replace=False).tolist()) for size in sizes]
    targets = found.targets(SparseLabels.from_lists(rows, 50))
    targets.validate()
    assert targets.num_labels == len(found) == 8
    expected = [sorted({int(found.assignment[label]) for label in row}) for row in rows]
    bounds = targets.indptr.tolist()
    got = [targets.indices[a:b].tolist() for a, b in pairwise(bounds)]
    assert got == expected
    assert len(found.targets(SparseLabels.from_lists([], 50))) == 0
    with pytest.raises(ValueError, match="expected rows over 50 labels, got 51"):
        found.targets(SparseLabels.from_lists([[0]], 51))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 4)), "expected at least one label, got 0"),
        (np.zeros(4), r"expected features of shape \[L, V\], got \[4\]"),
        (np.array([[1.0, np.nan]]), "expected finite features, got nan or inf"),
        (scipy.sparse.csr_matrix([[1.0, np.inf]]), "expected finite features, got nan or inf"),
    ],
)
def test_bad_features_are_refused(features: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_labels(features, seed=0)


def test_a_bad_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected max_labels of at least 1, got 0"):
        cluster_labels(np.ones((3, 2)), max_labels=0, seed=0)


def clusters(assignment: list[int], order: list[int], num_clusters: int = 2) -> Clusters:
    numbers = torch.tensor(assignment, dtype=torch.int32), torch.tensor(order, dtype=torch.int64)
    return Clusters(numbers[0], num_clusters, numbers[1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (clusters([0, 2], [0, 1]), r"expected clusters in \[0, 2\), got 0 to 2"),
        (clusters([0, 1], [0, 0]), "expected order to name each label once"),
        (clusters([0, 1], [1, 0]), "expected order to list the labels cluster by cluster"),
        (clusters([0, 1, 1, 1], [0, 1, 2, 3]), "equal size within one, got 1 to 3 labels"),
        (clusters([0, 1], [0]), r"expected assignment and order of shape \[L\], got \[2\] and"),
        (clusters([], []), "expected at least one label, got none"),
        (
            Clusters(torch.zeros(1), 1, torch.zeros(1, dtype=torch.int64)),
            "expected assignment int32 and order int64, got torch.float32 and torch.int64",
        ),
    ],
)
def test_validate_names_the_rule(bad: Clusters, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad.validate()


@pytest.mark.parametrize("max_labels", [4, 1])  # 8 clusters, and 32, of which some are empty
def test_files_bring_the_same_clusters_back(tmp_path: Path, max_labels: int) -> None:
    found = cluster_labels(random_features(30), max_labels=max_labels, seed=0)
    path = tmp_path / "clusters.safetensors"
    found.save(path)
    loaded = Clusters.load(path)
    assert torch.equal(loaded.assignment, found.assignment)
    assert torch.equal(loaded.order, found.order)
    assert len(loaded) == len(found)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"clusters\.safetensors: expected label clusters, got: "):
        Clusters.load(path)
    with pytest.raises(ValueError, match="expected label clusters, got no such file"):
        Clusters.load(tmp_path / "none")


@pytest.mark.parametrize("num_labels", [37, 64, 200])
def test_coarser_clusters_are_those_of_a_larger_size(num_labels: int) -> None:
    features = random_features(num_labels)
    features[::9] = 0  # labels without features are dealt evenly
    fine = cluster_labels(features, max_labels=3, seed=4)
    for max_labels in (3, 5, 20, 300):
        coarse = fine.coarser(max_labels)
        coarse.validate()
        expected = cluster_labels(features, max_labels=max_labels, seed=4)
        assert len(coarse) == len(expected)
        assert torch.equal(coarse.assignment, expected.assignment)
        assert torch.equal(coarse.order, fine.order)
    with pytest.raises(ValueError, match=r"expected at least .* clusters to join to 1 labels each"):
        fine.coarser(1)
