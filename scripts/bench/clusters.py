"""Time `cluster_labels` on synthetic sparse features with a power law, and append the numbers.

    python scripts/bench/clusters.py --labels 131072 --threads 2

Each label has a log-normal number of words, half drawn from a power law of its own topic (one of
4,096), half from one shared by all. The text is random, so the time says nothing about quality.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import scipy.sparse
import torch
from provenance import RESULTS, append, provenance

from xmc.memory import peak_memory_bytes
from xmc.nn.clusters import cluster_labels

FEATURES, TOPICS, CHUNK = 500_000, 4096, 1 << 14


def features(num_labels: int, words: int, seed: int) -> scipy.sparse.csr_matrix:
    """[L, 500,000] float32."""
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, num_labels, CHUNK):
        rows = min(CHUNK, num_labels - start)
        counts = np.clip(words * generator.lognormal(-0.3, 0.8, rows), 3, 1000).astype(int)
        topics = np.repeat(generator.integers(0, TOPICS, rows), counts)
        ranks = np.minimum(generator.pareto(0.6, counts.sum()) * 20, FEATURES - 1).astype(int)
        own = generator.random(counts.sum()) < 0.5
        ids = np.where(own, (31 * ranks + 7919 * topics) % FEATURES, ranks).astype(np.int32)
        values = generator.exponential(1.0, counts.sum()).astype(np.float32)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        part = scipy.sparse.csr_matrix((values, ids, indptr), shape=(rows, FEATURES))
        part.sum_duplicates()
        parts.append(part)
    return scipy.sparse.vstack(parts, format="csr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=131_072)
    parser.add_argument("--words", type=int, default=250, help="before repeats are merged")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    matrix = features(options.labels, options.words, seed=0)
    seconds = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        clusters = cluster_labels(matrix, seed=42)
        seconds.append(time.perf_counter() - started)
    record = {
        "what": "cluster_labels",
        "labels": options.labels,
        "nnz": int(matrix.nnz),
        "clusters": len(clusters),
        "inputs": "random",
        "seconds": {f"p{q}": round(float(np.percentile(seconds, q)), 2) for q in (20, 50, 80)},
        "features_bytes": int(matrix.data.nbytes + matrix.indices.nbytes),
        "peak_bytes": peak_memory_bytes(),  # of the process, with torch and the features
        **provenance(),
    }
    append(RESULTS / "clusters.jsonl", [record])
    print(f"{matrix.nnz:,} entries, {len(clusters):,} clusters, {record['seconds']} s")


if __name__ == "__main__":
    main()
