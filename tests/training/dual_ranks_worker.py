"""What each rank does in test_dual_ranks.py; alone it is what one process does."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmc.config import Config, from_dict
from xmc.data.label_store import load_label_texts
from xmc.distributed.collectives import World
from xmc.model import build_model, load_model, save_model
from xmc.training.dual_trainer import DualTrainer
from xmc.training.log import RunLog
from xmc.training.loop import TrainingLoop
from xmc.training.run import prepare_data


def make(
    values: dict[str, Any], data: Path, dtype: torch.dtype = torch.float64
) -> tuple[Config, DualTrainer]:
    """A trainer of a fresh model in a dtype."""
    config = from_dict(values, source="test")
    features, rows, held_out = prepare_data(config, data, data.parent / "cache")
    texts = load_label_texts(data, features, cache=data.parent / "cache")
    torch.manual_seed(config.train.seed)
    labels = [str(n) for n in range(rows.num_labels)]
    model = build_model(config, features, labels, world=World.current()).to(dtype)
    model.retrieval.embeddings = model.retrieval.embeddings.float()
    return config, DualTrainer(model.train(), config, rows, held_out, texts)


def steps(values: dict[str, Any], data: Path, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The first and last steps of an epoch and the first ones of the next, and what came of it."""
    _, trainer = make(values, data, dtype)
    model, losses, norms = trainer.model, [], []
    last = trainer.steps_per_epoch - 2
    for epoch, start in ((0, 0), (0, last), (1, 0)):
        for work in islice(trainer.steps(epoch, start), 3):
            report = trainer.run_step(work, RunLog(None), measure=True)
            losses.append(report.loss)
            norms.append(report.values["encoder_grad_norm"])
    scores = trainer.validate()
    head = model.retrieval
    assert trainer.validation_set is not None
    batch = next(trainer.validation_set.batches(9))
    best = model.topk(batch.inputs, 7, batch.labels)
    with torch.inference_mode():
        candidates = head.candidate_scores(model.reps(batch.inputs), best.labels)
    weights = {
        n: t for n, t in model.weights().items() if n not in ("head.embeddings", "head.known")
    }
    return {
        "losses": losses,
        "norms": norms,
        "scale": float(head.log_scale.detach()),
        "scores": scores,
        "mined": trainer.mined,
        "best": (best.scores.clone(), best.labels.clone()),
        "candidates": candidates.clone(),
        "embeddings": head.embeddings.clone(),
        "weights": {name: _whole(tensor) for name, tensor in weights.items()},
    }


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def train(values: dict[str, Any], data: Path, run: Path) -> dict[str, Any]:
    """A training by the loop, cut off after its first epoch and resumed, and the model it wrote."""
    world = World.current()
    config, trainer = make(values, data, torch.float32)
    save_model(trainer.model, run / "model")
    trainer.total_steps = trainer.steps_per_epoch
    TrainingLoop(trainer, config.train, run, show_progress=False, world=world).fit()
    _, trainer = make(values, data, torch.float32)
    loop = TrainingLoop(trainer, config.train, run, show_progress=False, world=world)
    loop.fit(resume=True)
    model = load_model(run / "model", world=world)
    assert trainer.validation_set is not None
    best = model.topk(next(trainer.validation_set.batches(9)).inputs, 5)
    return {"best": loop.best, "labels": best.labels.clone(), "rows": len(model.retrieval.known)}
