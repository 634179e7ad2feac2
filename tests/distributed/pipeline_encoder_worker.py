"""What each rank does in test_pipeline_encoder.py, and what one process does without a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import xmc.losses
from xmc.config import HeadConfig, OptimizerConfig
from xmc.distributed.collectives import World
from xmc.distributed.pipeline import Pipeline
from xmc.heads.classifier import ClassifierHead
from xmc.nn.balance import balanced_cuts, parameter_costs
from xmc.nn.layers import freeze_
from xmc.nn.lora import add_lora_
from xmc.nn.stages import cut_encoder
from xmc.nn.transformer import TransformerEncoder
from xmc.types import SparseLabels, Tokens

D, LABELS, VOCAB, LAYERS = 16, 21, 40, 4
MICRO_BATCHES = 8  # of all replicas

DEFAULTS: dict[str, Any] = {
    "family": "bert",
    "stages": 1,
    "cuts": 4,  # in all: cuts / stages on a rank, one after the other
    "dropout": 0.0,
    "intermediate": False,
    "frozen": -1,
    "lora": 0,
    "layers_again": False,  # TransformerEncoder's checkpointing
    "stage_again": False,  # Pipeline's
    "steps": 3,
}


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Steps of encoder and classifier; the labels are divided among the replicas' last stages."""
    case = SimpleNamespace(**DEFAULTS | options)
    world = World.current()
    replica, place = divmod(world.rank, case.stages)
    replicas = world.size // case.stages
    cuts = own_cuts(case, place)
    pipeline = Pipeline(cuts, num_stages=case.stages, checkpointing=case.stage_again, timeout=60)
    head = make_head(World.alone() if replicas == 1 else pipeline.replicas)
    optimizers = [make_optimizer(cut) for cut in cuts]
    losses, reports = [], []
    for step in range(case.steps):
        all_parts = list(batches(step))
        parts = all_parts[replica::replicas]
        rows = sum(len(tokens) for tokens, _ in all_parts)

        def loss(
            reps: Tensor, index: int, parts: Any = parts, rows: int = rows
        ) -> tuple[Tensor, Tensor]:
            update = index == len(parts) - 1
            result = head.loss_and_grad(reps, parts[index][1], num_rows=rows, update=update)
            return result.loss / replicas, result.d_reps  # the head's is that of all replicas

        result = pipeline.step([tokens for tokens, _ in parts], loss, seed=step)
        losses.append(result.loss)
        reports.append(result.report)
        step_(optimizers)
    pipeline.close()
    return {
        "losses": losses,
        "weights": state(cuts),
        "head": head_state(head) if pipeline.is_last else {},
        "most": max(report.max_in_flight for report in reports),
    }


def train_alone(options: dict[str, Any]) -> dict[str, Any]:
    """The same steps by plain autograd over the whole encoder, micro-batch by micro-batch."""
    case = SimpleNamespace(**DEFAULTS | options)
    encoder, after = make_encoder(case)
    whole = nn.ModuleDict({"encoder": encoder, "intermediate": after})
    head = make_head(World.alone())
    optimizer = make_optimizer(whole)
    losses = []
    for step in range(case.steps):
        parts = list(batches(step))
        rows = sum(len(tokens) for tokens, _ in parts)
        total = 0.0
        for number, (tokens, labels) in enumerate(parts):
            reps = after(encoder(tokens))
            update = number == len(parts) - 1
            result = head.loss_and_grad(reps.detach(), labels, num_rows=rows, update=update)
            if reps.requires_grad:
                reps.backward(result.d_reps)
            total += float(result.loss)
        losses.append(total)
        step_([optimizer])
    weights = {name.removeprefix("encoder."): t for name, t in whole.state_dict().items()}
    return {"losses": losses, "weights": weights, "head": head_state(head)}


def retrieve(options: dict[str, Any]) -> dict[str, Any]:
    """Contrastive steps: the loss is one of the queries and keys of all micro-batches."""
    case = SimpleNamespace(**DEFAULTS | options)
    cuts = own_cuts(case, World.current().rank)
    pipeline = Pipeline(cuts, num_stages=case.stages, timeout=60)
    optimizers = [make_optimizer(cut) for cut in cuts]
    losses = []
    for step in range(case.steps):
        parts = [tokens for tokens, _ in batches(step, even=True)]
        result = pipeline.coupled_step(parts, coupled, seed=step)
        losses.append(result.loss)
        step_(optimizers)
    pipeline.close()
    return {"losses": losses, "weights": state(cuts)}


