"""What each rank does in test_pipeline.py, and the model it does it with."""

from __future__ import annotations

import time
import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmc.distributed import collectives
from xmc.distributed.collectives import World
from xmc.distributed.gradient_sum import sum_gradients_
from xmc.distributed.keyed_random import mixed
from xmc.distributed.pipeline import Pipeline, differentiated
from xmc.types import Tokens

DIM, VOCABULARY, SEED = 6, 11, 9


class Embedding(nn.Module):
    """Tokens to hidden states [B, T, D] and their mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, DIM)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return self.dropout(self.table(tokens.ids)), tokens.mask


class Layer(nn.Module):
    """Every position sees the mean of the real ones."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * DIM, DIM), nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(0.3)
        self.delay = delay

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.delay)
        mean = _mean(hidden, mask).unsqueeze(1).expand_as(hidden)
        inner = torch.tanh(self.inner(torch.cat([hidden, mean], 2)))
        return hidden + self.outer(self.dropout(inner)), mask


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.dropout(_mean(hidden, mask))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    real = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1)


def cuts(device: str = "cpu") -> list[nn.Module]:
    """Of one model, the same on every rank."""
    torch.manual_seed(3)
    made = [Embedding(), *[Layer() for _ in range(4)], Pool()]
    return [cut.double().to(device) for cut in made]


def micro_batches(number: int) -> list[Tokens]:
    """Of unequal rows and lengths."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(number):
        rows, length = 1 + index % 3, 2 + (2 * index) % 5
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        mask = (torch.arange(length) < 1 + torch.arange(rows).unsqueeze(1) % length).long()
        made.append(Tokens(ids, mask))
    return made


def targets(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(len(x), DIM, generator=generator, dtype=torch.float64)
        for x in micro_batches(number)
    ]


def share_of(rank: int, num_stages: int) -> slice:
    """Which of the six cuts a stage holds."""
    starts = {1: [0, 6], 2: [0, 3, 6], 3: [0, 2, 4, 6], 4: [0, 1, 3, 4, 6]}[num_stages]
    stage = rank % num_stages
    return slice(starts[stage], starts[stage + 1])


class Problem:
    """Micro-batches of one replica with the loss of each and of all."""

    def __init__(self, number: int, replica: int, num_replicas: int, device: str = "cpu") -> None:
        every = micro_batches(number)
        self.inputs = [x.to(device) for x in every[replica::num_replicas]]
        self.targets = [x.to(device) for x in targets(number)[replica::num_replicas]]
        self.rows = sum(len(x) for x in every)

    def loss(self, outputs: Tensor, index: int) -> Tensor:
        noise = torch.rand_like(outputs)  # random numbers of a head
        return ((outputs - self.targets[index]) ** 2 * noise).sum() / self.rows


def coupled_loss(outputs: list[Tensor], replicas: World) -> tuple[Tensor, list[Tensor]]:
    """`|sum of all representations|^2`, this replica's part."""
    reps = torch.cat(outputs)
    counts = collectives.counts_of(len(reps), replicas)
    others = collectives.gather_rows(reps, counts, replicas)
    d_others = 2 * reps.sum(0).expand_as(others)
    d_reps = collectives.scatter_sum(d_others, counts, replicas)
    return reps.sum(0) @ others.sum(0), list(d_reps.split([len(rep) for rep in outputs]))


def plain_step(number: int, *, coupled: bool = False, device: str = "cpu") -> dict[str, Any]:
    """What a pipeline computes, by a loop over micro-batches and one backward pass."""
    model, problem = cuts(device), Problem(number, 0, 1, device)
    outputs, losses = [], []
    for index, x in enumerate(problem.inputs):
        key = mixed(SEED, index)
        hidden: Any = (x,)
        for position, cut in enumerate(model):
            torch.manual_seed(mixed(key, position))
            hidden = cut(*hidden)
            hidden = hidden if isinstance(hidden, tuple) else (hidden,)
        outputs.append(hidden[0])
        torch.manual_seed(mixed(key, len(model)))
        losses.append(problem.loss(hidden[0], index))
    loss = (torch.cat(outputs).sum(0) ** 2).sum() if coupled else torch.stack(losses).sum()
    loss.backward()
    return {
        "loss": loss.item(),
        "grads": _grads(model, range(len(model))),
        "reps": [x.detach().cpu() for x in outputs],
    }


