"""A step of the encoder: the same gradient however rows are cut, rates by depth, exact clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from xmc.config import Config, ConfigError, from_dict
from xmc.data.batches import Dataset, TokenStore
from xmc.data.steps import epoch_steps
from xmc.data.tokens import Padding
from xmc.heads.classifier import ClassifierHead
from xmc.model import XMCModel
from xmc.nn.layers import parameter_depths
from xmc.nn.transformer import TransformerEncoder
from xmc.training.encoder_optimizer import make_encoder_optimizer
from xmc.training.trainer import Trainer
from xmc.types import SparseLabels, Tokens

D, L, ROWS = 16, 7, 12


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "features": {"kind": "tokens", "max_length": 10},
        "encoder": {"kind": "transformer", "model": "given", "dropout": 0.0},
        "head": {"fan_in": 6},
        "encoder_optimizer": {"lr": 1e-3},
        "train": {"batch_size": ROWS, "warmup_steps": 0, "schedule": "constant"},
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


def make_trainer(options: Config, **encoder: Any) -> Trainer:
    """A tiny transformer without dropout over twelve random rows of 1 to 9 tokens."""
    torch.manual_seed(3)
    shape = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(
        BertConfig(
            **shape,
            vocab_size=20,
            intermediate_size=24,
            initializer_range=0.3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    counts = torch.tensor([3, 9, 1, 1, 4, 8, 2, 5, 9, 6, 3, 2])
    ids = torch.randint(1, 20, (int(counts.sum()),), dtype=torch.int32)
    labels = SparseLabels.from_lists([[row % L, (3 * row) % L] for row in range(ROWS)], L)
    store = TokenStore(nn.functional.pad(counts.cumsum(0), (1, 0)), ids, Padding(0, 4, 10))
    head = ClassifierHead.from_config(D, L, options.head, options.classifier_optimizer)
    model = XMCModel(options, None, [], TransformerEncoder(bert, **encoder), head)  # type: ignore[arg-type]
    return Trainer(model, options, Dataset(store, labels), None)


def gradients_of_a_step(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """The loss and, as the optimizer sees them, the gradients of one step on all rows."""
    seen: dict[str, Tensor] = {}

    def record() -> bool:
        for name, parameter in trainer.model.encoder.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()
        return False

    trainer._encoder_step = record  # type: ignore[method-assign]
    trainer.model.train()
    loss, _, _ = take_step(trainer)
    return loss, seen


def take_step(trainer: Trainer, *, measure: bool = False) -> tuple[float, float, dict[str, float]]:
    """One step on all rows, in the passes that the options ask for."""
    return trainer._optimizer_step(cut(trainer), num_rows=ROWS, measure=measure)


def cut(trainer: Trainer) -> list[Tensor]:
    (chunks,) = epoch_steps(trainer.train_set, trainer.config.train, 0)
    return chunks


def truth(trainer: Trainer) -> tuple[Tensor, dict[str, Tensor]]:
    """One pass over all rows by autograd, dense and in float64."""
    encoder, layer = copy.deepcopy(trainer.model.encoder).double(), trainer.model.head.layer
    batch = trainer.train_set.batch(torch.arange(ROWS))
    assert isinstance(batch.inputs, Tokens)
    weight = torch.zeros(L, D, dtype=torch.float64)
    weight.scatter_(1, layer.index.long(), layer.weight.detach().double())  # type: ignore[union-attr, operator]
    scores = encoder(batch.inputs) @ weight.T + layer.bias.detach().double()  # type: ignore[union-attr]
    targets = batch.labels.to_dense().double()
    losses = nn.functional.binary_cross_entropy_with_logits
    loss = losses(scores, targets, reduction="sum") / ROWS
    loss.backward()
    named = encoder.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


CUTS = [
    {"batch_size": 12},
    {"batch_size": 4, "accumulation": 3},
    {"batch_size": 12, "max_tokens": 16},
    {"batch_size": 3, "accumulation": 4, "max_tokens": 40, "length_pool": 2},
]


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("train", CUTS)
def test_a_step_is_the_same_however_it_is_cut(train: dict[str, Any], clip_norm: float) -> None:
    trainer = make_trainer(config(train={**train, "clip_norm": clip_norm}))
    expected_loss, expected = truth(trainer)
    if clip_norm:
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        assert norm > clip_norm
        expected = {name: g * clip_norm / norm for name, g in expected.items()}
    assert len(cut(trainer)) == [1, 3, 6, 3][CUTS.index(train)]
    loss, found = gradients_of_a_step(trainer)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        atol = 1e-5 * float(expected[name].abs().max()) + 1e-7
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=atol)


def test_clipping_sees_the_unscaled_gradient_of_the_whole_step() -> None:
    train = {"batch_size": 4, "accumulation": 3, "clip_norm": 0.05}
    options = config(encoder={"autocast": "float16"}, train=train)
    trainer = make_trainer(options, autocast="float16")
    _, expected = truth(trainer)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    _, found = gradients_of_a_step(trainer)
    assert float(trainer.scaler.get_scale()) == 2.0**16
    assert found.keys() == expected.keys()
    errors = [found[name].double() - g * 0.05 / norm for name, g in expected.items()]
    assert float(torch.stack([error.norm() for error in errors]).norm()) < 0.01 * 0.05


def test_small_gradients_survive_float16_by_the_scale() -> None:
    """A loss of 1e-6 times the usual: without scale all of its gradient underflows."""

    def norms(scale: float) -> tuple[float, float, float]:
        options = config(encoder={"autocast": "float16"})
        trainer = make_trainer(options, autocast="float16")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        original = trainer.model.head.loss_and_grad

        def weak(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{**kwargs, "weight": 1e-6})

        trainer.model.head.loss_and_grad = weak  # type: ignore[method-assign]
        _, expected = truth(trainer)
        _, found = gradients_of_a_step(trainer)
        name = "model.encoder.layer.0.attention.self.value.weight"
        assert found[name].dtype == torch.float32
        difference = (found[name].double() - 1e-6 * expected[name]).norm()
        return float(found[name].norm()), float(1e-6 * expected[name].norm()), float(difference)

    found, expected, _ = norms(1.0)
    assert found < 0.9 * expected
    found, expected, difference = norms(2.0**16)
    assert difference < 0.01 * expected


def test_without_float16_there_is_no_scale() -> None:
    trainer = make_trainer(config(encoder={"autocast": "bfloat16"}), autocast="bfloat16")
    assert not trainer.scaler.is_enabled()
    assert trainer.scaler.state_dict() == {}


def overflowing(scale: float) -> Trainer:
    options = config(encoder={"autocast": "float16"}, train={"clip_norm": 1.0})
    trainer = make_trainer(options, autocast="float16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.model.train()
    return trainer


def test_an_overflow_skips_the_encoder_and_not_the_head() -> None:
    trainer = overflowing(2.0**40)
    encoder, head = trainer.model.encoder, trainer.model.head
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    weight = head.layer.weight.detach().clone()  # type: ignore[union-attr]
    loss, norm, parts = take_step(trainer, measure=True)
    assert loss > 0
    assert norm == 0
    assert parts == {"loss_scale": 2.0**39, "overflows": 1}
    assert trainer.step == 1
    assert head.steps == 1
    assert bool((head.layer.weight != weight).any())
    assert not trainer.optimizer.state
    assert all(p.grad is None for p in encoder.parameters())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    for _ in range(40):  # the scale falls until a step is taken
        _, norm, parts = take_step(trainer, measure=True)
        if norm > 0:
            break
    assert norm > 0
    assert parts["overflows"] == trainer.overflows == trainer.step - 1
    assert parts["loss_scale"] == 2.0 ** (40 - trainer.overflows)
    moved = [
        name for name, tensor in encoder.state_dict().items() if (tensor != before[name]).any()
    ]
    assert len(moved) > 20
    (steps,) = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == 1  # the bias correction counts the steps that were taken


def test_overflow_without_a_scale_stops_with_advice() -> None:
    trainer = overflowing(1.0)
    backward: Callable[..., Any] = trainer.scaler.scale
    trainer.scaler.scale = lambda d_reps: backward(d_reps) * 1e30  # type: ignore[method-assign, assignment]
    message = 'gradient overflows float16 without any scale at step 0: .*autocast = "bfloat16"'
    with pytest.raises(RuntimeError, match=message):
        take_step(trainer)


def test_activations_that_overflow_stop_with_advice() -> None:
    trainer = overflowing(1.0)
    with torch.no_grad():
        trainer.model.encoder.model.encoder.layer[1].output.LayerNorm.weight.fill_(1e9)  # type: ignore[union-attr]
        trainer.model.encoder.model.encoder.layer[0].output.LayerNorm.weight.fill_(1e9)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"activations overflow float16 at step 0: .*bfloat16"):
        take_step(trainer)


def test_rates_fall_with_depth_and_only_matrices_decay() -> None:
    """One step against torch's AdamW, parameter by parameter."""
    options = config(encoder_optimizer={"lr": 0.01, "layer_decay": 0.5, "weight_decay": 0.1})
    trainer = make_trainer(options)
    encoder = trainer.model.encoder
    _, gradients = truth(trainer)
    depths = parameter_depths(encoder.model)  # type: ignore[arg-type, union-attr]
    start = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    trainer.model.train()
    take_step(trainer)
    checked, largest = set(), max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in encoder.named_parameters():
        if name not in gradients:
            assert "pooler" in name
            continue
        rate = 0.01 * 0.5 ** (2 - depths[name.removeprefix("model.")])
        checked.add(rate)
        twin = start[name].double().requires_grad_()
        twin.grad = gradients[name]
        decay = 0.1 if parameter.dim() > 1 else 0.0
        torch.optim.AdamW([twin], rate, weight_decay=decay).step()
        # The first step of Adam is the sign of the gradient: of one near zero it may differ.
        clear = gradients[name].abs() > 1e-5 * largest
        torch.testing.assert_close(
            parameter.detach().double()[clear], twin.detach()[clear], rtol=1e-3, atol=1e-6
        )
    assert sorted(checked) == [0.0025, 0.005, 0.01]


