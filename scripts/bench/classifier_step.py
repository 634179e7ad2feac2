"""Time the classifier's operations on the CPU against what torch offers for the same job.

    python scripts/bench/classifier_step.py [--labels 131072 --features 768 --fan-in 32 --batch 64]
    python scripts/bench/classifier_step.py --sweep [--plot FILE.png]

Jobs: a whole training step (binary cross-entropy, SGD, and AdamW for the fused one), the forward
pass, the five best labels. The dense step is the best simple one: F.linear, sigmoid minus targets,
one GEMM for d_x and `addmm_` for the update. Numbers are random; six batches take turns; variants
are interleaved, one run of each after the other. Index rows repeat after 65,536 labels.

Appends a JSON line per variant and shape to `scripts/bench/results/classifier_step.jsonl`; peak
memory is what one run adds to the resident set.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from provenance import RESULTS, append, provenance
from torch import Tensor

from xmc_kernels.classifier import UpdateRule, classifier_step_, make_state
from xmc_kernels.fan_in import fan_in_linear
from xmc_kernels.topk import fan_in_topk

BATCHES = 6
POSITIVES = 5  # per row
K = 5
LR = 1e-3
BASE = "step, fused sparse, SGD"


@dataclass(frozen=True)
class Shape:
    L: int = 131_072
    D: int = 768
    F: int = 32
    B: int = 64


@dataclass(frozen=True)
class Batch:
    x: Tensor  # [B, D]
    indptr: Tensor
    indices: Tensor
    rows: Tensor  # of each positive


def make_batches(s: Shape) -> list[Batch]:
    batches = []
    for _ in range(BATCHES):
        labels = torch.randint(s.L, (s.B, POSITIVES)).sort(1).values.flatten()
        rows = torch.arange(s.B).repeat_interleave(POSITIVES)
        indptr = torch.arange(s.B + 1) * POSITIVES
        batches.append(Batch(torch.randn(s.B, s.D), indptr, labels.int(), rows))
    return batches


def make_index(s: Shape) -> Tensor:
    """[L, F] sorted, distinct columns."""
    pool = torch.rand(min(s.L, 65_536), s.D).topk(s.F, dim=1).indices.sort(1).values
    dtype = torch.uint16 if s.D <= 65_536 else torch.int32
    return pool.to(dtype).repeat(-(-s.L // len(pool)), 1)[: s.L].contiguous()


Job = Callable[[Batch], object]


def sparse_jobs(s: Shape) -> dict[str, Job]:
    """The toolkit's operations, and torch's own ways to a sparse forward."""
    index = make_index(s)
    weight, bias = torch.randn(s.L, s.F) / s.F**0.5, torch.full((s.L,), -5.0)

    def trainer(kind: str) -> Job:
        rule = UpdateRule(kind)  # type: ignore[arg-type]
        own_weight, own_bias = weight.clone(), bias.clone()
        state = make_state(own_weight, own_bias, rule)

        def step(b: Batch) -> object:
            return classifier_step_(
                b.x,
                own_weight,
                index,
                own_bias,
                b.indptr,
                b.indices,
                loss="bce",
                rule=rule,
                state=state,
                lr=LR,
                step=1,
                grad_scale=1 / s.B,
            )

        return step

    jobs: dict[str, Job] = {
        BASE: trainer("sgd"),
        "step, fused sparse, AdamW": trainer("adamw"),
        "top-k, sparse": lambda b: fan_in_topk(b.x, weight, index, bias, K),
    }
    if s.L * s.B * 4 <= 2**29:
        wide = index.int()
        crow = torch.arange(0, s.L * s.F + 1, s.F, dtype=torch.int32)
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch's CSR is "in beta state"
        csr = torch.sparse_csr_tensor(crow, wide.flatten(), weight.flatten(), (s.L, s.D))
        jobs |= {
            "forward, sparse": lambda b: fan_in_linear(b.x, weight, index, bias),
            "forward, embedding_bag": lambda b: F.embedding_bag(
                wide, b.x.t().contiguous(), per_sample_weights=weight, mode="sum"
            ),
            "forward, torch CSR": lambda b: csr @ b.x.t(),
        }
    return jobs


def dense_jobs(s: Shape) -> dict[str, Job]:
    """The same jobs with a dense matrix, in float32 and bfloat16."""
    jobs: dict[str, Job] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(s.L, s.D) / s.D**0.5).to(dtype)
        bias = torch.full((s.L,), -5.0).to(dtype)

        def step(b: Batch, weight: Tensor = weight, bias: Tensor = bias) -> object:
            x = b.x.to(weight.dtype)
            g = F.linear(x, weight, bias).sigmoid_()
            g[b.rows, b.indices.long()] -= 1
            g /= len(x)
            d_x = g @ weight
            weight.addmm_(g.T, x, alpha=-LR)
            bias.sub_(g.sum(0), alpha=LR)
            return d_x

        def topk(b: Batch, weight: Tensor = weight, bias: Tensor = bias) -> object:
            return F.linear(b.x.to(weight.dtype), weight, bias).topk(K, dim=1)

        def forward(b: Batch, weight: Tensor = weight, bias: Tensor = bias) -> object:
            return F.linear(b.x.to(weight.dtype), weight, bias)

        name = str(dtype).removeprefix("torch.")
        jobs |= {f"step, dense {name}": step, f"top-k, dense {name}": topk}
        if dtype == torch.float32:
            jobs[f"forward, dense {name}"] = forward
    return jobs


def peak_extra_bytes(job: Job, batch: Batch) -> int | None:
    """What one run adds to the resident set at its peak; Linux only."""
    if sys.platform != "linux":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory is not free memory until it is given back
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    job(batch)
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(s: Shape, options: argparse.Namespace, about: dict[str, object]) -> list[dict]:
    """Time all jobs of a shape, interleaved; returns and writes one record per job."""
    torch.manual_seed(0)
    batches = make_batches(s)
    jobs = sparse_jobs(s)
    if options.dense_gib * 2**30 >= s.L * s.D * 4:
        jobs |= dense_jobs(s)
    jobs = {name: job for name, job in jobs.items() if options.only in name}
    for job in jobs.values():
        job(batches[0])
    memory = {name: peak_extra_bytes(job, batches[1]) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    started = time.perf_counter()
    for repeat in range(options.repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job(batches[repeat % BATCHES])
            seconds[name].append(time.perf_counter() - begin)
        if repeat >= 4 and time.perf_counter() - started > options.seconds:
            break
    records = []
    for name, values in seconds.items():
        low, median, high = (round(1e3 * float(q), 3) for q in np.quantile(values, [0.2, 0.5, 0.8]))
        records.append(
            {
                "what": name,
                **asdict(s),
                "dtype": "bfloat16" if "bfloat16" in name else "float32",
                "median_ms": median,
                "p20_ms": low,
                "p80_ms": high,
                "runs": len(values),
                "peak_extra_bytes": memory[name],
                **about,
            }
        )
    append(options.output, records)
    show(s, records, seconds)
    return records


def show(s: Shape, records: list[dict], seconds: dict[str, list[float]]) -> None:
    print(f"L={s.L:,} D={s.D} F={s.F} B={s.B}, {records[0]['threads']} threads")
    print(f"  {'':28s} {'median':>9s} {'p20':>9s} {'p80':>9s}  {'x fused':>8s} {'extra MB':>9s}")
    base = seconds.get(BASE)
    for r in records:
        # The median of the ratios of neighbouring runs: load on the machine hits both alike.
        ratio = (
            f"{np.median(np.divide(seconds[r['what']], base)):8.2f}"
            if base and r["what"].startswith("step")
            else ""
        )
        extra = "" if r["peak_extra_bytes"] is None else f"{r['peak_extra_bytes'] / 1e6:9.1f}"
        times = " ".join(f"{r[key]:9.2f}" for key in ("median_ms", "p20_ms", "p80_ms"))
        print(f"  {r['what']:28s} {times}  {ratio:>8s} {extra}", flush=True)


def sweep() -> list[Shape]:
    """Shapes that leave the headline shape along one axis at a time."""
    shapes = [Shape(L=2**n) for n in range(14, 23)]
    shapes += [Shape(F=f) for f in (16, 64, 128)]
    shapes += [Shape(B=b) for b in (1, 4, 16, 32, 128, 256, 512)]
    return shapes


def plot(records: list[dict], path: Path) -> None:
    """Time of a step over the number of labels, at the headline D, F and B."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    headline = Shape()
    rest = asdict(headline) | {"L": None}
    records = [r for r in records if all(v in (None, r[key]) for key, v in rest.items())]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in sorted({r["what"] for r in records if r["what"].startswith("step")}):
        points = sorted(
            (r["L"], r["median_ms"], r["p20_ms"], r["p80_ms"])
            for r in records
            if r["what"] == name
            and (r["D"], r["F"], r["B"]) == (headline.D, headline.F, headline.B)
        )
        if points:
            labels, median, low, high = zip(*points, strict=True)
            axes.plot(labels, median, marker="o", label=name.removeprefix("step, "))
            axes.fill_between(labels, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="labels L", ylabel="ms per training step")
    axes.set_title(
        f"D={headline.D}, F={headline.F}, B={headline.B}, CPU, {records[0]['threads']} threads"
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=Shape.L)
    parser.add_argument("--features", type=int, default=Shape.D)
    parser.add_argument("--fan-in", type=int, default=Shape.F)
    parser.add_argument("--batch", type=int, default=Shape.B)
    parser.add_argument("--sweep", action="store_true", help="many shapes instead of one")
    parser.add_argument("--only", default="", help="variants whose name has this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=30, help="per shape, after five runs")
    parser.add_argument("--dense-gib", type=float, default=1, help="largest dense matrix to time")
    parser.add_argument("--output", type=Path, default=RESULTS / "classifier_step.jsonl")
    parser.add_argument("--plot", type=Path, help="PNG of step time over labels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = provenance()
    one = Shape(options.labels, options.features, options.fan_in, options.batch)
    records = []
    for shape in sweep() if options.sweep else [one]:
        records += measure(shape, options, about)
    if options.plot or options.sweep:
        plot(records, options.plot or options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
