"""The gradient cache gives the gradient of one backward pass for every structure of inputs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding, BertConfig, BertModel
from transformers.modeling_outputs import BaseModelOutput

from xmc.nn.encoder import BagEncoder
from xmc.nn.transformer import TransformerEncoder
from xmc.training.chunks import Chunks, TokenBudget
from xmc.training.grad_cache import cached_step
from xmc.types import Bag, Tokens

D = 6


class Tower(nn.Module):
    """One or two inputs to a representation, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Dropout(0.4))
        self.out = nn.Linear(16, D)

    def forward(self, x: Tensor, shift: Tensor | None = None, *, double: bool = False) -> Tensor:
        rep: Tensor = self.out(self.layers(x if shift is None else x + shift))
        return 2 * rep if double else rep


class TextTower(nn.Module):
    """A list of texts to representations; by the encoder's own tokenization."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(128, D)
        self.dropout = nn.Dropout(0.4)

    def forward(self, texts: list[str]) -> Tensor:
        ids = torch.tensor([ord(letter) for text in texts for letter in text])
        offsets = torch.tensor([0, *(len(text) for text in texts[:-1])]).cumsum(0)
        rep: Tensor = self.dropout(self.table(ids, offsets))
        return rep


class OutputTower(Tower):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        rep = super().forward(x)
        return (x, rep) if self.kind is tuple else BaseModelOutput(last_hidden_state=rep)


class Pair(NamedTuple):
    x: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Features:
    x: Tensor
    shift: Tensor | None = None


class ObjectTower(Tower):
    def forward(self, inputs: Pair | Features) -> Tensor:  # type: ignore[override]
        return super().forward(inputs.x, inputs.shift)


@dataclass(frozen=True)
class Case:
    """An encoder, inputs, and by hand the representations of some of their rows."""

    encoder: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    rows: Callable[[Any, Any, int, int], Tensor]
    rep: Any = None


def floats(rows: int) -> Tensor:
    return torch.randn(rows, D, dtype=torch.get_default_dtype())


def tokens(rows: int) -> Tokens:
    lengths = torch.randint(1, 8, (rows, 1))
    mask = (torch.arange(7) < lengths).long()
    return Tokens(torch.randint(1, 30, (rows, 7)) * mask, mask)


def bag(rows: int) -> Bag:
    ids = torch.cat([torch.randperm(40)[: 1 + row % 4] for row in range(rows)])
    counts = torch.tensor([0, *(1 + row % 4 for row in range(rows))])
    return Bag(ids, counts.cumsum(0), torch.rand(len(ids), dtype=torch.get_default_dtype()))


def mapping(rows: int) -> dict[str, Any]:
    return {"x": floats(rows), "shift": floats(rows), "double": True}


def bert() -> BertModel:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**shape, vocab_size=30, intermediate_size=16))
    return model.train()


NAMES = ("input_ids", "attention_mask")
CASES = {
    "tensor": Case(Tower, floats, lambda f, x, a, b: f(x[a:b])),
    "tuple": Case(
        Tower, lambda n: (floats(n), floats(n)), lambda f, x, a, b: f(x[0][a:b], x[1][a:b])
    ),
    "tuple with none": Case(Tower, lambda n: (floats(n), None), lambda f, x, a, b: f(x[0][a:b])),
    "list": Case(
        Tower, lambda n: [floats(n), floats(n)], lambda f, x, a, b: f(x[0][a:b], x[1][a:b])
    ),
    "dict with flag": Case(
        Tower, mapping, lambda f, x, a, b: f(x["x"][a:b], x["shift"][a:b], double=True)
    ),
    "batch encoding": Case(
        bert,
        lambda n: BatchEncoding(dict(zip(NAMES, vars(tokens(n)).values(), strict=True))),
        lambda f, x, a, b: f(
            input_ids=x["input_ids"][a:b], attention_mask=x["attention_mask"][a:b]
        ).last_hidden_state[:, 0],
        rep=lambda output: output.last_hidden_state[:, 0],
    ),
    "named tuple": Case(
        ObjectTower,
        lambda n: Pair(floats(n), floats(n)),
        lambda f, x, a, b: f(Pair(x[0][a:b], x[1][a:b])),
    ),
    "dataclass": Case(
        ObjectTower, lambda n: Features(floats(n)), lambda f, x, a, b: f(Features(x.x[a:b]))
    ),
    "texts": Case(
        TextTower,
        lambda n: ["abcdefgh"[: 1 + i % 5] for i in range(n)],
        lambda f, x, a, b: f(x[a:b]),
    ),
    "tokens": Case(
        lambda: TransformerEncoder(bert(), dropout=0.2),
        tokens,
        lambda f, x, a, b: f(Tokens(x.ids[a:b], x.mask[a:b])),
    ),
    "bag": Case(lambda: BagEncoder(40, D, 0.3), bag, lambda f, x, a, b: f(x.slice(a, b))),
    "model output": Case(
        lambda: OutputTower(BaseModelOutput),
        floats,
        lambda f, x, a, b: f(x[a:b]).last_hidden_state,
        rep="last_hidden_state",
    ),
    "output tuple": Case(
        lambda: OutputTower(tuple), floats, lambda f, x, a, b: f(x[a:b])[1], rep=1
    ),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def tolerance(request: pytest.FixtureRequest) -> Iterator[float]:
    torch.set_default_dtype(request.param)
    yield {torch.float32: 1e-6, torch.float64: 1e-12}[request.param]
    torch.set_default_dtype(torch.float32)


def ranges(rows: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def contrast(q: Tensor, k: Tensor) -> Tensor:
    """The plain loss, with further keys as negatives."""
    scores = 3 * F.normalize(q) @ F.normalize(k).T
    return F.cross_entropy(scores, torch.arange(len(q)))


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    named = ((f"{i}.{n}", p) for i, m in enumerate(modules) for n, p in m.named_parameters())
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad
        for name, p in named
        if p.grad is not None
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Differences as a share of the parameter's largest element.

    The floor is for gradients that are zero but for rounding, such as of a key's bias in attention.
    """
    assert got.keys() == expected.keys()
    assert expected
    floor = 1e-4 * max(float(truth.abs().max()) for truth in expected.values())
    for name, truth in expected.items():
        size = max(float(truth.abs().max()), floor)
        assert float((got[name] - truth).abs().max()) <= tolerance * size, name


