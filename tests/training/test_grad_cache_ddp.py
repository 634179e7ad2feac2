"""One gradient synchronisation a step, however many chunks the ranks have."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xmc.training.grad_cache import cached_step

WORKER = Path(__file__).with_name("grad_cache_worker.py")
WORLD_SIZE = 2


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grad_cache_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", WORKER, str(rank), str(WORLD_SIZE), folder],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD_SIZE, "\n".join(errors)
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(WORLD_SIZE)]


def test_ranks_with_different_numbers_of_chunks_synchronise_once(
    results: list[dict[str, Any]], worker: ModuleType
) -> None:
    for name, (_, tied, all_reduces) in worker.STEPS.items():
        f, g = worker.towers(tied)
        q, k = worker.data()
        start = 0
        for rows in worker.SHARES:
            worker.plain(f, g, q[start : start + rows], k[start : start + rows])
            start += rows
        for result in results:
            assert result[name]["all_reduces"] == all_reduces, name
            for index, module in enumerate([f, g]):
                for key, parameter in module.named_parameters():
                    grad = result[name]["grads"][f"{index}.{key}"]
                    torch.testing.assert_close(WORLD_SIZE * grad, parameter.grad, msg=name)


class Sharded(nn.Linear):
    """Has the hook of FSDP 2 and counts the backward passes that would communicate."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.synchronizes = True
        self.seen: list[bool] = []

    def set_requires_gradient_sync(self, value: bool) -> None:
        self.synchronizes = value

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(lambda _: self.seen.append(self.synchronizes))
        return out


@pytest.mark.parametrize("kept", [0, 3, 99])
def test_a_sharded_encoder_communicates_in_the_last_backward_pass(kept: int) -> None:
    shared, x = Sharded(), torch.randn(7, 3)
    encoder = nn.Sequential(shared, nn.Tanh())
    cached_step([encoder, encoder], [x, x + 1], lambda q, k: (q @ k.T).sum(), chunk=2, kept=kept)
    assert shared.seen == [False] * 7 + [True]
    cached_step(encoder, x, lambda q: (q @ q.T).sum(), chunk=2, synchronize=False)
    assert shared.seen[8:] == [False] * 4
    assert not shared.synchronizes


def test_kept_graphs_of_two_synchronising_encoders_are_an_error() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"no kept graphs with 2 modules .* got kept=1"):
        cached_step([Sharded(), Sharded()], [x, x], lambda q, k: (q @ k.T).sum(), chunk=2, kept=1)
