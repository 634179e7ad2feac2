"""Time an optimizer step with its state in host memory beside steps with it on the device.

    python scripts/bench/offload.py [--device cuda] [--hidden 768] [--layers 12]
    python scripts/bench/offload.py --table    (markdown from the lines measured before)

The parameters are those of a BERT of that shape. A run is the arrival of all gradients and a step:
by `OffloadedAdamW` (several bucket sizes; on CUDA also with all copies in one stream, as was
published), by fused `torch.optim.AdamW` on float32 parameters, on bfloat16 parameters (moments in
bfloat16, no masters: cheaper and less exact) and on float32 masters of bfloat16 parameters, and by
torchao's `CPUOffloadOptimizer` where it is installed and the device is CUDA (no masters either).

Memory of a line: `device_bytes` is what stays on the device between steps, `host_bytes` what stays
in host memory for it, `peak_extra_bytes` what a run holds beyond that, gradients included. On a CPU
the two are one memory. Appends to `scripts/bench/results/offload.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from provenance import RESULTS, append, provenance
from records import Record, latest, markdown, megabytes, read_records, where_from
from timing import Job, reason, time_jobs
from torch import Tensor

from xmc.distributed.offload import OffloadedAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
BUCKETS = {"cpu": (2**18, 2**22), "cuda": (2**20, 2**22, 2**24)}


@dataclass(frozen=True)
class Model:
    """Numbers that say which parameters a BERT has."""

    hidden: int
    layers: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Embeddings, then attention, feed-forward and norms of each layer."""
        H = self.hidden
        matrices: list[tuple[int, ...]] = [(H, H)] * 4 + [(4 * H, H), (H, 4 * H)]
        vectors: list[tuple[int, ...]] = [(H,)] * 9 + [(4 * H,)]
        return [(self.vocabulary, H), (512, H), *(matrices + vectors) * self.layers]


class Variant:
    """Parameters, constant gradients and what steps them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> Tensor:
            return (scale * torch.randn(shape, generator=draw, device=device)).to(dtype)

        self.parameters = [torch.nn.Parameter(normal(shape, 0.02)) for shape in shapes]
        # Their memory is that of a backward's output: it is there whatever the variant.
        self.gradients = [normal(shape, 1e-3) for shape in shapes]

    def run(self, step: Callable[[], object]) -> None:
        """Gradients arrive, hooks run, the step is taken and the gradients go."""
        torch.autograd.backward(self.parameters, self.gradients)
        step()
        for parameter in self.parameters:
            parameter.grad = None


def with_masters(variant: Variant) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """The usual mixed precision: float32 masters, gradients and moments on the device."""
    masters = [p.detach().float() for p in variant.parameters]
    adamw = torch.optim.AdamW(masters, **OPTIONS, fused=True)

    @torch.no_grad()
    def step() -> None:
        for master, parameter in zip(masters, variant.parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        adamw.step()
        torch._foreach_copy_(list(variant.parameters), masters)
        adamw.zero_grad()

    return step, adamw


def in_one_stream(step: Callable[[], object]) -> None:
    """Copies in, arithmetic and copies out of one bucket after the other."""
    with mock.patch("xmc.distributed.offload_stage._has_streams", return_value=False):
        step()


def torchao_offload(parameters: list[torch.nn.Parameter]) -> Any:
    """As published, gradients copied while the backward runs."""
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(parameters, torch.optim.AdamW, **OPTIONS)


def jobs(model: Model, device: str) -> Iterator[Job | Record]:
    """Every variant, or the line that says why there is none."""
    shapes = model.shapes()
    make = functools.partial(Variant, shapes, device=device)

    def job(what: str, variant: Variant, optimizer: Any, step: Any = None, **about: Any) -> Job:
        step = step or optimizer.step
        variant.run(step)  # creates the state
        held = memory(variant, parts_of(optimizer))
        about = {**about, "parameter_dtype": str(variant.parameters[0].dtype)[6:], **held}
        ours = what.startswith("OffloadedAdamW")
        return Job("step", what, lambda _: variant.run(step), about, ours=ours)

    for dtype in (torch.bfloat16, torch.float32):
        variant = make(dtype)
        yield job(
            "AdamW, fused", variant, torch.optim.AdamW(variant.parameters, **OPTIONS, fused=True)
        )
    variant = make(torch.bfloat16)
    step, adamw = with_masters(variant)
    yield job("AdamW, fused, on masters", variant, adamw, step)
    for dtype in (torch.bfloat16, torch.float32):
        for size in BUCKETS[device]:
            variant = make(dtype)
            optimizer = OffloadedAdamW(variant.parameters, **OPTIONS, bucket_size=size)
            yield job("OffloadedAdamW", variant, optimizer, bucket_size=size)
    if device == "cuda":
        variant = make(torch.bfloat16)
        optimizer = OffloadedAdamW(variant.parameters, **OPTIONS)
        step = functools.partial(in_one_stream, optimizer.step)
        yield job(
            "OffloadedAdamW, one stream",
            variant,
            optimizer,
            step,
            bucket_size=optimizer.bucket_size,
        )
    what = "torchao CPUOffloadOptimizer"
    try:
        variant = make(torch.bfloat16)
        yield job(what, variant, torchao_offload(variant.parameters))
    except Exception as error:  # not installed, or not for this device: a line says so
        yield {"operation": "step", "what": what, "not_available": reason(error)}


def parts_of(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizer itself, or those that torchao's has for each parameter and for small ones."""
    if not hasattr(optimizer, "optim_dict"):
        return [optimizer]
    small = [optimizer.d_opt] if optimizer.d_opt else []
    return [*optimizer.optim_dict.values(), *small]


