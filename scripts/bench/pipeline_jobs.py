"""The ranks of the pipeline benchmark: stages whose work is partly sleep, under three engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from pipeline_ideal import gpipe, message_driven, one_f_one_b, scheduled
from pipeline_settings import Setting
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import BertConfig, BertModel

from xmc.distributed.pipeline import Pipeline, differentiated
from xmc.nn.stages import cut_encoder
from xmc.nn.transformer import TransformerEncoder
from xmc.types import Tokens

GPIPE, ONE_F_ONE_B = "torch GPipe", "torch 1F1B"


class Meter:
    """Seconds in forward and backward passes, and micro-batches between the two."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.busy, self.in_flight, self.most_in_flight = 0.0, 0, 0

    def start(self) -> None:
        """A forward pass begins."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    @contextmanager
    def backward_timed(self) -> Iterator[None]:
        """Inside, what every engine calls for its backward passes is counted as busy."""
        backward = torch.autograd.backward

        def timed(*args: Any, **options: Any) -> None:
            started = time.perf_counter()
            backward(*args, **options)
            self.busy += time.perf_counter() - started

        with mock.patch.object(torch.autograd, "backward", timed):
            yield


class Work(nn.Module):
    """A stage that sleeps after its forward pass and before its backward pass."""

    def __init__(self, stage: nn.Module, meter: Meter) -> None:
        super().__init__()
        self.stage = stage
        self.meter = meter
        self.durations = iter(np.zeros((0, 2)))

    def forward(self, *inputs: Any) -> Any:
        started = time.perf_counter()
        self.meter.start()
        output = self.stage(*inputs)
        # An engine may run a stage once more, to find out shapes.
        forward, backward = map(float, next(self.durations, (0.0, 0.0)))
        time.sleep(forward)
        first, *rest = (output,) if isinstance(output, Tensor) else output
        first = _SleepBackward.apply(first, self.meter, backward)
        self.meter.busy += time.perf_counter() - started
        return (first, *rest) if rest else first


class _SleepBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, meter: Meter, seconds: float) -> Tensor:
        ctx.meter, ctx.seconds = meter, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        ctx.meter.in_flight -= 1
        return d_x, None, None


def measure(rank: int, folder: str, settings: list[Setting], limits: list[int], runs: int) -> None:
    """One rank: time every setting under every engine; rank 0 writes `lines.json`."""
    torch.set_num_threads(1)
    size = settings[0].stages
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=2)
    )
    try:
        lines = [line for s in settings for line in _measure(rank, s, limits, runs)]
        if rank == 0:
            Path(folder, "lines.json").write_text(json.dumps(lines))
    finally:
        dist.destroy_process_group()


def _measure(rank: int, setting: Setting, limits: list[int], runs: int) -> list[dict[str, Any]]:
    meter = Meter()
    work = Work(_stage(rank, setting), meter)
    torch.manual_seed(1)
    rows = setting.micro_batches * setting.rows
    tokens = Tokens(
        torch.randint(3, 50, (rows, setting.T)), torch.ones(rows, setting.T, dtype=torch.int64)
    )
    targets = torch.randn(rows, setting.D)
    engines = _engines(rank, setting, limits, work, tokens, targets)
    seconds: dict[str, list[Tensor]] = {name: [] for name in engines}
    gradients: dict[str, Tensor] = {}
    most = dict.fromkeys(engines, 0)
    for step in range(runs + 1):
        for name, engine in engines.items():  # in turn
            work.zero_grad()
            work.durations = iter(setting.durations(rank, step))
            meter.reset()
            dist.barrier()
            with meter.backward_timed():
                started, started_cpu = time.perf_counter(), time.process_time()
                engine()
                spent, cpu = time.perf_counter() - started, time.process_time() - started_cpu
            if step == 0:  # warms up, and torch's engines run each stage once more for the shapes
                gradients[name] = torch.cat(
                    [p.grad.flatten() for p in work.parameters() if p.grad is not None]
                )
                continue
            seconds[name].append(torch.tensor([spent, meter.busy, cpu], dtype=torch.float64))
            most[name] = max(most[name], meter.most_in_flight)
    truth = gradients[GPIPE]
    ideals = _ideals(setting, limits, range(1, runs + 1))
    lines = []
    for name in engines:
        error = float((gradients[name] - truth).abs().max() / truth.abs().max())
        own = torch.stack(
            [*seconds[name], torch.tensor([most[name], error, 0], dtype=torch.float64)]
        )
        gathered = [torch.empty_like(own) for _ in range(setting.stages)]
        dist.all_gather(gathered, own)
        lines.append({"what": name, **_line(torch.stack(gathered).numpy()), **ideals[name]})
    return lines


def _line(values: np.ndarray) -> dict[str, Any]:  # [ranks, runs + 1, 3]
    """Milliseconds of a step until the last rank is done, and what share of it ranks were idle."""
    spent, busy, cpu = np.moveaxis(values[:, :-1], 2, 0)
    step = spent.max(0)
    idle = 1 - busy / step
    low, median, high = (float(q) for q in np.quantile(1e3 * step, [0.2, 0.5, 0.8]))
    return {
        "median_ms": round(median, 3),
        "p20_ms": round(low, 3),
        "p80_ms": round(high, 3),
        "runs": len(step),
        "idle_share": round(float(np.median(idle.mean(0))), 4),  # mean over ranks
        "idle_share_by_rank": [round(float(q), 4) for q in np.median(idle, axis=1)],
        "cpu_ms": round(float(np.median(1e3 * cpu.mean(0))), 3),  # of a rank, all its threads
        "max_in_flight_by_rank": [int(count) for count in values[:, -1, 0]],
        "gradient_difference": float(values[:, -1, 1].max()),
    }


def _ideals(setting: Setting, limits: list[int], steps: range) -> dict[str, dict[str, Any]]:
    """What the engines would take for the same sleeps if nothing else took time, by name."""
    shape = setting.stages, setting.micro_batches
    results: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        seconds = np.stack([setting.durations(stage, step) for stage in range(setting.stages)])
        took = {_limited(limit): message_driven(seconds, limit) for limit in limits}
        took[GPIPE] = scheduled(seconds, gpipe(*shape))
        took[ONE_F_ONE_B] = scheduled(seconds, one_f_one_b(*shape))
        busy = seconds.sum((1, 2)).mean()
        for name, time_ in took.items():
            results.setdefault(name, []).append((1e3 * time_, 1 - busy / time_))
    medians = {name: np.median(values, axis=0) for name, values in results.items()}
    return {
        name: {"ideal_ms": round(float(ms), 3), "ideal_idle_share": round(float(idle), 4)}
        for name, (ms, idle) in medians.items()
    }


def _limited(limit: int) -> str:
    return f"message-driven, limit {limit}"


def _stage(rank: int, setting: Setting) -> nn.Module:
    """A cut with one layer a stage; the same weights in every process."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=setting.D,
        num_hidden_layers=setting.stages,
        num_attention_heads=2,
        intermediate_size=2 * setting.D,
        max_position_embeddings=setting.T,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    encoder = TransformerEncoder(BertModel(config))
    return cut_encoder(encoder, range(2, setting.stages + 1))[rank]


