"""A whole contrastive step of a small transformer: gradient cache against plain passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from contrastive_baselines import materialised_loss, tiled_loss
from timing import BATCHES, Job
from torch import Tensor, nn

from xmc.training.grad_cache import cached_step

PLAIN = "plain autograd"
CACHED = "gradient cache"
ACCUMULATED = "accumulation (negatives of a chunk alone)"
VOCABULARY = 1000


@dataclass(frozen=True)
class StepShape:
    """Rows, rows of a chunk, tokens of a row, width and layers of the encoder."""

    B: int
    chunk: int = 64
    T: int = 16
    D: int = 256
    layers: int = 2


class Encoder(nn.Module):
    """Unit means of a transformer's last states, dropout 0.1."""

    def __init__(self, shape: StepShape) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, shape.D)
        self.place = nn.Parameter(torch.randn(shape.T, shape.D) / 10)
        layer = nn.TransformerEncoderLayer(
            shape.D, shape.D // 64 or 1, 4 * shape.D, batch_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, D]
        """Representations."""
        return F.normalize(self.layers(self.table(ids) + self.place).mean(1), dim=1)


def step_jobs(shape: StepShape, device: str) -> Iterator[Job]:
    """The same batch through one encoder for queries and keys, forward and backward."""
    encoder = Encoder(shape).to(device)
    ids = torch.randint(VOCABULARY, (BATCHES, 2, shape.B, shape.T), device=device)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        loss = materialised_loss(encoder(q), encoder(k))
        loss.backward()
        return loss.detach()

    def cached(q: Tensor, k: Tensor) -> Tensor:
        return cached_step([encoder, encoder], [q, k], tiled_loss, chunk=shape.chunk)

    def accumulated(q: Tensor, k: Tensor) -> Tensor:
        values = []
        for some, others in zip(q.split(shape.chunk), k.split(shape.chunk), strict=True):
            loss = materialised_loss(encoder(some), encoder(others)) * len(some) / len(q)
            loss.backward()
            values.append(loss.detach())
        return torch.stack(values).sum()

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        CACHED: cached,
        PLAIN: plain,
        ACCUMULATED: accumulated,
    }
    for what, way in ways.items():

        def run(number: int, way: Callable[[Tensor, Tensor], Tensor] = way) -> object:
            encoder.zero_grad()
            return way(*ids[number])

        yield Job("step", what, run, asdict(shape) | {"dtype": "float32"}, ours=what == CACHED)
