"""A transformer fine-tuned end to end through the same recipe, offline, on a tiny random model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import xmc
from xmc.model import load_model


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT and a word tokenizer, as a user would have downloaded it."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{n}" for n in range(30))]
    words += [f"noise{n}" for n in range(200)]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_a_transformer_learns_and_its_run_stands_alone(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, autocast: str
) -> None:
    source = tmp_path / "bert"
    shutil.copytree(tiny_bert, source)
    overrides = [
        "features.kind=tokens",
        "features.max_length=16",
        "encoder.kind=transformer",
        f"encoder.model={source}",
        f"encoder.autocast={autocast}",
        "encoder.dropout=0.0",
        "head.fan_in=16",
        "encoder_optimizer.lr=0.003",
        "train.epochs=15",
        "train.batch_size=16",
        "train.warmup_steps=10",
    ]
    run = tmp_path / "run"
    xmc.train("quickstart", data=tiny_data, out=run, overrides=overrides, cache=tmp_path / "cache")
    shutil.rmtree(source)  # the run holds tokenizer, shape and weights
    scores = xmc.evaluate(run, "test", cache=tmp_path / "cache")
    assert scores.values["P@1"] > 0.8
    answers = xmc.Predictor.load(run).predict(["word2 noise5 word2", "word1"], k=1)
    assert [answer[0][0] for answer in answers] == ["label 2", "label 1"]
    model = load_model(run / "model")
    assert model.encoder.out_features == 32


def test_a_missing_transformer_is_named_before_anything_is_written(
    tiny_data: Path, tmp_path: Path
) -> None:
    overrides = [
        "features.kind=tokens",
        "encoder.kind=transformer",
        f"encoder.model={tmp_path}/nowhere",
    ]
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"nowhere: .*folder"):
        xmc.train(
            "quickstart", data=tiny_data, out=out, overrides=overrides, cache=tmp_path / "cache"
        )
    assert not out.exists()