def plain_step(
    encoders: list[Any], inputs: list[Any], loss: Any, *, size: int, rows: Callable[..., Tensor]
) -> Tensor:
    """One backward pass through the graphs of all chunks."""
    reps = [
        torch.cat([rows(f, x, a, b) for a, b in ranges(_len(x), size)])
        for f, x in zip(encoders, inputs, strict=True)
    ]
    value: Tensor = loss(*reps)
    value.backward()
    return value.detach()


def _len(x: Any) -> int:
    if isinstance(x, tuple | list) and isinstance(x[0], Tensor):
        return len(x[0])
    if isinstance(x, dict | BatchEncoding):
        return len(next(iter(x.values())))
    return len(x.x) if isinstance(x, Features) else len(x)


@pytest.mark.parametrize("name", CASES)
def test_every_input_structure_has_the_gradient_of_one_pass(name: str, tolerance: float) -> None:
    case = CASES[name]
    f, g = case.encoder(), case.encoder()
    inputs = [case.inputs(7), case.inputs(11)]
    twins = copy.deepcopy([f, g])
    torch.manual_seed(1)
    expected = plain_step(twins, inputs, contrast, size=3, rows=case.rows)
    after = torch.rand(3)
    torch.manual_seed(1)
    loss = cached_step([f, g], inputs, contrast, chunk=3, rep=case.rep)
    # Random numbers go on as after the plain step.
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    assert not loss.requires_grad
    assert_same(gradients(f, g), gradients(*twins), tolerance)


@pytest.mark.parametrize("chunk", [TokenBudget(14), TokenBudget(1)])
def test_token_budgets_and_ready_chunks_are_exact(chunk: TokenBudget) -> None:
    encoder = TransformerEncoder(bert().double().eval())
    q, k = tokens(9), tokens(9)
    twin = copy.deepcopy(encoder)
    contrast(twin(q), twin(k)).backward()
    cached_step([encoder, encoder], [q, k], contrast, chunk=chunk)
    assert_same(gradients(encoder), gradients(twin), 1e-12)
    for parameter in encoder.parameters():
        parameter.grad = None
    parts = Chunks([k.slice(0, 4), k.slice(4, 5), k.slice(5, 9)])
    cached_step([encoder, encoder], [q, parts], contrast, chunk=[chunk, 1])
    assert_same(gradients(encoder), gradients(twin), 1e-12)


def test_chunks_that_are_loaded_when_asked_for_are_not_held() -> None:
    encoder, x = Tower().eval(), torch.randn(8, D)
    twin = copy.deepcopy(encoder)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Loader(Sequence[Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: Any) -> Tensor:
            nonlocal most
            loaded = x[2 * index : 2 * index + 2].clone()
            alive.append(weakref.ref(loaded))
            most = max(most, sum(ref() is not None for ref in alive))
            return loaded

    contrast(twin(x), twin(x)).backward()
    cached_step([encoder, encoder], [Chunks(Loader()), x], contrast, chunk=2, kept=0)
    assert_same(gradients(encoder), gradients(twin), 1e-6)
    assert most == 1
