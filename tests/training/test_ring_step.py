"""Cached steps over ranks with a loss of all their rows: one process's gradient, summed once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("ring_step_worker.py")
SHARES = [9, 4]


@pytest.fixture(scope="module")
def worker() -> Any:
    spec = importlib.util.spec_from_file_location("ring_step_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Kind, whether both inputs share an encoder, sums of gradients a step (of FSDP one for each of
# an encoder's two blocks), options.
CASES: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "ddp": ("ddp", False, 2, {"chunk": 3}),
    "ddp tied": ("ddp", True, 1, {"chunk": 3, "kept": 99}),
    "ddp gather": ("ddp", True, 1, {"chunk": 3, "exchange": "gather", "kept": 0}),
    "ddp decorated": ("ddp", False, 2, {"chunk": 3, "decorated": True}),
    # As many chunks on both ranks, of their own sizes.
    "fsdp": ("fsdp", False, 4, {"chunk": [3, 2], "fewer": 3}),
    "fsdp tied": ("fsdp", True, 2, {"chunk": [5, 2]}),
    "fsdp kept": ("fsdp", True, 2, {"chunk": [5, 2], "kept": 3}),
    "fsdp decorated": ("fsdp", False, 4, {"chunk": [5, 3], "decorated": True}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_one_process_s_and_summed_once_a_step(
    ranks: Any, worker: Any, name: str, dtype: torch.dtype
) -> None:
    kind, tied, sums, options = CASES[name]
    options = dict(options)
    shares = [9, 5] if options.pop("fewer", 0) else SHARES
    g = torch.Generator().manual_seed(4)
    q, k = (torch.randn(sum(shares), worker.D, generator=g, dtype=dtype) for _ in range(2))
    f, h = worker.towers(tied, dtype)
    loss = worker.criterion(dtype)
    value = loss(f(q), h(k))
    value.backward()
    results = ranks(
        2, WORKER, "step", kind, tied, *(list(x.split(shares)) for x in (q, k)), options
    )
    near: dict[str, float] = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-6}
    )
    for result in results:
        assert result["sums"].count(kind) == sums  # FSDP sums by the same call as "gather"
        torch.testing.assert_close(result["loss"], value.detach(), **near)
        torch.testing.assert_close(result["scale"], loss.log_scale.grad, **near)
        for index, module in enumerate(dict.fromkeys([f, h])):
            for key, parameter in module.named_parameters():
                torch.testing.assert_close(
                    result["grads"][f"{index}.{key}"], parameter.grad, **near
                )


def test_unequal_numbers_of_chunks_are_an_error_where_parameters_are_gathered(ranks: Any) -> None:
    q, k = (list(torch.randn(13, 5).split(SHARES)) for _ in range(2))
    for decorated, numbers in ((False, r"\[6, 4\]"), (True, r"\[3, 2\]")):
        options = {"chunk": 3, "decorated": decorated}
        for text in ranks(2, WORKER, "step", "fsdp", True, q, k, options):
            assert "expected as many passes on every rank through a module that FSDP" in text
            assert numbers.replace("\\", "") in text
