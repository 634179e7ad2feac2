"""TransformerEncoder over a tiny random BERT, offline."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch._inductor import config as inductor

from xmc.nn.compiler import missing_compiler
from xmc.nn.transformer import CompileWarning, TransformerEncoder
from xmc.types import Tokens

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "wireless", "mouse", "red", "garden", "hose", "long"]


@pytest.fixture
def bert() -> transformers.BertModel:
    """Two layers, 16 numbers, in evaluation mode as loading would leave it."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    return transformers.BertModel(config).eval()


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokens.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def encode(
    tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str], **options: Any
) -> Tokens:
    parts = tokenizer(texts, padding=True, return_tensors="pt", **options)
    return Tokens(parts["input_ids"], parts["attention_mask"])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pools_the_last_hidden_states(
    bert: transformers.BertModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    pooling: str,
) -> None:
    tokens = encode(tokenizer, ["wireless mouse", "long red garden hose", ""])
    assert tokens.mask.sum(1).tolist() == [4, 6, 2]
    hidden = bert(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state.detach()
    expected = []
    for row in range(3):
        real = [hidden[row, t].double() for t in range(6) if tokens.mask[row, t]]
        expected.append(real[0] if pooling == "cls" else sum(real) / len(real))
    reps = TransformerEncoder(bert, pooling=pooling)(tokens)
    torch.testing.assert_close(reps.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_a_text(
    bert: transformers.BertModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    pooling: str,
) -> None:
    encoder = TransformerEncoder(bert, pooling=pooling)
    alone = encoder(encode(tokenizer, ["red mouse"]))
    beside = encoder(encode(tokenizer, ["long wireless red garden hose", "red mouse"]))
    assert encode(tokenizer, ["long wireless red garden hose"]).ids.shape[1] == 7
    torch.testing.assert_close(beside[1], alone[0], rtol=1e-5, atol=1e-6)
    assert float((beside[0] - beside[1]).detach().abs().max()) > 0.1


def test_cls_is_the_first_real_token_where_padding_is_on_the_left(
    bert: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    tokenizer.padding_side = "left"
    tokens = encode(tokenizer, ["red mouse", "long red garden hose"])
    assert tokens.ids[0, :2].tolist() == [0, 0]
    hidden = bert(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
    reps = TransformerEncoder(bert, pooling="cls")(tokens)
    torch.testing.assert_close(reps[0], hidden[0, 2])


def test_gradients_reach_every_weight_but_the_pooler(
    bert: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    encoder = TransformerEncoder(bert)
    tokens = encode(tokenizer, ["red mouse", "long red garden hose"])
    d_reps = torch.randn(2, 16)
    encoder(tokens).backward(d_reps)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == ("pooler" not in name)
        assert (parameter.grad is None) == ("pooler" in name)

    # One number against a central difference in float64.
    bias = bert.encoder.layer[0].output.dense.bias
    gradient = float(bias.grad[3])
    encoder.double()

    def loss(shift: float) -> float:
        with torch.no_grad():
            bias[3] += shift
            value = float((encoder(tokens) * d_reps).sum())
            bias[3] -= shift
        return value

    numeric = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert abs(gradient - numeric) < 1e-4 * max(1.0, abs(numeric))


def test_bfloat16_autocast_keeps_float32_outside(
    bert: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    tokens = encode(tokenizer, ["red mouse", "long red garden hose"])
    exact = TransformerEncoder(bert)(tokens)
    encoder = TransformerEncoder(bert, autocast="bfloat16")
    reps = encoder(tokens)
    assert reps.dtype == torch.float32
    difference = float((reps - exact).detach().abs().max())
    assert 0 < difference < 0.05 * float(exact.detach().abs().max())
    reps.sum().backward()
    gradient = bert.encoder.layer[0].output.dense.weight.grad
    assert gradient.dtype == torch.float32
    assert bool(gradient.isfinite().all())


def test_float16_autocast_keeps_float32_outside(
    bert: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    tokens = encode(tokenizer, ["red mouse", "long red garden hose"])
    exact = TransformerEncoder(bert)(tokens)
    reps = TransformerEncoder(bert, autocast="float16")(tokens)
    assert reps.dtype == torch.float32
    difference = float((reps - exact).detach().abs().max())
    assert 0 < difference < 0.005 * float(exact.detach().abs().max())


def test_checkpointing_gives_the_same_gradients_and_keeps_less(
    bert: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """Dropout included: the second forward pass draws what the first drew."""
    tokens = encode(tokenizer, ["red mouse", "long red garden hose"])
    d_reps = torch.randn(2, 16)
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = copy.deepcopy(bert)
        encoder = TransformerEncoder(model, dropout=0.2, checkpointing=checkpointing).train()
        encoder.zero_grad()
        numbers = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            reps = encoder(tokens)
        reps.backward(d_reps)
        kept.append(numbers)
        grads = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        gradients.append(grads)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert kept[1] < 0.5 * kept[0]


def test_compiling_keeps_numbers_and_names(
    bert: transformers.BertModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through Dynamo and its eager backend, which needs no compiler and shares all but the last."""
    compile_ = nn.Module.compile
    asked: list[dict[str, Any]] = []

    def compile_eagerly(self: nn.Module, **options: Any) -> None:
        asked.append(options)
        compile_(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    plain = TransformerEncoder(bert)
    batches = [["red mouse", "long red garden hose"], ["hose"], ["red mouse red", "red", "long"]]
    expected = [plain(encode(tokenizer, texts)) for texts in batches]
    names = list(plain.state_dict())
    encoder = TransformerEncoder(bert, compile=True)
    for texts, reps in zip(batches, expected, strict=True):
        torch.testing.assert_close(encoder(encode(tokenizer, texts)), reps)
    assert asked == [{"dynamic": True}]
    assert list(encoder.state_dict()) == names


@pytest.fixture
def no_cpp_compiler() -> Iterator[None]:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.usefixtures("no_cpp_compiler")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_compiler_one_warning_and_the_same_numbers(
    bert: transformers.BertModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    assert "compiler and finds none" in missing_compiler(torch.device(device))
    if device == "cuda":
        monkeypatch.setattr("xmc.nn.compiler.find_spec", lambda name: None)
        assert missing_compiler(torch.device(device)).endswith("triton, which is not installed")
        return
    tokens = encode(tokenizer, ["red mouse", "long red garden hose"])
    exact = TransformerEncoder(bert)(tokens)
    encoder = TransformerEncoder(bert, compile=True)
    message = r"encoder\.compile: torch\.compile needs a C\+\+ compiler .*; training goes on uncomp"
    with pytest.warns(CompileWarning, match=message) as caught:
        reps = encoder(tokens)
    assert len(caught) == 1
    assert torch.equal(reps, exact)
    assert torch.equal(encoder(tokens), exact)  # and no second warning, which would be an error


@pytest.mark.slow  # half a minute of g++
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_compiled_by_inductor(bert: transformers.BertModel) -> None:
    if missing_compiler(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")
    ids = torch.randint(4, 10, (3, 7))
    tokens = Tokens(ids, torch.ones_like(ids))
    d_reps = torch.randn(3, 16)
    gradients = []
    for compile in (False, True):
        encoder = TransformerEncoder(bert, compile=compile)
        encoder.zero_grad()
        encoder(tokens).backward(d_reps)
        gradients.append(bert.encoder.layer[0].output.dense.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_dropout_only_in_training(
    bert: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    bert.config.hidden_dropout_prob = 0.0
    encoder = TransformerEncoder(bert, dropout=0.5)
    tokens = encode(tokenizer, ["red mouse"] * 40)
    exact = encoder.eval()(tokens)
    assert torch.equal(exact, encoder(tokens))
    encoder.dropout.train()
    dropped = encoder(tokens)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * exact[kept])
    assert 0.4 < float(kept.double().mean()) < 0.6


def test_a_row_without_tokens_is_zero_and_harms_no_other(bert: transformers.BertModel) -> None:
    ids, mask = torch.tensor([[1, 5, 2], [0, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    encoder = TransformerEncoder(bert)
    reps = encoder(Tokens(ids, mask))
    assert torch.equal(reps[1], torch.zeros(16))
    torch.testing.assert_close(reps[0], encoder(Tokens(ids[:1], mask[:1]))[0])


def test_loads_a_folder_and_the_shape_alone(
    bert: transformers.BertModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    bert.bfloat16().save_pretrained(tmp_path / "model")
    tokens = encode(tokenizer, ["red mouse"])
    loaded = TransformerEncoder(str(tmp_path / "model"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(tokens), TransformerEncoder(bert.float())(tokens))

    loaded.save_config(tmp_path / "shape")
    assert [path.name for path in (tmp_path / "shape").iterdir()] == ["config.json"]
    again = TransformerEncoder.from_config(str(tmp_path / "shape"), pooling="cls", dropout=0.25)
    assert again.pooling == "cls"
    assert again.dropout.p == 0.25
    assert again.out_features == 16
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.model.embeddings.word_embeddings.weight, weight_of(loaded))


def weight_of(encoder: TransformerEncoder) -> Tensor:
    weight: Tensor = encoder.model.embeddings.word_embeddings.weight
    return weight


def test_takes_the_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    t5 = transformers.T5Model(config).eval()
    tokens = Tokens(torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.int64))
    hidden = t5.get_encoder()(input_ids=tokens.ids).last_hidden_state
    encoder = TransformerEncoder(t5)
    assert encoder.out_features == 16
    torch.testing.assert_close(encoder(tokens), hidden.mean(1))
    encoder.save_config(tmp_path)
    again = TransformerEncoder.from_config(str(tmp_path)).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(tokens), encoder(tokens))


def test_a_batch_that_does_not_fit_names_the_limits(bert: transformers.BertModel) -> None:
    encoder = TransformerEncoder(bert)
    message = r"ids below 10 and at most 12 positions, got ids up to 10 and 3 positions"
    with pytest.raises(ValueError, match=message):
        encoder(Tokens(torch.tensor([[1, 10, 2]]), torch.ones(1, 3, dtype=torch.int64)))
    ones = torch.ones(1, 13, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="13"):
        encoder(Tokens(ones, ones))


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "~/folder", "one/two/three"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: no such folder, and not a name on the hub$"):
        TransformerEncoder(name)


def test_an_unreachable_hub_name_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> None:
        raise OSError(f"We couldn't connect\nto fetch {name}")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    message = "someone/bert: no such folder, and no model of that name could be had from the hub"
    with pytest.raises(ValueError, match=message + r".*: We couldn't connect to fetch someone/ber"):
        TransformerEncoder("someone/bert")


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}: a folder, but no model could be read"):
        TransformerEncoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^{tmp_path}: a folder, but no model could be read"):
        TransformerEncoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected the folder of a model with a config\.json"):
        TransformerEncoder.from_config(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, 'expected pooling "mean" or "cls", got \'max\''),
        ({"autocast": "half"}, 'expected autocast "none", "bfloat16", "float16", got \'half\''),
    ],
)
def test_refuses_unknown_options(
    bert: transformers.BertModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerEncoder(bert, **options)
