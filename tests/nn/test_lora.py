"""Adapters: what they compute, what they learn, and the plain weights they are merged into."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from torch import Tensor

from xmc.nn.layers import freeze_
from xmc.nn.lora import add_lora_, merged_weights
from xmc.nn.transformer import TransformerEncoder
from xmc.types import Tokens

RANK, ALPHA = 3, 5.0


@pytest.fixture
def encoder() -> TransformerEncoder:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    return TransformerEncoder(transformers.BertModel(config).eval()).double()


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(torch.randint(0, 20, (4, 6)), torch.ones(4, 6, dtype=torch.int64))


def randomize(encoder: TransformerEncoder) -> None:
    """As training would: B is no longer zero."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(
    encoder: TransformerEncoder, tokens: Tokens
) -> None:
    before = encoder(tokens)
    plain = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    add_lora_(encoder.model, rank=RANK, alpha=ALPHA)
    torch.testing.assert_close(encoder(tokens), before)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 6  # A and B of six linear layers in each of two
    assert all("lora_" in name and "pooler" not in name for name in trained)
    merged = merged_weights(encoder)
    assert merged.keys() == plain.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, plain[name])


def test_merged_weights_compute_what_the_adapters_do(
    encoder: TransformerEncoder, tokens: Tokens
) -> None:
    twin = TransformerEncoder(transformers.BertModel(encoder.config).eval()).double()
    add_lora_(encoder.model, rank=RANK, alpha=ALPHA)
    randomize(encoder)
    twin.load_state_dict(merged_weights(encoder))
    torch.testing.assert_close(twin(tokens), encoder(tokens))
    layer = encoder.model.encoder.layer[1].output.dense
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert low.shape == (RANK, 24)
    expected = layer.base_layer.weight + ALPHA / RANK * high @ low
    torch.testing.assert_close(twin.model.encoder.layer[1].output.dense.weight, expected)


def test_gradients_are_those_of_the_sum(encoder: TransformerEncoder, tokens: Tokens) -> None:
    """The gradient of A is dA = s B^T dW of B dB = s dW A^T, with dW from the merged twin."""
    twin = TransformerEncoder(transformers.BertModel(encoder.config).eval()).double()
    add_lora_(encoder.model, rank=RANK, alpha=ALPHA)
    randomize(encoder)
    twin.load_state_dict(merged_weights(encoder))
    d_reps = torch.randn(4, 16, dtype=torch.float64)
    for one in (encoder, twin):
        one(tokens).backward(d_reps)
    scale = ALPHA / RANK
    for name in ("attention.self.query", "intermediate.dense"):
        layer = encoder.model.encoder.layer[0].get_submodule(name)
        d_weight: Tensor = twin.model.encoder.layer[0].get_submodule(name).weight.grad
        low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(low.grad, scale * high.T @ d_weight)
        torch.testing.assert_close(high.grad, scale * d_weight @ low.T)
        assert layer.base_layer.weight.grad is None


def test_frozen_layers_freeze_their_adapters(encoder: TransformerEncoder) -> None:
    add_lora_(encoder.model, rank=RANK, alpha=ALPHA)
    freeze_(encoder.model, 1)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 6
    assert all("encoder.layer.1." in name for name in trained)


def test_without_adapters_merging_shares_every_tensor(encoder: TransformerEncoder) -> None:
    state, merged = encoder.state_dict(), merged_weights(encoder)
    assert list(merged) == list(state)
    assert all(merged[name].data_ptr() == state[name].data_ptr() for name in state)


def test_without_peft_the_command_is_told(
    encoder: TransformerEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = r'encoder\.lora_rank: adapters need peft: pip install "xmc-toolkit\[lora\]"'
    with pytest.raises(ImportError, match=message):
        add_lora_(encoder.model, rank=RANK, alpha=ALPHA)
