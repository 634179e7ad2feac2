"""Layers by depth: which parameters lie where, and what freezing the lowest leaves to train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from xmc.nn.layers import freeze_, layers_of, parameter_depths
from xmc.nn.transformer import TransformerEncoder
from xmc.types import Tokens

SIZES = {"vocab_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}


def bert(**options: Any) -> transformers.BertModel:
    config = transformers.BertConfig(
        **SIZES, hidden_size=16, intermediate_size=24, initializer_range=0.3, **options
    )
    return transformers.BertModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2
    )
    return transformers.T5Model(config).get_encoder()


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=20, dim=16, n_layers=3, n_heads=2, hidden_dim=24
    )
    return transformers.DistilBertModel(config)


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        (bert(), "encoder.layer", {"embeddings.LayerNorm.weight": 0, "pooler.dense.bias": 3}),
        (t5(), "block", {"embed_tokens.weight": 0, "final_layer_norm.weight": 3}),
        (distilbert(), "transformer.layer", {"embeddings.word_embeddings.weight": 0}),
    ],
)
def test_depths_rise_from_the_embeddings_to_the_last_layer(
    model: nn.Module, name: str, expected: dict[str, int]
) -> None:
    found, layers = layers_of(model)
    assert (found, len(layers)) == (name, 3)
    depths = parameter_depths(model)
    assert depths.keys() == {key for key, _ in model.named_parameters()}
    assert expected.items() <= depths.items()
    for layer in range(3):
        inside = {key for key in depths if key.startswith(f"{name}.{layer}.")}
        assert inside
        assert {depths[key] for key in inside} == {layer + 1}


@pytest.mark.parametrize("count", [-1, 0, 1, 3])
def test_frozen_layers_get_no_gradient_and_the_others_the_same(count: int) -> None:
    model = bert()
    encoder = TransformerEncoder(model)
    tokens = Tokens(torch.randint(0, 20, (4, 6)), torch.ones(4, 6, dtype=torch.int64))
    d_reps = torch.randn(4, 16)
    encoder(tokens).backward(d_reps)
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    freeze_(model, count)
    reps = encoder(tokens)
    assert reps.requires_grad == (count < 3)
    if count < 3:
        reps.backward(d_reps)
    for name, parameter in model.named_parameters():
        if "pooler" in name or parameter_depths(model)[name] <= count:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, whole[name])


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"freeze_layers: expected at most the 3 layers .*, got 4"):
        freeze_(bert(), 4)
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(
            **SIZES, embedding_size=8, hidden_size=16, intermediate_size=24, num_hidden_groups=1
        )
    )
    with pytest.raises(ValueError, match="a list of its 3 layers, got AlbertModel without"):
        freeze_(albert, 0)
    freeze_(albert, -1)
    with pytest.raises(ValueError, match="a list of its 3 layers, got AlbertModel without"):
        TransformerEncoder(albert, checkpointing=True)
