"""Label texts as training rows: whose they are, what they hold, and what does not count them."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xmc.config import FeatureConfig, from_dict
from xmc.data.batches import Dataset, load_dataset
from xmc.data.features import Features, fit_features
from xmc.data.formats import DataError, Document
from xmc.data.label_texts import with_label_texts
from xmc.data.tokens import TextTokenizer
from xmc.evaluation.propensity import inverse_propensity
from xmc.heads.classifier import ClassifierHead
from xmc.training.run import prepare_data, train
from xmc.types import Bag, Tokens

FILTER = [(0, 3), (5, 1), (399, 29)]


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path) -> Path:
    """Labels named by the word that gives them away; 4 and 9 have no title, 12 an unknown word."""
    target = tmp_path / "data"
    shutil.copytree(tiny_data, target)
    titles = [f"word{number}" for number in range(30)]
    titles[4], titles[9], titles[12] = "", "  ", "unheard"
    with gzip.open(target / "lbl.json.gz", "wt", encoding="utf-8") as file:
        for number, title in enumerate(titles):
            file.write(json.dumps({"uid": f"L{number}", "title": title}) + "\n")
    return target


def tokenizer() -> TextTokenizer:
    words = ["[PAD]", "[UNK]", *(f"word{n}" for n in range(30)), *(f"noise{n}" for n in range(200))]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    return TextTokenizer(fast, FeatureConfig(kind="tokens", max_length=16))


def features_of(kind: str, folder: Path, cache: Path) -> Features:
    if kind == "tokens":
        return tokenizer()
    return fit_features(FeatureConfig(min_df=1), folder, cache=cache)


def rows_of(inputs: Bag | Tokens) -> list[Any]:
    """What an encoder reads, row by row, without padding."""
    if isinstance(inputs, Tokens):
        pairs = zip(inputs.ids, inputs.mask.bool(), strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]
    bounds = inputs.offsets.tolist()
    spans = pairwise(bounds)
    return [(inputs.ids[a:b].tolist(), inputs.weights[a:b].tolist()) for a, b in spans]


def content(data: Dataset) -> list[Any]:
    """Everything about every row."""
    batch = data.batch(torch.arange(len(data)))
    labels = [batch.labels.slice(r, r + 1).indices.tolist() for r in range(len(data))]
    excluded: list[Any] = [None] * len(data)
    if batch.exclude is not None:
        batch.exclude.validate()
        excluded = [batch.exclude.slice(r, r + 1).indices.tolist() for r in range(len(data))]
    return list(zip(rows_of(batch.inputs), labels, excluded, strict=True))


@pytest.mark.parametrize("kind", ["bag", "tokens"])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_titles_follow_the_documents(
    kind: str, filtered: bool, subset: bool, folder: Path, tmp_path: Path
) -> None:
    if filtered:
        lines = "".join(f"{row} {label}\n" for row, label in FILTER)
        (folder / "filter_labels_train.txt").write_text(lines)
    features = features_of(kind, folder, tmp_path / "cache")
    documents = load_dataset(folder, "trn", features, cache=tmp_path / "cache")
    if subset:
        documents = documents.subset(torch.tensor([7, 399, 0, 5, 200]))
    joined = with_label_texts(documents, folder, features, cache=tmp_path / "cache")
    joined.labels.validate()
    found = content(joined)
    assert found[: len(documents)] == content(documents)
    # An unknown word is a token, but leaves a bag empty.
    titled = [n for n in range(30) if n not in (4, 9) and (n != 12 or kind == "tokens")]
    expected = []
    for label in titled:
        text = Document("", "unheard" if label == 12 else f"word{label}", "", []).text
        row = rows_of(features.transform([text]))[0]
        expected.append((row, [label], [] if filtered else None))
    assert found[len(documents) :] == expected
    assert joined.key != documents.key
    again = with_label_texts(documents, folder, features, cache=tmp_path / "cache")
    assert content(again) == found


def test_labels_without_known_titles_are_an_error(tiny_data: Path, tmp_path: Path) -> None:
    """They go by "label 3" there, which no document says."""
    features = features_of("bag", tiny_data, tmp_path)
    documents = load_dataset(tiny_data, "trn", features, cache=tmp_path)
    message = r"lbl\.json\.gz: expected titles with words that .*, got none among 30 labels"
    with pytest.raises(DataError, match=message):
        with_label_texts(documents, tiny_data, features, cache=tmp_path)


def config(**sections: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "features": {"min_df": 1},
        "encoder": {"dim": 16},
        "head": {"fan_in": 6, "positive_weight": "propensity", "dense_share": 0.1},
        "auxiliary": {"kind": "clusters", "max_labels": 4},
        "train": {"epochs": 1, "batch_size": 30, "validation": 0.25, "label_texts": True},
    }
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return from_dict(values, source="test")


def test_a_run_trains_on_them_and_counts_documents_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each label text once an epoch; no trace in bias, weights, order, clusters or validation."""
    labels_seen, weights, biases = [], [], []
    original = ClassifierHead.own_loss_and_grad

    def loss_and_grad(self: ClassifierHead, reps: Any, labels: Any, **kwargs: Any) -> Any:
        if self.num_labels == 27:  # the sparse rows
            labels_seen.append(labels)
            weights.append(self.positive_weight)
            biases.append(self.layer.bias.clone())  # type: ignore[union-attr]
        return original(self, reps, labels, **kwargs)

    monkeypatch.setattr(ClassifierHead, "own_loss_and_grad", loss_and_grad)
    runs = {}
    for texts in (True, False):
        seen = len(labels_seen), sum(len(labels.indices) for labels in labels_seen)
        out = tmp_path / str(texts)
        options = config(train={"label_texts": texts})
        runs[texts] = train(options, data=folder, out=out, cache=tmp_path / "cache")
        record = json.loads((out / "run.json").read_text())
        assert record["train_rows"] == 300
        assert record["validation_rows"] == 100
        assert record["label_text_rows"] == (27 if texts else 0)
        if texts:
            assert seen == (0, 0)
            assert sum(map(len, labels_seen)) == 327
        else:
            assert sum(map(len, labels_seen[seen[0] :])) == 300
            of_documents = sum(len(labels.indices) for labels in labels_seen[seen[0] :])
            dense = runs[texts].head.order[:3].tolist()
            titled = [n for n in range(30) if n not in (4, 9, 12, *dense)]
            assert seen[1] == of_documents + len(titled)
    train_set = prepare_data(config(), folder, tmp_path / "cache")[1]
    counts = train_set.label_frequencies()
    order = runs[True].head.order.long()
    assert torch.equal(order, runs[False].head.order.long())
    assert order[:3].tolist() == counts.argsort(descending=True, stable=True)[:3].tolist()
    tail = order[3:]
    expected = inverse_propensity(counts, 300, 0.55, 1.5).float()[tail]
    assert torch.equal(weights[0], expected)
    prior = torch.logit((counts[tail] + 0.5) / 301)
    torch.testing.assert_close(biases[0], prior)
    clusters = [(tmp_path / str(t) / "clusters.safetensors").read_bytes() for t in (True, False)]
    assert clusters[0] == clusters[1]
