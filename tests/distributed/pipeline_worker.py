"""What each rank does in test_pipeline.py, and the model it does it with."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from xmc.distributed import collectives
from xmc.distributed.collectives import World
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


def cuts() -> list[nn.Module]:
    """Of one model, the same on every rank."""
    torch.manual_seed(3)
    made = [Embedding(), *[Layer() for _ in range(4)], Pool()]
    return [cut.double() for cut in made]


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

    def __init__(self, number: int, replica: int, num_replicas: int) -> None:
        every = micro_batches(number)
        self.inputs = every[replica::num_replicas]
        self.targets = targets(number)[replica::num_replicas]
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


def plain_step(number: int, *, coupled: bool = False) -> dict[str, Any]:
    """What a pipeline computes, by a loop over micro-batches and one backward pass."""
    model, problem = cuts(), Problem(number, 0, 1)
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
        "reps": [x.detach() for x in outputs],
    }


def _grads(model: list[nn.Module], positions: Any) -> dict[str, Tensor | None]:
    return {
        f"{position}.{name}": None if p.grad is None else p.grad.clone()
        for position in positions
        for name, p in model[position].named_parameters()
    }


def steps(
    num_stages: int,
    number: int,
    limit: int | None = None,
    delays: tuple[float, ...] = (),
) -> dict[str, Any]:
    """A step, one with checkpointing, a coupled one and a sweep without graphs, of one model."""
    world = World.current()
    model = cuts()
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
            problem = Problem(number, place.replica, place.num_replicas)
            before = torch.get_rng_state()
            if name == "coupled":
                result = pipeline.coupled_step(
                    problem.inputs, lambda reps: coupled_loss(reps, replicas), seed=SEED
                )
            else:
                loss = differentiated(problem.loss)
                result = pipeline.step(problem.inputs, loss, seed=SEED)
            assert torch.equal(before, torch.get_rng_state())
            reps = pipeline.represent(problem.inputs, seed=SEED)
        made[name] = {
            "loss": result.loss,
            "report": result.report,
            "reps": reps,
            "grads": _grads(model, positions),
        }
        for cut in stage:
            cut.zero_grad()
    return made