def memory(variant: Variant, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes of parameters, masters, their gradients and state that stay, by where they are."""
    device = variant.parameters[0].device
    every: dict[int, Tensor] = {p.data_ptr(): p for p in variant.parameters}
    for optimizer in optimizers:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [p.grad for p in stepped if p.grad is not None]
        states = [v for state in optimizer.state.values() for v in state.values()]
        every |= {t.data_ptr(): t for t in (*stepped, *kept, *states) if isinstance(t, Tensor)}
    on_device = sum(t.nbytes for t in every.values() if t.device == device)
    on_host = sum(t.nbytes for t in every.values() if t.device != device)
    count = sum(p.numel() for p in variant.parameters)
    return {"device_bytes": on_device, "host_bytes": on_host, "parameters": count}


def table(records: Sequence[Record]) -> str:
    """The newest line of each variant."""
    names = ("what", "parameter_dtype", "bucket_size", "hidden", "layers")
    rows = []
    for record in latest(records, names):
        cells = [
            record["what"],
            record.get("parameter_dtype", ""),
            str(record.get("bucket_size", "")),
        ]
        if "not_available" in record:
            rows.append([*cells, record["not_available"], "", "", ""])
            continue
        time = f"{record['median_ms']:.1f} [{record['p20_ms']:.1f}, {record['p80_ms']:.1f}]"
        held = [
            f"{record[name] / record['parameters']:.1f}" if name in record else "-"
            for name in ("device_bytes", "host_bytes")
        ]
        rows.append([*cells, time, *held, megabytes(record)])
    header = ["step", "parameters", "bucket", "ms", "device B/p", "host B/p", "peak beyond, MB"]
    return f"{where_from(records)}\n\n{markdown(header, rows)}"


def main() -> None:
    """Measure, or show what was measured."""
    options = parse()
    if options.table:
        print(table(read_records(options.output)))
        return
    torch.set_num_threads(options.threads)
    model = Model(options.hidden, options.layers, options.vocabulary)
    about = {**vars(model), **provenance(options.device, ("torchao",))}
    made = list(jobs(model, options.device))
    timed = [job for job in made if isinstance(job, Job)]
    records, failures = time_jobs(
        timed, options.device, seconds=options.seconds, repeats=options.repeats
    )
    for record in records:
        record.pop("state_gb_per_s", None)  # what state a job moves is not counted here
    records = [
        record | about for record in [*records, *(line for line in made if isinstance(line, dict))]
    ]
    append(options.output, records)
    print(table(records))
    if failures:
        sys.exit("these failed:\n" + "\n".join(failures))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, help="default: 768 on CUDA, 256 on a CPU")
    parser.add_argument("--layers", type=int, help="default: 12 on CUDA, 4 on a CPU")
    parser.add_argument("--vocabulary", type=int, default=30_522)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--table", action="store_true", help="print markdown")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20, help="for all timed runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "offload.jsonl")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if not cpu and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none: --device cpu tries the script")
    options.hidden = options.hidden or (256 if cpu else 768)
    options.layers = options.layers or (4 if cpu else 12)
    if options.quick:
        options.hidden, options.layers, options.vocabulary = 16, 1, 100
        options.repeats, options.seconds = min(3, options.repeats), 1
    return options


if __name__ == "__main__":
    main()
