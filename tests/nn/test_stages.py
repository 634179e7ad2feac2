"""Encoders cut into stages: what the whole computes, bit for bit, for each known family."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from xmc.nn.layers import freeze_
from xmc.nn.lora import add_lora_
from xmc.nn.stages import cut_encoder, num_units, stage_weights, whole_weights
from xmc.nn.transformer import TransformerEncoder
from xmc.types import Tokens

VOCAB, LAYERS = 40, 3
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "camembert": {},
    "distilbert": {},
    "electra": {"embedding_size": 8},
    "ernie": {},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 2, "local_attention": 4},
    "mpnet": {},
    "nomic_bert": {},
    "roberta": {},
    "xlm-roberta": {},
}
# Embeddings, layers, pooling: every cut at once, then stages of several units.
CUTS = [[1, 2, 3, 4], [2], [3, 4]]


def tiny(family: str, attention: str | None = None) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    torch.manual_seed(3)
    return transformers.AutoModel.from_config(config, attn_implementation=attention)


def ragged() -> Tokens:
    """Padding on the right of two rows and on the left of one."""
    ids = torch.randint(3, VOCAB, (4, 9))
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    mask[3, :3] = 0
    return Tokens(ids.masked_fill(mask == 0, 1), mask)


def run(stages: list[Any], tokens: Tokens) -> Any:
    out: Any = (tokens,)
    for stage in stages:
        out = stage(*out)
        out = (out,) if isinstance(out, Tensor) else out
    return out[0]


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, None) for family in FAMILIES] + [("bert", "eager"), ("modernbert", "eager")],
)
def test_stages_compute_what_the_whole_does_bit_for_bit(family: str, attention: str | None) -> None:
    encoder = TransformerEncoder(tiny(family, attention)).eval()
    full = Tokens(torch.randint(3, VOCAB, (2, 6)), torch.ones(2, 6, dtype=torch.int64))
    for tokens in (ragged(), full):
        encoder.zero_grad()
        expected = encoder(tokens)
        d_reps = torch.randn(expected.shape)
        expected.backward(d_reps)
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        for cuts in CUTS:
            encoder.zero_grad()
            stages = cut_encoder(encoder, cuts)
            reps = run(stages, tokens)
            assert torch.equal(reps, expected)
            reps.backward(d_reps)
            assert sum(gradient is not None for gradient in gradients.values()) > 5 * LAYERS
            for name, parameter in encoder.named_parameters():
                torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_messages_are_tensors_that_can_be_sent(family: str) -> None:
    """Each stage from a deep copy of its own, and gradients passed by hand: nothing is shared."""
    encoder = TransformerEncoder(tiny(family), pooling="cls").eval().double()
    tokens = ragged()
    expected = encoder(tokens)
    d_reps = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(d_reps)
    stages = [copy.deepcopy(stage) for stage in cut_encoder(encoder, [1, 3])]
    for stage in stages:
        stage.zero_grad()
    inputs: list[tuple[Tensor, ...]] = [(tokens.ids, tokens.mask)]
    outputs = []
    for stage in stages:
        out = stage(*inputs[-1])
        outputs.append((out,) if isinstance(out, Tensor) else out)
        received = [x.detach().clone() for x in outputs[-1]]
        inputs.append(tuple(x.requires_grad_(x.is_floating_point()) for x in received))
    assert torch.equal(outputs[-1][0], expected)
    backward: list[Tensor | None] = [d_reps]
    for out, given in zip(reversed(outputs), reversed(inputs[:-1]), strict=True):
        pairs = [(x, d) for x, d in zip(out, backward, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in pairs], [d for _, d in pairs])
        backward = [x.grad for x in given]
    for stage in stages:
        whole = dict(encoder.named_parameters())
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(parameter.grad, whole[name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_their_names_and_go_back_into_the_whole(family: str) -> None:
    encoder = TransformerEncoder(tiny(family))
    stages = cut_encoder(encoder, [2, 4])
    parts = [stage.state_dict() for stage in stages]
    whole = whole_weights(parts)
    assert whole.keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(whole[name], tensor)
    other = TransformerEncoder(tiny(family))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    cut = cut_encoder(other, [2, 4])
    for stage in cut:
        stage.load_state_dict(stage_weights(stage, whole))
    tokens = ragged()
    assert torch.equal(other.eval()(tokens), encoder.eval()(tokens))
    with pytest.raises(ValueError, match="expected each tensor in one stage, got model"):
        whole_weights([parts[0], *parts])
    with pytest.raises(ValueError, match=r"expected model.* among the weights of the encoder"):
        stage_weights(cut[1], parts[0])


def test_a_bare_model_gives_its_last_hidden_states() -> None:
    model = tiny("bert").eval()
    tokens = ragged()
    expected = model(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
    stages = cut_encoder(model, [1, 3])
    assert torch.equal(run(stages, tokens), expected)
    names = whole_weights(stage.state_dict() for stage in stages)
    assert {name.removeprefix("model.") for name in names} == model.state_dict().keys()
    with pytest.raises(ValueError, match="expected a TransformerEncoder, which pools, before an"):
        cut_encoder(model, [1], intermediate=nn.Linear(16, 4))


def test_the_last_stage_pools_and_applies_what_follows() -> None:
    encoder = TransformerEncoder(tiny("roberta"), pooling="cls", dropout=0.5).eval()
    after = nn.Sequential(nn.Linear(16, 5), nn.ReLU())
    stages = cut_encoder(encoder, [2], intermediate=after)
    tokens = ragged()
    assert torch.equal(run(stages, tokens), after(encoder(tokens)))
    assert stages[1].dropout.p == 0.5
    names = [name for name in stages[1].state_dict() if not name.startswith("model.")]
    assert names == ["intermediate.0.weight", "intermediate.0.bias"]


@pytest.mark.parametrize(
    ("family", "attention"), [(family, None) for family in FAMILIES] + [("bert", "eager")]
)
def test_autocast_and_recomputation_stay(family: str, attention: str | None) -> None:
    """With dropout: the streams of random numbers are those of the whole."""
    model = tiny(family, attention)
    encoder = TransformerEncoder(model, dropout=0.1, autocast="bfloat16", checkpointing=True)
    encoder.train()
    tokens = ragged()
    torch.manual_seed(5)
    expected = encoder(tokens)
    expected.sum().backward()
    gradients = [p.grad for p in encoder.parameters()]
    encoder.zero_grad()
    for cuts in CUTS:
        torch.manual_seed(5)
        stages = cut_encoder(encoder, cuts)
        assert all(stage.training for stage in stages)
        reps = run(stages, tokens)
        assert torch.equal(reps, expected)
        reps.sum().backward()
        for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        encoder.zero_grad()


def test_recomputation_runs_layers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TransformerEncoder(tiny("bert"), checkpointing=True).train()
    runs: list[int] = []
    for number, layer in enumerate(encoder.model.encoder.layer):
        layer.attention.register_forward_hook(lambda *_, n=number: runs.append(n))
    run(cut_encoder(encoder, [2]), ragged()).sum().backward()
    assert sorted(runs) == [0, 0, 1, 1, 2, 2]


def test_adapters_and_frozen_layers_stay() -> None:
    encoder = TransformerEncoder(tiny("bert"))
    add_lora_(encoder.model, rank=2, alpha=4.0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    encoder.eval()
    tokens = ragged()
    expected = encoder(tokens)
    stages = cut_encoder(encoder, [2, 3])
    assert torch.equal(run(stages, tokens), expected)
    assert whole_weights(s.state_dict() for s in stages).keys() == encoder.state_dict().keys()
    trained = [name for name, p in stages[1].named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 6
    assert all("encoder.layer.1." in name and "lora_" in name for name in trained)

    frozen = TransformerEncoder(tiny("bert")).eval()
    freeze_(frozen.model, 2)
    first, second = cut_encoder(frozen, [3])
    out = first(tokens)
    assert not any(x.requires_grad for x in out)
    second(*out).sum().backward()
    assert [name for name, p in frozen.named_parameters() if p.grad is not None] == [
        name for name, p in frozen.named_parameters() if "encoder.layer.2." in name
    ]


def test_cutting_leaves_training_modes_as_they_are() -> None:
    """A loaded model is in evaluation mode inside of a module in training mode."""
    encoder = TransformerEncoder(tiny("bert").eval(), dropout=0.5)
    after = nn.Dropout(0.5).eval()
    modes = {name: module.training for name, module in encoder.named_modules()}
    first, second = cut_encoder(encoder, [2], intermediate=after)
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert (second.training, second.dropout.training, after.training) == (True, True, False)
    tokens = ragged()
    torch.manual_seed(1)
    expected = encoder(tokens)
    torch.manual_seed(1)
    assert torch.equal(run([first, second], tokens), expected)


def test_a_stage_does_not_hold_what_others_have() -> None:
    encoder = TransformerEncoder(tiny("bert"))
    stages = cut_encoder(encoder, [2])
    own = weakref.ref(encoder.model.encoder.layer[2])
    others = [weakref.ref(m) for m in (encoder.model.encoder.layer[0], encoder.model.embeddings)]
    kept = stages[1]
    del encoder, stages
    gc.collect()
    assert own() is not None
    assert [other() for other in others] == [None, None]
    assert sum(p.numel() for p in kept.parameters()) > 0


def test_what_cannot_be_cut_is_an_error_that_says_why() -> None:
    model = tiny("bert")
    encoder = TransformerEncoder(model)
    assert num_units(encoder) == num_units(model) == LAYERS + 2
    for cuts in ([0], [5], [2, 2], [3, 1]):
        with pytest.raises(
            ValueError, match=r"increasing cuts between 1 and 4 .* 5 units .*got \["
        ):
            cut_encoder(encoder, cuts)
    with pytest.raises(ValueError, match="expected an encoder that is not compiled: cut it, then"):
        cut_encoder(TransformerEncoder(model, compile=True), [1])
    compiled = tiny("bert")
    compiled._compiled_call_impl = compiled.forward  # what `compile` sets
    with pytest.raises(ValueError, match="expected an encoder that is not compiled"):
        cut_encoder(compiled, [1])
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=9, embedding_size=4, hidden_size=8, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match=r"a model of one of bert, .*mpnet.* to cut, got 'albert'"):
        cut_encoder(TransformerEncoder(albert), [1])
    decoder = transformers.BertModel(transformers.BertConfig(**COMMON, is_decoder=True))
    with pytest.raises(ValueError, match="expected an encoder to cut, got a bert as a decoder"):
        cut_encoder(decoder, [1])
    masked = transformers.BertForMaskedLM(model.config)
    with pytest.raises(ValueError, match=r"layers at encoder\.layer, got BertForMaskedLM"):
        cut_encoder(masked, [1])
    shared = TransformerEncoder(tiny("bert"))
    shared.model.encoder.layer[2].output = shared.model.encoder.layer[0].output
    with pytest.raises(ValueError, match=r"expected encoder\.layer\.0\.output.* in one stage, got"):
        cut_encoder(shared, [2])


def test_bad_inputs_of_a_stage_are_errors() -> None:
    first, second = cut_encoder(TransformerEncoder(tiny("mpnet")), [2])
    tokens = ragged()
    with pytest.raises(ValueError, match="expected Tokens, or a tensor and a mask"):
        first(tokens.ids)
    hidden, mask, table = first(tokens)
    assert table.shape == (32, 2)
    with pytest.raises(ValueError, match="and 1 tables from the stage before, got 0 tables"):
        second(hidden, mask)
    wrong = Tokens(tokens.ids + VOCAB, tokens.mask)
    with pytest.raises(ValueError, match="expected token ids below 40 and at most 20 positions"):
        first(wrong)


def test_the_cuts_of_a_shared_encoder_are_consecutive() -> None:
    stages = cut_encoder(TransformerEncoder(tiny("bert")), [2, 3])
    layers = [list(stage.model.encoder.layer._modules) for stage in stages]
    assert layers == [["0"], ["1"], ["2"]]
    for before, after in pairwise(stages):
        assert not (before.state_dict().keys() & after.state_dict().keys())