def test_groups_hold_every_parameter_once_and_the_first_the_full_rate() -> None:
    options = config(encoder_optimizer={"layer_decay": 0.5})
    body = make_trainer(config()).model.body
    optimizer = make_encoder_optimizer(body, options)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {p for p in body.parameters() if p.requires_grad}
    assert len(make_encoder_optimizer(body, config()).param_groups) == 2


def test_a_frozen_encoder_trains_the_head_alone() -> None:
    options = config(encoder={"freeze_layers": 2, "autocast": "float16"})
    trainer = make_trainer(options)
    trainer.model.encoder.requires_grad_(False)
    trainer = Trainer(trainer.model, options, trainer.train_set, None)
    weight = trainer.model.head.layer.weight.detach().clone()  # type: ignore[union-attr]
    _, norm, parts = take_step(trainer, measure=True)
    assert (norm, parts) == (0.0, {})
    assert bool((trainer.model.head.layer.weight != weight).any())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"classifier_optimizer": {"layer_decay": 0.5}}, "classifier_optimizer.layer_decay: expec"),
        ({"train": {"max_tokens": 9}}, "max_tokens: expected at least features.max_length = 10"),
        (
            {"encoder": {"freeze_layers": -2}},
            "encoder.freeze_layers: .*greater than or equal to -1",
        ),
        ({"encoder": {"autocast": "half"}}, "encoder.autocast: .*'float16'"),
    ],
)
def test_bad_options_are_named(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"encoder": {"checkpointing": True}},
            "checkpointing: a bag encoder has no layers, got Tr",
        ),
        ({"encoder": {"lora_rank": 4}}, "encoder.lora_rank: a bag encoder has no layers, got 4"),
        ({"encoder": {"freeze_layers": 0}}, "freeze_layers: a bag encoder has no layers, got 0"),
        ({"train": {"max_tokens": 900}}, "train.max_tokens: a bag encoder pads nothing, got 900"),
        ({"train": {"length_pool": 9}}, "train.length_pool: a bag encoder pads nothing, got 9"),
        ({"encoder_optimizer": {"layer_decay": 0.5}}, "encoder_optimizer.layer_decay: .*got 0.5"),
    ],
)
def test_a_bag_encoder_refuses_what_only_transformers_have(
    sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(sections, source="test")
