"""What each rank does in test_training.py and test_faults.py; alone it is what one process does."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xmc.config import ConfigError, from_dict
from xmc.distributed.collectives import World, sum_
from xmc.distributed.data_parallel import own_part
from xmc.distributed.launch import (
    OtherRankError,
    RankError,
    from_rank0,
    lost_ranks,
    on_rank0,
    rank0_first,
)
from xmc.model import build_model
from xmc.serving.evaluate import evaluate
from xmc.serving.predictor import Predictor
from xmc.training.log import RunLog
from xmc.training.loop import Interrupted
from xmc.training.run import prepare_data
from xmc.training.run import train as train_into
from xmc.training.trainer import Trainer


def steps(values: dict[str, Any], data: Path, count: int, double: bool = True) -> dict[str, Any]:
    """The first steps of a training, in float64 or as it is, with the best labels after them."""
    config = from_dict(values, source="test")
    features, rows, held_out = prepare_data(config, data, data.parent / "cache")
    torch.manual_seed(config.train.seed)
    labels = [str(n) for n in range(rows.num_labels)]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(6))
    model = build_model(config, features, labels, order=order, world=World.current())
    if double:
        model.double()
    trainer = Trainer(model.train(), config, rows, held_out)
    losses, norms = [], []
    for work in list(trainer.steps(0, 0))[:count]:
        report = trainer.run_step(work, RunLog(None), measure=True)
        losses.append(report.loss)
        norms.append(report.values["encoder_grad_norm"])
    assert held_out is not None
    best = model.topk(next(held_out.batches(9)).inputs, 7)
    shards = trainer.row_shards()
    tensors = trainer.tensors()
    return {
        "losses": losses,
        "norms": norms,
        "best": (best.scores.clone(), best.labels.clone()),
        "tensors": {name: _plain(tensor) for name, tensor in tensors.items()},
        "shards": {name: rows for name, rows in shards.items() if name in tensors},
    }


def train(
    values: dict[str, Any],
    data: Path,
    run: Path,
    resume: bool = False,
    stop: tuple[int, int] | None = None,  # a rank, and the call that interrupts it
    within: str = "xmc.heads.classifier:ClassifierHead.loss_and_grad",
) -> str:
    """A whole training; what it said where it was interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None and stop[0] == World.current().rank:
            _at_call(patch, within, stop[1], lambda: signal.raise_signal(signal.SIGTERM))
        torch.manual_seed(World.current().rank)  # whatever a process did before
        try:
            train_into(
                from_dict(values, source="test"),
                data=data,
                out=run,
                cache=data.parent / "cache",
                resume=resume,
                show_progress=False,
            )
        except Interrupted as stopped:
            return str(stopped)
    return ""


def answer(runs: list[Path], texts: list[str]) -> list[tuple[list[Any], dict[str, float]]]:
    """Predictions for texts and scores on the test split, of each run and of all together."""
    cache = runs[0].parent / "cache"
    return [
        (Predictor.load(asked).predict(texts, k=4), evaluate(asked, "test", cache=cache).values)
        for asked in (*([run] for run in runs), runs)
    ]


def refused(values: dict[str, Any], data: Path, run: Path) -> str:
    """What a training that several ranks cannot do says, on rank 0 and on the others."""
    try:
        train(values, data, run)
    except (ConfigError, FileExistsError, OtherRankError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def first_rank() -> dict[str, Any]:
    """Work that rank 0 does for all, and work that fails there."""
    world = World.current()
    calls: list[int] = []
    seen: dict[str, Any] = {
        "alone": on_rank0(lambda: world.rank + 5, world),
        "first": rank0_first(lambda: world.rank + 5, world),
        "items": list(from_rank0(iter("abcdefg"), world, size=3)),
        "none": list(from_rank0([], world)),
    }

    def fail() -> None:
        calls.append(world.rank)
        raise ValueError("no such file")

    def failing() -> Any:
        yield "a"
        raise ValueError("not UTF-8")

    for name, work in {
        "failed": lambda: rank0_first(fail, world),
        "reading": lambda: list(from_rank0(failing(), world, size=1)),
    }.items():
        try:
            work()  # type: ignore[no-untyped-call]
        except (ValueError, RankError) as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen | {"calls": calls}


def leave() -> str:
    """Rank 1 leaves the group; what the others say, who wait for it."""
    try:
        with lost_ranks():
            if World.current().rank == 1:
                torch.distributed.destroy_process_group()
            else:
                sum_(torch.ones(3), World.current())
    except RankError as error:
        return str(error)
    return "left"


def moments(values: dict[str, Any], data: Path) -> dict[str, int]:
    """Numbers of encoder weights, of moments and of gradients that this rank holds after a step."""
    config = from_dict(values, source="test")
    features, rows, _ = prepare_data(config, data, data.parent / "cache")
    torch.manual_seed(config.train.seed)
    labels = [str(n) for n in range(rows.num_labels)]
    model = build_model(config, features, labels, world=World.current())
    trainer = Trainer(model.train(), config, rows, None)
    trainer.run_step(next(trainer.steps(0, 0)), RunLog(None), measure=False)
    weights = [own_part(p) for p in model.body.parameters() if p.requires_grad]
    state = [
        t
        for slots in trainer.optimizer.state.values()
        for t in slots.values()
        if isinstance(t, Tensor) and t.dim()
    ]
    return {"weights": sum(t.numel() for t in weights), "moments": sum(t.numel() for t in state)}


def _plain(tensor: Tensor) -> Tensor:
    """A copy of a dtype that can be sent to the test: uint16 cannot."""
    return tensor.detach().clone() if tensor.is_floating_point() else tensor.long()


def _at_call(patch: pytest.MonkeyPatch, within: str, number: int, act: Any) -> None:
    """Do something at the start of a call of `module:Class.method`."""
    module, _, name = within.partition(":")
    owner, method = name.split(".")
    home = getattr(importlib.import_module(module), owner)
    original, made = getattr(home, method), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if made == number:
            act()
        return original(*args, **kwargs)

    patch.setattr(home, method, counted)
