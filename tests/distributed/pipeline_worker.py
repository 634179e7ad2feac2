"""What each rank does in test_pipeline.py, and the model it does it with."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from xmc.distributed import collectives
from xmc.distributed.pipeline import Pipeline, PipelineError, differentiated
from xmc.types import Tokens

DIM, VOCABULARY = 6, 11


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


def step(
    num_stages: int,
    number: int,
    *,
    limit: int | None = None,
    checkpointing: bool = False,
    delays: tuple[float, ...] = (),
    coupled: bool = False,
) -> dict[str, Any]:
    """Loss, gradients by name and report of one step over `number` micro-batches of all replicas."""
    world = collectives.World.current()
    part = share_of(world.rank, num_stages)
    whole = cuts()
    for layer, delay in zip(whole[1:], delays, strict=False):
        layer.delay = delay
    with Pipeline(
        whole[part],
        num_stages=num_stages,
        pipeline_limit=limit,
        checkpointing=checkpointing,
        timeout=30,
    ) as pipeline:
        place = pipeline.place
        inputs = micro_batches(number)[place.replica :: place.num_replicas]
        wanted = targets(number)[place.replica :: place.num_replicas]
        rows = sum(len(x) for x in micro_batches(number))

        def loss(outputs: Tensor, index: int) -> Tensor:
            noise = torch.rand_like(outputs)  # keyed as well
            return ((outputs - wanted[index]) ** 2 * noise).sum() / rows

        def whole_loss(outputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            reps = torch.cat(outputs)
            counts = collectives.counts_of(len(reps), pipeline.replicas)
            others = collectives.gather_rows(reps, counts, pipeline.replicas)
            d_others = 2 * reps.sum(0).expand_as(others)
            d_mine = collectives.scatter_sum(d_others, counts, pipeline.replicas)
            value = reps.sum(0) @ others.sum(0)
            return value, list(d_mine.split([len(rep) for rep in outputs]))

        before = torch.get_rng_state()
        if coupled:
            result = pipeline.coupled_step(inputs, whole_loss, seed=9)
        else:
            result = pipeline.step(inputs, differentiated(loss), seed=9)
        assert torch.equal(before, torch.get_rng_state())
        reps = pipeline.represent(inputs, seed=9)
    return {
        "loss": result.loss,
        "grads": {
            f"{number}.{name}": p.grad
            for number, cut in enumerate(whole)
            for name, p in cut.named_parameters()
            if number in range(6)[part]
        },
        "report": result.report,
        "reps": reps,
    }
