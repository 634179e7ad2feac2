"""Time the classifier's operations on a GPU against a dense bfloat16 classifier.

    python scripts/bench/gpu_classifier.py [--labels 131072 1000000] [--quick]

For every shape: the fused sparse step (bfloat16 weights, SGD), its forward and its top-k, each per
group size; the dense step of the same batch (three matrix products per tile of labels, update in
place) and the dense top-k. Random numbers, six batches in turn, median of device time; bytes/s of
the sparse step count weights and indices read once and weights written once. Appends to
`scripts/bench/results/gpu_classifier.jsonl`. `--device cpu` runs tiny shapes, to try the script.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import RESULTS, append, provenance
from torch import Tensor

from xmc_kernels.classifier import UpdateRule, classifier_step_, make_state
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.topk import fan_in_topk

BATCHES = 6
POSITIVES = 5
K = 5
LR = 1e-3
Job = Callable[[int], object]


def make_index(rows: int, features: int, fan_in: int, device: str) -> Tensor:
    """[rows, F] sorted, distinct; repeats after 65,536 rows."""
    pool = torch.rand(min(rows, 65_536), features, device=device).topk(fan_in, dim=1).indices
    pool = pool.sort(1).values.to(torch.uint16)
    return pool.repeat(-(-rows // len(pool)), 1)[:rows].contiguous()


class Inputs:
    """Six batches of features and positives."""

    def __init__(self, labels: int, features: int, batch: int, device: str) -> None:
        self.batch = batch
        self.x = [torch.randn(batch, features, device=device).bfloat16() for _ in range(BATCHES)]
        drawn = torch.randint(labels, (BATCHES, batch, POSITIVES), device=device).sort(2).values
        self.indices = drawn.flatten(1).int()
        self.indptr = torch.arange(batch + 1, device=device) * POSITIVES
        self.rows = torch.arange(batch, device=device).repeat_interleave(POSITIVES)


def sparse_jobs(inputs: Inputs, index: Tensor, labels: int) -> dict[str, Job]:
    fan_in, device = index.shape[1], index.device
    weight = (torch.randn(labels, fan_in, device=device) / fan_in**0.5).bfloat16()
    bias = torch.full((labels,), -5.0, device=device)
    rule = UpdateRule("sgd")
    state = make_state(weight, bias, rule)

    def step(i: int) -> object:
        return classifier_step_(
            inputs.x[i],
            weight,
            index,
            bias,
            inputs.indptr,
            inputs.indices[i],
            loss="bce",
            rule=rule,
            state=state,
            lr=LR,
            step=1,
            grad_scale=1 / inputs.batch,
        )

    jobs: dict[str, Job] = {
        "step, fused sparse": step,
        "top-k, sparse": lambda i: fan_in_topk(inputs.x[i], weight, index, bias, K),
    }
    if labels * inputs.batch <= 2**28:
        jobs["forward, sparse"] = lambda i: fan_in_linear(inputs.x[i], weight, index, bias)
    return jobs


def dense_jobs(inputs: Inputs, labels: int, features: int, device: str) -> dict[str, Job]:
    """The best simple dense classifier: tiles of labels, so that [B, L] stays small here too."""
    weight = torch.empty(labels, features, dtype=torch.bfloat16, device=device).normal_(std=0.03)
    tile = 131_072

    def step(i: int) -> object:
        x, d_x = inputs.x[i], torch.zeros_like(inputs.x[i])
        labels_i = inputs.indices[i].long()
        for start in range(0, labels, tile):
            part = weight[start : start + tile]
            g = (x @ part.T).sigmoid_()
            here = (labels_i >= start) & (labels_i < start + len(part))
            g[inputs.rows[here], labels_i[here] - start] -= 1
            g /= inputs.batch
            d_x.addmm_(g, part)
            part.addmm_(g.T, x, alpha=-LR)
        return d_x

    def topk(i: int) -> object:
        parts = [
            (inputs.x[i] @ weight[start : start + tile].T).topk(K, dim=1).values
            for start in range(0, labels, tile)
        ]
        return torch.cat(parts, 1).topk(K, dim=1)

    return {"step, dense bfloat16": step, "top-k, dense bfloat16": topk}


def median_ms(job: Job, repeats: int, device: str) -> tuple[float, float, float]:
    """p20, median, p80 of one run in milliseconds, by device events on a GPU."""
    for i in range(3):
        job(i)
    values = []
    for repeat in range(repeats):
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            job(repeat % BATCHES)
            events[1].record()
            events[1].synchronize()
            values.append(events[0].elapsed_time(events[1]))
        else:
            started = time.perf_counter()
            job(repeat % BATCHES)
            values.append(1e3 * (time.perf_counter() - started))
    low, median, high = np.quantile(values, [0.2, 0.5, 0.8])
    return float(low), float(median), float(high)


def peak_extra_bytes(job: Job, device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(jobs: dict[str, Job], about: dict[str, Any], options: Any) -> None:
    records = []
    for name, job in jobs.items():
        extra = peak_extra_bytes(job, options.device)
        low, median, high = median_ms(job, options.repeats, options.device)
        record = {
            "what": name,
            **about,
            "p20_ms": round(low, 4),
            "median_ms": round(median, 4),
            "p80_ms": round(high, 4),
            "peak_extra_bytes": extra,
        }
        if name == "step, fused sparse":
            moved = about["L"] * about["F"] * 4 + about["L"] // about["G"] * about["F"] * 2
            record["gb_per_s"] = round(moved / median / 1e6, 1)
        records.append(record | options.about)
        shape = " ".join(f"{key}={about.get(key)}" for key in ("L", "B", "F", "G"))
        print(f"{shape:36s} {name:24s} {median:9.3f} ms", flush=True)
    append(options.output, records)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[131_072, 670_091, 1_000_000, 2_812_281]
    )
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--fan-in", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--group", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="one million labels, B=128 only")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_classifier.jsonl")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the script on tiny shapes")
    if options.device == "cpu":
        options.labels, options.batch, options.repeats = [4096], [8], 3
    if options.quick:
        options.labels, options.batch = [1_000_000], [128]
    options.about = provenance()
    if options.device == "cuda":
        options.about["device"] = torch.cuda.get_device_name()
    torch.manual_seed(0)
    for labels, batch in itertools.product(options.labels, options.batch):
        inputs = Inputs(labels, options.features, batch, options.device)
        about = {"L": labels, "D": options.features, "B": batch, "dtype": "bfloat16"}
        dense = dense_jobs(inputs, labels, options.features, options.device)
        measure(dense, about, options)
        del dense
        for fan_in, group in itertools.product(options.fan_in, options.group):
            rounded = labels - labels % group
            index = make_index(rounded // group, options.features, fan_in, options.device)
            sparse = sparse_jobs(
                Inputs(rounded, options.features, batch, options.device), index, rounded
            )
            measure(sparse, about | {"L": rounded, "F": fan_in, "G": group}, options)


if __name__ == "__main__":
    main()
