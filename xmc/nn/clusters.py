"""Label clusters: balanced spherical 2-means, applied until every cluster is small.

Source: Prabhu et al., "Parabel" (WWW 2018), section 3.1, from which the median split and the
tolerance are; seeds as in k-means++ (Arthur and Vassilvitskii, SODA 2007). At extreme numbers of
labels the clusters are targets of an auxiliary objective: arXiv 2411.03171, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xmc.files import write_file
from xmc.types import SparseLabels

_TOLERANCE = 1e-4  # relative growth of the objective at which 2-means ends, Parabel's
_MAX_ROUNDS = 30  # the objective never falls, so this only bounds very slow growth

Matrix = scipy.sparse.csr_matrix | np.ndarray


@dataclass(frozen=True)
class Clusters:
    """A partition of L labels into clusters of equal size, within one."""

    assignment: Tensor  # [L] int32, the cluster of each label
    num_clusters: int
    order: Tensor  # [L] int64, the labels cluster by cluster, similar clusters side by side

    def __len__(self) -> int:
        return self.num_clusters

    @property
    def num_labels(self) -> int:
        return self.assignment.shape[0]

    def to(self, device: torch.device | str) -> Clusters:
        return Clusters(self.assignment.to(device), self.num_clusters, self.order.to(device))

    def sizes(self) -> Tensor:
        """Number of labels of each cluster, [num_clusters] int64."""
        return torch.bincount(self.assignment, minlength=self.num_clusters)

    def targets(self, labels: SparseLabels) -> SparseLabels:
        """The distinct clusters of each row's positives, sorted; on the device of both."""
        if labels.num_labels != self.num_labels:
            raise ValueError(
                f"expected rows over {self.num_labels} labels, got {labels.num_labels}"
            )
        rows, positives = labels.tile(0, labels.num_labels)
        # A row's clusters are neighbours among the sorted keys, and in order.
        keys = (rows * self.num_clusters + self.assignment[positives]).unique()
        indptr = torch.zeros(len(labels) + 1, dtype=torch.int64, device=labels.device)
        counts = torch.bincount(keys // self.num_clusters, minlength=len(labels))
        torch.cumsum(counts, 0, out=indptr[1:])
        return SparseLabels(indptr, (keys % self.num_clusters).int(), self.num_clusters)

    def coarser(self, max_labels: int) -> Clusters:
        """Sibling clusters joined until they hold up to `max_labels` labels.

        They are what `cluster_labels` finds with that `max_labels` and the same features and seed;
        only the order inside a cluster is finer. ValueError where there are too few to join.
        """
        wanted = num_clusters_for(self.num_labels, max_labels)
        if self.num_clusters % wanted:
            raise ValueError(
                f"expected at least {wanted} clusters to join to {max_labels} labels each, "
                f"got {self.num_clusters}"
            )
        joined = self.num_clusters // wanted
        assignment = self.assignment.div(joined, rounding_mode="floor")
        return Clusters(assignment, wanted, self.order)

    def validate(self) -> None:
        """Raise ValueError on the first rule that does not hold."""
        if self.assignment.dtype != torch.int32 or self.order.dtype != torch.int64:
            raise ValueError(
                "expected assignment int32 and order int64, "
                f"got {self.assignment.dtype} and {self.order.dtype}"
            )
        if self.assignment.dim() != 1 or self.order.shape != self.assignment.shape:
            raise ValueError(
                "expected assignment and order of shape [L], "
                f"got {list(self.assignment.shape)} and {list(self.order.shape)}"
            )
        if not self.num_labels:
            raise ValueError("expected at least one label, got none")
        low, high = int(self.assignment.min()), int(self.assignment.max())
        if low < 0 or high >= self.num_clusters:
            raise ValueError(f"expected clusters in [0, {self.num_clusters}), got {low} to {high}")
        numbers = torch.arange(self.num_labels, device=self.order.device)
        if not torch.equal(self.order.sort().values, numbers):
            raise ValueError("expected order to name each label once")
        if bool((self.assignment[self.order].diff() < 0).any()):
            raise ValueError("expected order to list the labels cluster by cluster")
        sizes = self.sizes()
        if int(sizes.max() - sizes.min()) > 1:
            raise ValueError(
                "expected clusters of equal size within one, "
                f"got {int(sizes.min())} to {int(sizes.max())} labels"
            )

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {"assignment": self.assignment.cpu(), "order": self.order.cpu()}
        metadata = {"num_clusters": str(self.num_clusters)}
        write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Clusters:
        """Read what `save` wrote. Raises ValueError naming a missing or damaged file."""
        try:
            with safe_open(path, framework="pt") as file:
                num_clusters = int((file.metadata() or {})["num_clusters"])
                assignment, order = file.get_tensor("assignment"), file.get_tensor("order")
            clusters = cls(assignment, num_clusters, order)
            clusters.validate()
        except FileNotFoundError:
            raise ValueError(f"{path}: expected label clusters, got no such file") from None
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: expected label clusters, got: {reason}") from None
        return clusters


def num_clusters_for(num_labels: int, max_labels: int) -> int:
    """The least power of two of clusters that hold at most `max_labels` labels each."""
    if num_labels < 1:
        raise ValueError(f"expected at least one label, got {num_labels}")
    if max_labels < 1:
        raise ValueError(f"expected max_labels of at least 1, got {max_labels}")
    needed = -(-num_labels // max_labels)
    return int(1 << (needed - 1).bit_length())


def cluster_labels(
    features: scipy.sparse.csr_matrix | scipy.sparse.csr_array | np.ndarray | Tensor,  # [L, V]
    *,
    max_labels: int = 100,
    seed: int,
    num_threads: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Clusters:
    """Split the labels by balanced spherical 2-means until no cluster holds over `max_labels`.

    Each split goes through the median of `x . (c0 - c1)`, with c0 and c1 the mean directions of
    the two halves, so that the sizes of the 2^depth clusters differ by one at most. Labels with
    an empty row are dealt evenly. `max_labels` or fewer labels are one cluster.

    Features are sparse, or dense (embeddings of label texts), of any scale: rows are normalised.
    Holds one copy of them in float32, and what is being split a second time. The result depends
    on features and seed only, not on `num_threads` (default: torch's number). `track` wraps the
    levels of the tree, for a progress bar.

    Raises ValueError on features that are not finite, no matrix, or without a row.
    """
    matrix = _as_matrix(features)
    num_labels = matrix.shape[0]
    num_clusters = num_clusters_for(num_labels, max_labels)
    nodes: list[tuple[np.ndarray, Matrix] | None]
    nodes = [(np.arange(num_labels), _compact(_normalised(matrix)))]
    del matrix, features

    def split(level: int, position: int) -> list[tuple[np.ndarray, Matrix]]:
        node = nodes[position]
        assert node is not None
        nodes[position] = None  # so that a level is held once, not together with the next
        labels, rows = node
        left = two_means(rows, np.random.default_rng([seed, level, position]))
        halves = (np.flatnonzero(left), np.flatnonzero(~left))
        return [(labels[half], _compact(rows[half])) for half in halves]

    with ThreadPoolExecutor(num_threads or torch.get_num_threads()) as pool:
        for level in track(range(num_clusters.bit_length() - 1)):
            pairs = pool.map(split, [level] * len(nodes), range(len(nodes)))
            nodes = [child for pair in list(pairs) for child in pair]
    leaves = [node[0] for node in nodes if node is not None]
    order = np.concatenate(leaves)
    assignment = np.empty(num_labels, np.int32)
    assignment[order] = np.repeat(np.arange(num_clusters), [len(leaf) for leaf in leaves])
    return Clusters(torch.from_numpy(assignment), num_clusters, torch.from_numpy(order))


def two_means(
    rows: Matrix,  # [n, V] float32, of length one or empty
    generator: np.random.Generator,
) -> np.ndarray:  # [n] bool
    """Which rows form the first of two halves of equal size (it has one more of an odd n)."""
    filled = _filled(rows)
    where = np.flatnonzero(filled)
    left = np.zeros(len(filled), bool)
    if len(where) > 1:
        left = _alternate(rows, where, _first_direction(rows, where, generator))
    else:
        left[where] = True
    rest = (len(left) + 1) // 2 - int(left.sum())
    left[np.flatnonzero(~filled)[:rest]] = True
    return left


def _alternate(rows: Matrix, where: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Lloyd's two steps in turn, on the non-empty rows `where`, from `c0 - c1`."""
    total = _weighted_sum(rows, np.ones(rows.shape[0], np.float32))
    best = 0.0
    for _ in range(_MAX_ROUNDS):
        scores = _product(rows, direction)[where]
        # Stable, so that ties are broken by the lower label.
        ranked = where[np.argsort(-scores, kind="stable")]
        left = np.zeros(rows.shape[0], bool)
        left[ranked[: (len(where) + 1) // 2]] = True
        first = _weighted_sum(rows, left.astype(np.float32))
        second = total - first
        lengths = np.linalg.norm(first), np.linalg.norm(second)
        # The sum of x . c over all rows, each with the centre of its own half.
        objective = float(lengths[0]) + float(lengths[1])
        if objective <= best * (1 + _TOLERANCE):
            break
        best = objective
        tiny = np.finfo(np.float32).tiny  # dense rows may cancel
        direction = first / max(lengths[0], tiny) - second / max(lengths[1], tiny)
    return left


def _first_direction(
    rows: Matrix, where: np.ndarray, generator: np.random.Generator
) -> np.ndarray:  # [V] float32
    """The difference of two rows: one at random, one with a chance of its distance squared."""
    first = where[generator.integers(len(where))]
    start = _row(rows, first)
    chances = np.maximum(1.0 - _product(rows, start)[where].astype(np.float64), 0)
    chances[where == first] = 0
    bounds = np.cumsum(chances)
    drawn = np.searchsorted(bounds, generator.random() * bounds[-1], side="right")
    second = where[min(int(drawn), len(where) - 1)]
    return cast(np.ndarray, start - _row(rows, second))


def _as_matrix(features: Any) -> Matrix:
    if isinstance(features, Tensor):
        features = features.detach().float().cpu().numpy()
    if scipy.sparse.issparse(features):
        features = scipy.sparse.csr_matrix(cast(Any, features))
        if not features.has_canonical_format:
            features = features.copy()
            features.sum_duplicates()
        values = features.data
    else:
        values = features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"expected features of shape [L, V], got {list(features.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("expected finite features, got nan or inf")
    return cast(Matrix, features)


def _normalised(matrix: Matrix) -> Matrix:
    """A float32 copy with rows of length one; rows of zeros lose their stored entries."""
    if isinstance(matrix, np.ndarray):
        lengths = np.sqrt(np.einsum("lv,lv->l", matrix, matrix, dtype=np.float64))
        lengths[lengths == 0] = 1
        out = np.empty(matrix.shape, np.float32)
        return np.divide(matrix, lengths[:, None], out=out, casting="same_kind")
    scale = inverse_lengths(matrix)
    counts = np.diff(matrix.indptr)
    data = (matrix.data * np.repeat(scale, counts)).astype(np.float32)
    copy = scipy.sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)
    if (scale == 0)[counts > 0].any():
        copy = copy.copy()
        copy.eliminate_zeros()
    return copy


def inverse_lengths(matrix: scipy.sparse.csr_matrix) -> np.ndarray:
    """1 / the Euclidean length of each row, [n] float64; 0 for a row of zeros."""
    parts = (matrix.data.astype(np.float64) ** 2, matrix.indices, matrix.indptr)
    squares = scipy.sparse.csr_matrix(parts, shape=matrix.shape) @ np.ones(matrix.shape[1])
    lengths = np.sqrt(np.asarray(squares))
    return np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def _compact(matrix: Matrix) -> Matrix:
    """Without the columns that no row uses, so that a small node has short centres."""
    if isinstance(matrix, np.ndarray):
        return matrix
    used = np.zeros(matrix.shape[1], bool)
    used[matrix.indices] = True
    numbers = np.cumsum(used, dtype=matrix.indices.dtype) - 1
    parts = (matrix.data, numbers[matrix.indices], matrix.indptr)
    return scipy.sparse.csr_matrix(parts, shape=(matrix.shape[0], int(used.sum())))


# A dense product goes through einsum: BLAS sums in an order that depends on its threads.


def _product(rows: Matrix, vector: np.ndarray) -> np.ndarray:
    """`rows @ vector`, [n]."""
    if isinstance(rows, np.ndarray):
        return np.einsum("nv,v->n", rows, vector)
    return cast(np.ndarray, rows @ vector)


def _weighted_sum(rows: Matrix, weights: np.ndarray) -> np.ndarray:
    """`weights @ rows`, [V]."""
    if isinstance(rows, np.ndarray):
        return np.einsum("nv,n->v", rows, weights)
    return cast(np.ndarray, rows.T @ weights)


def _row(rows: Matrix, position: int) -> np.ndarray:
    if isinstance(rows, np.ndarray):
        return rows[position]
    return cast(np.ndarray, rows[[position]].toarray()[0])


def _filled(rows: Matrix) -> np.ndarray:
    """Which rows are not empty, [n] bool."""
    if isinstance(rows, np.ndarray):
        return cast(np.ndarray, rows.any(axis=1))
    return cast(np.ndarray, np.diff(rows.indptr) > 0)