def retrieve_alone(options: dict[str, Any]) -> dict[str, Any]:
    """The same steps by one graph over all micro-batches."""
    case = SimpleNamespace(**DEFAULTS | options)
    encoder, _ = make_encoder(case)
    optimizer = make_optimizer(encoder)
    losses = []
    for step in range(case.steps):
        loss = contrastive([encoder(tokens) for tokens, _ in batches(step, even=True)])
        loss.backward()
        losses.append(loss.item())
        step_([optimizer])
    return {"losses": losses, "weights": dict(encoder.state_dict())}


def coupled(reps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [rep.detach().requires_grad_() for rep in reps]
    loss = contrastive(leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def contrastive(reps: Sequence[Tensor]) -> Tensor:
    """Of each micro-batch the first half are queries, the second their keys."""
    q = torch.cat([rep[: len(rep) // 2] for rep in reps])
    k = torch.cat([rep[len(rep) // 2 :] for rep in reps])
    q, k = nn.functional.normalize(q, dim=1), nn.functional.normalize(k, dim=1)
    return xmc.losses.info_nce(q, k, scale=5.0, symmetric=True)


def own_cuts(case: SimpleNamespace, place: int) -> list[nn.Module]:
    encoder, after = make_encoder(case)
    cuts = balanced_cuts(parameter_costs(encoder), case.cuts)
    stages = cut_encoder(encoder, cuts, intermediate=after if case.intermediate else None)
    each = case.cuts // case.stages
    return list(stages[place * each : (place + 1) * each])


def make_encoder(case: SimpleNamespace) -> tuple[TransformerEncoder, nn.Module]:
    """The same in every process; and what follows it."""
    torch.manual_seed(3)
    rates = {"hidden_dropout_prob": case.dropout, "attention_probs_dropout_prob": case.dropout}
    if case.family == "distilbert":
        rates = {"dropout": case.dropout, "attention_dropout": case.dropout}
    config = transformers.AutoConfig.for_model(
        case.family,
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        pad_token_id=1,
        initializer_range=0.3,
        **rates,
    )
    model = transformers.AutoModel.from_config(config)
    encoder = TransformerEncoder(model, dropout=case.dropout, checkpointing=case.layers_again)
    if case.lora:
        add_lora_(model, rank=case.lora, alpha=2.0)
    freeze_(model, case.frozen)
    after = nn.Sequential(nn.Linear(D, D), nn.GELU()) if case.intermediate else nn.Identity()
    return encoder.double().train(), after.double()


def make_head(world: World) -> ClassifierHead:
    torch.manual_seed(4)
    config, optimizer = HeadConfig(fan_in=6), OptimizerConfig(kind="adamw", lr=0.05)
    return ClassifierHead.from_config(D, LABELS, config, optimizer, world=world).double()


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer | None:
    trained = [p for p in module.parameters() if p.requires_grad]
    # Gradients that are zero but for rounding, such as those of the biases of keys, stay small.
    return torch.optim.AdamW(trained, lr=1e-3, eps=1e-5) if trained else None


def step_(optimizers: Sequence[torch.optim.Optimizer | None]) -> None:
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def batches(step: int, *, even: bool = False) -> Iterator[tuple[Tokens, SparseLabels]]:
    """Micro-batches of a step, of unlike rows and lengths, with padding."""
    generator = torch.Generator().manual_seed(step)
    for number in range(MICRO_BATCHES):
        rows, length = 1 + number % 3, 5 + (2 * number + step) % 7
        rows = 2 * rows if even else rows
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        positives = torch.randint(LABELS, (rows, 2), generator=generator).tolist()
        labels = SparseLabels.from_lists([sorted(set(row)) for row in positives], LABELS)
        yield Tokens(ids.masked_fill(mask == 0, 1), mask), labels


def state(cuts: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {name: tensor for cut in cuts for name, tensor in cut.state_dict().items()}


def head_state(head: ClassifierHead) -> dict[str, Tensor]:
    """In dtypes that can be pickled and put together: indices have 16 bits without a sign."""
    tensors = head.state_dict()
    return {name: t if t.is_floating_point() else t.long() for name, t in tensors.items()}