def _grads(model: list[nn.Module], positions: Any) -> dict[str, Tensor | None]:
    return {
        f"{position}.{name}": None if p.grad is None else p.grad.clone().cpu()
        for position in positions
        for name, p in model[position].named_parameters()
    }


def steps(
    num_stages: int,
    number: int,
    limit: int | None = None,
    delays: tuple[float, ...] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """A step, one with checkpointing, a coupled one and a sweep without graphs, of one model."""
    world = World.current()
    model = cuts(device)
    for layer, delay in zip(model[1:], delays, strict=False):
        layer.delay = delay
    positions = range(len(model))[share_of(world.rank, num_stages)]
    stage = [model[position] for position in positions]
    made = {}
    for name in ("step", "checkpointing", "coupled"):
        with Pipeline(
            stage,
            num_stages=num_stages,
            pipeline_limit=limit,
            checkpointing=name != "step",
            timeout=30,
        ) as pipeline:
            place, replicas = pipeline.place, pipeline.replicas
            problem = Problem(number, place.replica, place.num_replicas, device)
            before = torch.get_rng_state()
            if name == "coupled":
                whole_loss = partial(coupled_loss, replicas=replicas)
                result = pipeline.coupled_step(problem.inputs, whole_loss, seed=SEED)
            else:
                loss = differentiated(problem.loss)
                result = pipeline.step(problem.inputs, loss, seed=SEED)
            assert torch.equal(before, torch.get_rng_state())
            reps = pipeline.represent(problem.inputs, seed=SEED)
        made[name] = {
            "loss": result.loss,
            "report": result.report,
            "reps": None if reps is None else [rep.cpu() for rep in reps],
            "grads": _grads(model, positions),
        }
        for cut in stage:
            cut.zero_grad()
    return made


class Double(nn.Module):
    """Outputs with a gradient, used by no later stage, without gradient, empty, of no dims."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.norm(self.linear(x))
        flags = torch.tensor(True), x.new_empty(0, 3), x.to(torch.bfloat16)
        return hidden, self.unused(x), x.detach(), *flags


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor, unused: Tensor, x: Tensor, *flags: Tensor) -> Tensor:
        assert [flag.dtype for flag in flags] == [torch.bool, x.dtype, torch.bfloat16]
        assert [list(flag.shape) for flag in flags] == [[], [0, 3], list(x.shape)]
        assert not x.requires_grad
        assert hidden.requires_grad == unused.requires_grad
        return self.linear(hidden) * x + flags[2]


def kinds_of_tensors(frozen: bool, checkpointing: bool) -> dict[str, Any]:
    """Three steps whose gradients add up, and a coupled one, through tensors of all kinds."""
    rank, size = World.current().rank, World.current().size
    torch.manual_seed(1)
    model = [Double().double().requires_grad_(not frozen), Single().double()]
    stage = model if size == 1 else model[rank]
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(5, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    losses = []
    loss = differentiated(lambda outputs, index: (outputs**3).sum())
    with Pipeline(
        stage, num_stages=size, checkpointing=checkpointing, pipeline_limit=2, timeout=30
    ) as pipeline:
        for number in range(3):
            result = pipeline.step(inputs, loss, synchronize=number == 2)
            losses.append(result.loss)
        pipeline.coupled_step(inputs, lambda reps: (reps[0].sum(), reps))
    positions = range(2) if size == 1 else [rank]
    return {
        "losses": losses,
        "grads": _grads(model, positions),
        "buffers": dict(model[0].named_buffers()) if 0 in positions else {},
        "bytes": result.report.bytes_sent,
    }


def summed_gradients(bucket_bytes: int) -> list[Tensor | None]:
    """Some parameters have no gradient on some ranks, or on none."""
    world = World.current()
    parameters = [
        nn.Parameter(torch.zeros(shape, dtype=dtype))
        for shape, dtype in [((3, 2), torch.float64), ((5,), torch.float64), ((), torch.float32)]
    ] + [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    parameters[5].requires_grad_(False)
    for number, p in enumerate(parameters[:4]):
        if (number + world.rank) % 2 == 0 or number < 2:
            p.grad = torch.full_like(p, number + 10 * world.rank)
    sum_gradients_(parameters, world, bucket_bytes=bucket_bytes)
    return [p.grad for p in parameters]


def sparse_gradients() -> str:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    try:
        sum_gradients_(table.parameters(), World.current())
    except ValueError as error:
        return str(error)
    return ""


def default_seeds() -> list[float]:
    """Losses of two steps whose seeds torch's generator gives."""
    model, problem = cuts(), Problem(2, 0, 1)
    rank = World.current().rank
    stage = model[share_of(rank, 2)]
    torch.manual_seed(100 + rank)  # only the first stage's counts
    with Pipeline(stage, num_stages=2, timeout=30) as pipeline:
        loss = differentiated(problem.loss)
        return [pipeline.step(problem.inputs, loss).loss for _ in range(2)]


def under_autocast() -> tuple[float, dict[str, Tensor | None]]:
    """A coupled step in bfloat16, of float32 weights: sweeps with and without a graph."""
    rank, size = World.current().rank, World.current().size
    model = [cut.float() for cut in cuts()]
    positions = range(len(model))[share_of(rank, size)]
    with Pipeline([model[position] for position in positions], num_stages=size) as pipeline:
        loss = partial(coupled_loss, replicas=pipeline.replicas)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = pipeline.coupled_step(micro_batches(4), loss, seed=SEED)
    return result.loss, _grads(model, positions)


def clipped(max_norm: float) -> tuple[float, dict[str, Tensor | None]]:
    """The norm of all gradients, and the gradients after they were clipped to it."""
    rank, size = World.current().rank, World.current().size
    model, problem = cuts(), Problem(3, 0, 1)
    positions = range(len(model))[share_of(rank, size)]
    with Pipeline(
        [model[position] for position in positions], num_stages=size, timeout=30
    ) as pipeline:
        pipeline.step(problem.inputs, differentiated(problem.loss), seed=SEED)
        norm = pipeline.clip_gradients_(max_norm)
    return norm, _grads(model, positions)


def steps_through_nccl(store: str, num_stages: int, number: int) -> dict[str, Any]:
    """`steps` with a GPU for each rank, whose tensors do not go through the host."""
    rank, size = World.current().rank, World.current().size
    dist.destroy_process_group()
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.FileStore(store, size), rank=rank, world_size=size
    )
    return steps(num_stages, number, device=f"cuda:{rank}")


class Counting(nn.Module):
    """Counts how many of its outputs exist at once, with the graphs that they hold."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.linear, self.delay = nn.Linear(DIM, DIM), delay
        self.outputs: list[weakref.ref[Tensor]] = []
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.delay)
        y = self.linear(x)
        self.outputs.append(weakref.ref(y))
        self.most = max(self.most, sum(output() is not None for output in self.outputs))
        return y


def outputs_at_once(limit: int, checkpointing: bool) -> tuple[int, int]:
    """As the stage sees it, and as the report says; the last stage is slow."""
    rank = World.current().rank
    stage = Counting(0.01 if rank == 2 else 0)
    with Pipeline(
        stage, num_stages=3, pipeline_limit=limit, checkpointing=checkpointing, timeout=30
    ) as pipeline:
        inputs = [torch.ones(2, DIM) for _ in range(8)]
        loss = differentiated(lambda outputs, index: outputs.sum())
        report = pipeline.step(inputs, loss).report
    return stage.most, report.max_in_flight