def _engines(
    rank: int,
    setting: Setting,
    limits: list[int],
    work: Work,
    tokens: Tokens,
    targets: Tensor,  # [M * rows, D]
) -> dict[str, Callable[[], object]]:
    """A step of each engine on the same stages, by name."""
    is_first, is_last = rank == 0, rank == setting.stages - 1
    parts = [tokens.slice(i, i + setting.rows) for i in range(0, len(tokens), setting.rows)]
    target_parts = targets.split(setting.rows)

    def square_error(reps: Tensor, target: Tensor) -> Tensor:
        return (reps - target).square().sum(1).mean()

    def share(reps: Tensor, number: int) -> Tensor:
        return square_error(reps, target_parts[number]) / setting.micro_batches

    engines: dict[str, Callable[[], object]] = {}
    for limit in limits:
        pipeline = Pipeline(work, num_stages=setting.stages, pipeline_limit=limit)

        def driven(pipeline: Pipeline = pipeline) -> object:
            return pipeline.step(
                parts if is_first else None, differentiated(share) if is_last else None, seed=0
            )

        engines[_limited(limit)] = driven
    for name, kind in ((GPIPE, ScheduleGPipe), (ONE_F_ONE_B, Schedule1F1B)):
        stage = PipelineStage(work, rank, setting.stages, torch.device("cpu"))
        schedule = kind(stage, setting.micro_batches, loss_fn=square_error)

        def step(schedule: Any = schedule) -> object:
            arguments = (tokens.ids, tokens.mask) if is_first else ()
            return schedule.step(
                *arguments, target=targets if is_last else None, return_outputs=False
            )

        engines[name] = step
    return engines
