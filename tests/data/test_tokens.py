"""Token features, with a tokenizer made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from xmc.config import FeatureConfig
from xmc.data.batches import TokenStore, load_dataset
from xmc.data.features import fit_features, load_features
from xmc.data.formats import DataError
from xmc.data.tokens import TextTokenizer
from xmc.types import Tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue"]
OPTIONS = FeatureConfig(kind="tokens", max_length=5)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    texts = ["red", "green blue red green blue", "", "purple"]
    rows = [json.dumps({"title": text, "target_ind": [row % 2]}) for row, text in enumerate(texts)]
    (folder / "trn.json").write_text("\n".join(rows))
    (folder / "lbl.json").write_text('{"title": "a"}\n{"title": "b"}\n')
    return folder


def test_texts_get_special_tokens_and_are_cut(model: Path) -> None:
    features = TextTokenizer.from_pretrained(model, OPTIONS)
    assert features.num_features == 7
    tokens = features.transform(["red", "green blue red green blue"])
    assert tokens.ids.tolist() == [[2, 4, 3, 0, 0], [2, 5, 6, 4, 3]]
    assert tokens.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert features.transform([]).ids.shape == (0, 1)


def test_cached_rows_equal_prediction_and_survive_saving(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    features = fit_features(OPTIONS, folder, model=str(model), cache=tmp_path / "cache")
    data = load_dataset(folder, "trn", features, cache=tmp_path / "cache")
    assert isinstance(data.features, TokenStore)
    assert data.features.ids.dtype == torch.int32
    batch = data.batch(torch.tensor([3, 2, 0]))
    assert isinstance(batch.inputs, Tokens)
    assert batch.inputs.ids.tolist() == [[2, 1, 3], [2, 3, 0], [2, 4, 3]]
    assert batch.inputs.mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]

    features.save(tmp_path / "saved")
    loaded = load_features(tmp_path / "saved", OPTIONS)
    assert loaded.digest() == features.digest()
    again = loaded.transform(["purple\n", "\n", "red\n"])
    assert isinstance(again, Tokens)
    assert torch.equal(again.ids, batch.inputs.ids)
    assert load_dataset(folder, "trn", loaded, cache=tmp_path / "cache").key == data.key

    shorter = fit_features(
        FeatureConfig(kind="tokens", max_length=4), folder, model=str(model), cache=tmp_path
    )
    assert shorter.digest() != features.digest()


def test_encoding_leaves_the_digest_alone(model: Path) -> None:
    features = TextTokenizer.from_pretrained(model, OPTIONS)
    before = features.digest()
    features.transform(["red green blue red green blue"])
    assert features.digest() == before


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: expected a folder or hub name with a tokenizer"):
        TextTokenizer.from_pretrained(tmp_path / "nothing", OPTIONS)
