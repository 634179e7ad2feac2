"""Memory of a cached step: one chunk's graph for any batch, and as many more as asked for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmc.training.grad_cache import cached_step

D = 6


def tower() -> nn.Sequential:
    layers = [nn.Linear(D, 16), nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.4), nn.Linear(64, D)]
    return nn.Sequential(*layers)


def contrast(q: Tensor, k: Tensor) -> Tensor:
    scores = 3 * F.normalize(q) @ F.normalize(k).T
    return F.cross_entropy(scores, torch.arange(len(q)))


class Saved:
    """Bytes of activations that graphs hold: now and at most."""

    def __init__(self, parameters: set[int]) -> None:
        self.now = self.most = 0
        self.parameters = parameters

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> _Box:
        is_parameter = tensor.untyped_storage().data_ptr() in self.parameters
        return _Box(self, tensor, 0 if is_parameter else tensor.nbytes)


class _Box:
    def __init__(self, owner: Saved, tensor: Tensor, size: int) -> None:
        self.owner, self.tensor, self.size = owner, tensor, size
        owner.now += size
        owner.most = max(owner.most, owner.now)

    def __del__(self) -> None:
        self.owner.now -= self.size


def peak(encoder: nn.Module, rows: int, **options: Any) -> int:
    saved = Saved({p.untyped_storage().data_ptr() for p in encoder.parameters()})
    x = torch.randn(rows, D)

    def loss(q: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return q.square().sum()

    with saved:
        if options:
            cached_step(encoder, x, loss, **options)
        else:
            loss(encoder(x)).backward()
    assert saved.now == 0
    return saved.most


def test_activations_take_the_memory_of_a_chunk_for_any_batch() -> None:
    encoder = tower()
    small, large = peak(encoder, 64, chunk=8), peak(encoder, 2048, chunk=8)
    assert small == large > 0
    assert peak(encoder, 8) <= large <= 1.1 * peak(encoder, 8)
    assert peak(encoder, 2048) > 200 * large


def test_a_budget_of_bytes_keeps_as_many_graphs_as_it_holds() -> None:
    encoder = tower()
    one = peak(encoder, 8)
    calls: list[int] = []
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    x, twin = torch.randn(80, D), copy.deepcopy(encoder)

    def step(keep_bytes: int) -> int:
        del calls[:]
        encoder.zero_grad()
        torch.manual_seed(1)
        cached_step(encoder, x, lambda q: contrast(q, q), chunk=8, keep_bytes=keep_bytes)
        return 20 - len(calls)  # chunks that were spared their second pass

    torch.manual_seed(1)
    whole = torch.cat([twin(part) for part in x.split(8)])
    contrast(whole, whole).backward()
    spared = [step(round(share * one)) for share in (0.2, 1.5, 4.5, 100)]
    assert spared[0] == 0
    assert spared[-1] == 10
    # Tensors that several operations save are counted once here, and each time by the test.
    assert 1 <= spared[1] <= 2 and 4 <= spared[2] <= 7
    for got, expected in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
