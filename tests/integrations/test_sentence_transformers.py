"""Tiled losses beside those of sentence-transformers: same loss, same gradients, same trainer."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from xmc.integrations.sentence_transformers import (
    TiledInBatchLoss,
    TiledLabelLoss,
    rows_of_one_label,
)

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"word{n}" for n in range(20))]
D = 6


class Towers(nn.Module):
    """What a loss sees of a model: features in, the same with `sentence_embedding` out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, D)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(D, D), nn.Tanh())

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"]
        if "prompt_length" in features:
            mask[:, : int(torch.as_tensor(features["prompt_length"]).flatten()[0])] = 0
        mask = mask[:, :, None].to(self.table.weight.dtype)
        mean = (self.table(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        features["sentence_embedding"] = self.head(mean)
        return features


def batch(num_columns: int, rows: int = 11, **more: Any) -> list[dict[str, Any]]:
    """Columns of random tokens, of a width each."""
    columns = []
    for number in range(num_columns):
        ids = torch.randint(1, 30, (rows, 4 + number))
        lengths = torch.randint(2, ids.shape[1] + 1, (rows, 1))
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        columns.append({"input_ids": ids * mask, "attention_mask": mask, **more})
    return columns


def gradients(
    loss: nn.Module, columns: list[dict[str, Any]], labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of the model below it."""
    columns = copy.deepcopy(columns)
    loss.zero_grad()
    torch.manual_seed(3)
    value = loss(columns, labels)
    value.backward()
    grads = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    return value.detach(), grads


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float = 1e-5,
) -> None:
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=tolerance)
    largest = max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        worst = float((got[1][name] - grad).abs().max())
        assert worst <= tolerance * max(0.1 * largest, float(grad.abs().max())), name


class Materialised(nn.Module):
    """Cross-entropy of a whole matrix of cosines with rows of weights, and of its columns."""

    def __init__(self, model: nn.Module, positive: Tensor, allowed: Tensor, scale: float) -> None:
        super().__init__()
        self.model, self.positive, self.allowed, self.scale = model, positive, allowed, scale

    def forward(self, columns: list[dict[str, Any]], labels: Tensor | None) -> Tensor:
        reps = [F.normalize(self.model(c)["sentence_embedding"], dim=1) for c in columns]
        q, k = reps[0], torch.cat(reps[1:] or reps)
        scores = (self.scale * q @ k.T).masked_fill(~self.allowed, -torch.inf)
        chosen = self.positive.sum(1) > 0
        target = self.positive[chosen] / self.positive[chosen].sum(1, keepdim=True)
        each = scores[chosen].logsumexp(1) - torch.where(
            target > 0, target * scores[chosen], 0
        ).sum(1)
        return each.mean()


LABELS = torch.tensor([7, 3, 7, -2, 3, 7, 9, 9, 5, 0, 3])


@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("chunk", [None, 4])
def test_all_rows_of_a_label_are_positives(negatives: int, chunk: int | None) -> None:
    model = Towers().double().eval()
    same = LABELS[:, None] == LABELS
    positive = torch.cat([same, torch.zeros_like(same).repeat(1, negatives)], 1).double()
    allowed = torch.ones(positive.shape, dtype=torch.bool)
    columns = batch(2 + negatives)
    ours = TiledLabelLoss(model, 10.0, chunk=chunk)
    truth = Materialised(model, positive, allowed, 10.0)
    assert_same(gradients(ours, columns, LABELS), gradients(truth, columns), 1e-7)


@pytest.mark.parametrize("negatives", [0, 1])
def test_other_rows_of_a_label_are_left_out(negatives: int) -> None:
    model = Towers().double().eval()
    eye = torch.eye(11, dtype=torch.bool)
    allowed = (LABELS[:, None] != LABELS) | eye
    none = torch.zeros_like(eye).repeat(1, negatives)
    positive, allowed = torch.cat([eye, none], 1).double(), torch.cat([allowed, ~none], 1)
    columns = batch(2 + negatives)
    ours = TiledLabelLoss(model, 10.0, equal="masked")
    truth = Materialised(model, positive, allowed, 10.0)
    assert_same(gradients(ours, columns, LABELS), gradients(truth, columns), 1e-7)


@pytest.mark.parametrize("chunk", [None, 3])
def test_one_column_of_texts_picks_the_others_of_its_label(chunk: int | None) -> None:
    model = Towers().double().eval()
    eye = torch.eye(11, dtype=torch.bool)
    positive = ((LABELS[:, None] == LABELS) & ~eye).double()
    ours = TiledLabelLoss(model, 10.0, chunk=chunk)
    truth = Materialised(model, positive, ~eye, 10.0)
    columns = batch(1)
    assert_same(gradients(ours, columns, LABELS), gradients(truth, columns), 1e-7)


def test_rows_of_one_label_are_sorted_and_complete() -> None:
    label = LABELS.unique(return_inverse=True)[1]
    for with_itself in (True, False):
        found = rows_of_one_label(label, 20, with_itself=with_itself)
        assert found.num_labels == 20
        for row in range(len(label)):
            own = found.indices[found.indptr[row] : found.indptr[row + 1]].tolist()
            same = [n for n in range(len(label)) if label[n] == label[row]]
            assert own == [n for n in same if with_itself or n != row]


@pytest.mark.parametrize("prompt", [1, torch.tensor([1]), torch.ones(11, dtype=torch.long)])
def test_chunks_have_the_gradient_of_one_pass(prompt: Any) -> None:
    # Pooling without the prompt writes into the mask: chunks are read twice.
    model = Towers().double()
    model.head[0].p = 0.0
    columns = batch(3, prompt_length=prompt)
    whole = TiledInBatchLoss(model, learnable=True, symmetric=True)
    parts = TiledInBatchLoss(model, learnable=True, symmetric=True, chunk=3)
    assert whole.uses_gradient_cache is False
    assert parts.uses_gradient_cache is True
    expected = gradients(whole, columns)
    assert "info_nce.log_scale" in expected[1]
    assert_same(gradients(parts, columns), expected, 1e-9)
    before = copy.deepcopy(columns)
    parts(columns, None)
    assert torch.equal(columns[0]["attention_mask"], before[0]["attention_mask"])


def test_dropout_is_replayed_in_chunks() -> None:
    model = Towers().double()
    loss, columns = TiledInBatchLoss(model, chunk=4), batch(2)
    torch.manual_seed(3)
    reps = [
        torch.cat(
            [
                model({n: t[a : a + 4] for n, t in c.items()})["sentence_embedding"]
                for a in (0, 4, 8)
            ]
        )
        for c in columns
    ]
    q, k = (F.normalize(rep, dim=1) for rep in reps)
    expected = F.cross_entropy(20 * q @ k.T, torch.arange(11))
    grads = torch.autograd.grad(expected, list(model.parameters()))
    value, got = gradients(loss, columns)
    assert float(value) == pytest.approx(expected.item(), rel=1e-9)
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(got[f"model.{name}"], grad)


def test_evaluation_needs_no_graph() -> None:
    loss, columns = TiledInBatchLoss(Towers().eval(), chunk=4), batch(2)
    with torch.no_grad():
        value = loss(columns, None)
    assert not value.requires_grad
    assert float(value) == pytest.approx(float(gradients(loss, columns)[0]), rel=1e-6)


def test_errors_name_the_rule_and_what_was_given() -> None:
    model = Towers()
    one, two, three = batch(1), batch(2), batch(2, rows=9)
    cases = [
        (TiledInBatchLoss(model), one, None, "expected at least 2 columns of texts, got 1"),
        (TiledLabelLoss(model, equal="masked"), one, LABELS, "expected at least 2 columns"),
        (TiledLabelLoss(model), two, None, "expected integer labels of shape [11], got none"),
        (
            TiledLabelLoss(model),
            two,
            torch.zeros(4),
            "expected integer labels of shape [11], got torch.float32 [4]",
        ),
        (
            TiledInBatchLoss(model),
            [two[0], three[1]],
            None,
            "expected as many texts in each column, got [11, 9]",
        ),
        (
            TiledInBatchLoss(model, chunk=2),
            [two[0], three[1]],
            None,
            "expected as many texts in each column, got [11, 9]",
        ),
        (
            TiledInBatchLoss(model, chunk=2),
            batch(2, offsets=torch.arange(11)),
            None,
            "expected inputs padded to rows of tokens, to cut them into chunks, got offsets",
        ),
    ]
    for loss, columns, labels, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            loss(copy.deepcopy(columns), labels)
    with pytest.raises(ValueError, match="expected equal='positives' or 'masked', got 'same'"):
        TiledLabelLoss(model, equal="same")


def test_the_model_card_gets_options_and_sources() -> None:
    loss = TiledLabelLoss(Towers(), 30.0, equal="masked", symmetric=True, chunk=8)
    assert loss.get_config_dict() == {
        "scale": 30.0,
        "learnable": False,
        "symmetric": True,
        "decoupled": False,
        "normalize": True,
        "chunk": 8,
        "equal": "masked",
    }
    for source in ("2410.17243", "2101.06983", "2004.11362"):
        assert source in loss.citation
    assert "2101.06983" not in TiledInBatchLoss(Towers()).citation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentenceTransformer of one small random BERT layer, from a folder of its own."""
    st = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return st.SentenceTransformer(str(folder), device="cpu")


def texts(rows: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [
        " ".join(f"word{int(n)}" for n in torch.randint(20, (3 + row % 5,), generator=g))
        for row in range(rows)
    ]


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_is_the_loss_of_sentence_transformers(model: Any, symmetric: bool, negatives: int) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    columns = [dict(model.preprocess(texts(9, seed))) for seed in range(2 + negatives)]
    directions = ("query_to_doc", "doc_to_query")[: 1 + symmetric]
    options = {"scale": 15.0, "directions": directions, "partition_mode": "per_direction"}
    theirs = losses.MultipleNegativesRankingLoss(model, **options)
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, **options)
    ours = TiledInBatchLoss(model, 15.0, symmetric=symmetric)
    in_chunks = TiledInBatchLoss(model, 15.0, symmetric=symmetric, chunk=4)
    expected = gradients(theirs, columns)
    assert_same(gradients(cached, columns), expected)
    assert_same(gradients(ours, columns), expected)
    assert_same(gradients(in_chunks, columns), expected)


@pytest.mark.parametrize("kind", ["in batch", "in chunks", "labels"])
def test_the_trainer_takes_steps(model: Any, kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the trainer needs datasets")
    st = pytest.importorskip("sentence_transformers")
    model = copy.deepcopy(model)
    rows = {"anchor": texts(8, 1), "positive": texts(8, 2)}
    loss: nn.Module
    if kind == "labels":
        rows["label"] = [0, 1, 2, 3] * 2  # type: ignore[assignment]
        loss = TiledLabelLoss(model, learnable=True, chunk=2)
    else:
        loss = TiledInBatchLoss(model, learnable=True, chunk=2 if kind == "in chunks" else None)
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=0.1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = datasets.Dataset.from_dict(rows)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    trainer = st.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss
    )
    assert trainer.train().global_step == 2
    assert trainer.evaluate()["eval_loss"] > 0
    moved = {name for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
    assert "info_nce.log_scale" in moved
    assert any("word_embeddings" in name for name in moved), moved
