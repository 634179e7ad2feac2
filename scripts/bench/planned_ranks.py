"""Predicted against measured memory, bytes sent and time of a training on 1, 2 and 4 ranks.

    python scripts/bench/planned_ranks.py [--ranks 1,2,4] [--labels 300000] [--set head.fan_in=32]

Ranks are gloo processes of this machine with --threads threads each, which train a bag encoder on
synthetic data for a few steps, as `xmc plan --ranks` counts them. Measured is the highest resident
set above `import torch`, the highest of all ranks; bytes are those that a process writes in a step,
counted by the kernel: those of heads and of the gradient of the bags, and those of what else of the
encoder's gradient is summed, a vector of D.
The time of a step is predicted with the rates of one process and with bandwidth and latency
between two processes, measured before: it means something where there is a core for each rank.
Run it twice where kernels are not compiled yet. Linux only. Prints a JSON line for each number of
ranks and with --output appends them to a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from planned_training import train_synthetic
from provenance import append, provenance

from xmc.memory import peak_memory_bytes

_SUMMED = ("other gradients",)  # by `Replica.sum_gradients_`
_GATHERED = 4 * 2**20  # numbers of a timed all-gather, each rank's


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.rank is not None:
        print(json.dumps(_rank(options)))
        return
    records = measured_and_planned(
        [int(size) for size in options.ranks.split(",")], options.labels, options.settings, options
    )
    if options.output:
        append(options.output, records)
    for record in records:
        print(json.dumps(record))


def measured_and_planned(
    sizes: list[int], num_labels: int, settings: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A line for each number of ranks."""
    from xmc.config import from_dict
    from xmc.training.memory_model import PYTHON_AND_TORCH
    from xmc.training.planner import make_plan
    from xmc.training.scale_network import ETHERNET, Network
    from xmc.training.scale_plan import plan_scale
    from xmc.training.scale_traffic import step_messages
    from xmc.training.workload import Workload

    network = ETHERNET  # not used where no time is predicted
    if not options.no_measure:
        pair = _launch(2, "network", options)
        slowest = min(rank["bandwidth"] for rank in pair)
        network = Network(slowest, max(rank["latency"] for rank in pair))
    found = {size: _launch(size, "training", options) for size in sizes}
    first = found[sizes[0]][0]
    config = from_dict(first["config"], source="planned_ranks")
    plan = make_plan(config, Workload(**first["workload"]), measure=not options.no_measure)
    scale = plan_scale(plan, sizes, network=network)
    records = []
    for ranks in scale.ranks:
        answers = found[ranks.ranks]
        peak = ranks.peak - PYTHON_AND_TORCH
        measured = max(answer["peak_bytes_above_torch"] for answer in answers)
        # The flags of the loop are not part of a trainer's step.
        step = [m for m in step_messages(ranks.messages) if m.name != "flags"]
        records.append(
            {
                "what": "predicted and measured memory and messages of a rank",
                "ranks": ranks.ranks,
                "labels": num_labels,
                "settings": settings,
                "predicted_bytes_above_torch": peak,
                "measured_bytes_above_torch": measured,
                "error": round(peak / measured - 1, 4),
                "predicted_head_bytes": sum(m.bytes for m in step if m.name not in _SUMMED),
                "measured_head_bytes": max(a["sent_bytes"] - a["summed_bytes"] for a in answers),
                "predicted_gradient_bytes": sum(m.bytes for m in step if m.name in _SUMMED),
                "measured_gradient_bytes": max(answer["summed_bytes"] for answer in answers),
                "measured_step_seconds": max(answer["seconds"] for answer in answers),
                **({} if ranks.time is None else _predicted_time(ranks.time.step, network)),
                **provenance(),
            }
        )
    return records


def _predicted_time(seconds: float, network: Any) -> dict[str, Any]:
    return {
        "predicted_step_seconds": seconds,
        "bandwidth_bytes_per_second": round(network.bandwidth),
        "latency_seconds": network.latency,
    }


def _launch(size: int, task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run so many ranks of this script; what each of them printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--task", task, "--store", f"{folder}/store"]
        command += ["--labels", str(options.labels), "--threads", str(options.threads)]
        command += [f"--set={setting}" for setting in options.settings]
        ranks = [
            subprocess.Popen(
                [*command, "--ranks", str(size), "--rank", str(rank)], stdout=subprocess.PIPE
            )
            for rank in range(size)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    for number, rank in enumerate(ranks):
        if rank.returncode:
            raise RuntimeError(f"rank {number} of {size} ended with {rank.returncode}")
    return [json.loads(output.decode().strip().splitlines()[-1]) for output in outputs]


def _rank(options: argparse.Namespace) -> dict[str, Any]:
    """What one rank of a launch answers."""
    before = peak_memory_bytes()
    import torch.distributed as dist

    size = int(options.ranks)
    world = None
    if size > 1:
        store = dist.FileStore(str(options.store), size)
        dist.init_process_group("gloo", store=store, rank=options.rank, world_size=size)
        from xmc.distributed.collectives import World

        world = World.current()
    if options.task == "network":
        return _network()
    trained = train_synthetic(options.labels, options.settings, world)
    measured = peak_memory_bytes() - before

    from dataclasses import asdict

    from xmc.config import to_dict

    answer = {
        "peak_bytes_above_torch": measured,
        "sent_bytes": trained.sent_bytes if size > 1 else 0,
        "summed_bytes": trained.summed_bytes if size > 1 else 0,
        "seconds": trained.seconds,
        "config": to_dict(trained.config),
        "workload": asdict(trained.workload),
    }
    if size > 1:
        dist.destroy_process_group()
    return answer


def _network() -> dict[str, Any]:
    """Bytes a second of a large all-gather between these ranks, and seconds of a small one."""
    from xmc.distributed.collectives import World, gather_rows

    world = World.current()

    def seconds(numbers: int, repeats: int) -> float:
        part, counts = torch.zeros(numbers), [numbers] * world.size
        times = []
        for _ in range(repeats):
            torch.distributed.barrier()
            started = time.perf_counter()
            gather_rows(part, counts, world)
            times.append(time.perf_counter() - started)
        return sorted(times)[repeats // 2]

    latency = seconds(1, 51) / (world.size - 1)
    large = seconds(_GATHERED, 7) / (world.size - 1)
    answer = {"bandwidth": 4 * _GATHERED / (large - latency), "latency": latency}
    torch.distributed.destroy_process_group()
    return answer


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--labels", type=int, default=300_000)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-measure", action="store_true", help="predict no time")
    parser.add_argument("--output", type=Path)
    hidden = {"help": argparse.SUPPRESS}
    parser.add_argument("--rank", type=int, **hidden)
    parser.add_argument("--task", default="training", **hidden)
    parser.add_argument("--store", type=Path, **hidden)
    return parser.parse_args()


if __name__ == "__main__":
    main()
