"""A tiny BERT with a tokenizer of whole words, as a folder that a user would have downloaded.

Tests reach it through the fixture `save_bert` of `tests/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


def save_bert(folder: Path, words: Iterable[str], *, framed: bool = False, **sizes: Any) -> Path:
    """Write model and tokenizer; `framed` texts begin with [CLS] and end with [SEP]."""
    special = ["[PAD]", "[UNK]", *(["[CLS]", "[SEP]"] if framed else [])]
    known = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if framed:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(3)
    options = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = BertConfig(vocab_size=len(known), **{**options, **sizes})
    BertModel(config).save_pretrained(folder)
    return folder
