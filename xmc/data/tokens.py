"""Texts to token ids by a Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xmc.config import FeatureConfig
from xmc.data.formats import DataError
from xmc.nn.warm_start import tokenizer_source
from xmc.types import Tokens

_CHUNK_ROWS = 1024


class TokenChunk(NamedTuple):
    """The tokens of consecutive texts."""

    counts: np.ndarray  # [R] int64 number of tokens of each text
    ids: np.ndarray  # [nnz] int32


@dataclass(frozen=True)
class Padding:
    """How rows of tokens become a rectangle."""

    id: int  # of the padding token
    multiple: int = 1  # widths are multiples of it
    limit: int | None = None  # a multiple is not padded beyond this width; None: no limit

    def widths(self, counts: torch.Tensor) -> torch.Tensor:  # [R] int64 -> [R] int64
        """The width of a batch whose longest row has so many tokens: at least 1."""
        counts = counts.clamp(min=1)
        wide = (counts + self.multiple - 1) // self.multiple * self.multiple
        return wide if self.limit is None else torch.maximum(counts, wide.clamp(max=self.limit))


class TextTokenizer:
    """A tokenizer with its special tokens, cut at `options.max_length` tokens."""

    def __init__(self, tokenizer: Any, options: FeatureConfig) -> None:
        self.options = options
        self._tokenizer = tokenizer
        pad = tokenizer.pad_token_id
        self.padding = Padding(
            id=0 if pad is None else int(pad),  # masked: any valid id will do
            multiple=options.pad_multiple,
            limit=options.max_length,
        )

    @classmethod
    def from_pretrained(cls, model: str | Path, options: FeatureConfig) -> TextTokenizer:
        """From a model's folder (an xmc run's, too) or hub name.

        Raises DataError where it holds no tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(model))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"{model}: expected a folder or hub name with a tokenizer: {reason}"
            ) from None
        return cls(tokenizer, options)

    @property
    def num_features(self) -> int:
        """Size of the token vocabulary, added tokens included."""
        return len(self._tokenizer)

    def transform(self, texts: Iterable[str]) -> Tokens:
        """The tokens of the given texts, padded to the longest."""
        chunks = list(self.encode(texts))
        counts = np.concatenate([chunk.counts for chunk in chunks] or [np.empty(0, np.int64)])
        ids = np.concatenate([chunk.ids for chunk in chunks] or [np.empty(0, np.int32)])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return pad_tokens(torch.from_numpy(ids), torch.from_numpy(offsets), self.padding)

    def encode(self, texts: Iterable[str]) -> Iterator[TokenChunk]:
        """The tokens of a stream of texts, 1,024 rows at a time."""
        stream = iter(texts)
        while chunk := list(islice(stream, _CHUNK_ROWS)):
            rows = self._tokenizer(
                chunk,
                truncation=True,
                max_length=self.options.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            counts = np.array([len(row) for row in rows], dtype=np.int64)
            flat = np.fromiter((token for row in rows for token in row), np.int32, counts.sum())
            yield TokenChunk(counts, flat)

    def digest(self) -> str:
        """Names the tokenizer and its options by their content."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            parts = json.loads(backend.to_str())
            # What the last call asked for, not what the tokenizer is.
            content = json.dumps({**parts, "truncation": None, "padding": None})
        else:  # a tokenizer written in Python
            content = repr(sorted(self._tokenizer.get_vocab().items()))
        special = repr(sorted(self._tokenizer.special_tokens_map.items()))
        kind = type(self._tokenizer).__name__
        record = json.dumps([self.options.max_length, special, kind])
        return blake2b((record + content).encode(), digest_size=16).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's own files into the folder."""
        self._tokenizer.save_pretrained(str(folder))


def pad_tokens(
    ids: torch.Tensor,  # [nnz] int32 or int64
    offsets: torch.Tensor,  # [B+1] int64
    padding: Padding,
) -> Tokens:
    """Right-pad rows of token ids to the longest row, at least one token wide."""
    counts = offsets[1:] - offsets[:-1]
    longest = counts.max() if len(counts) else torch.tensor(0)
    mask = torch.arange(int(padding.widths(longest))) < counts[:, None]
    padded = torch.full(mask.shape, padding.id, dtype=torch.int64)
    padded[mask] = ids.long()
    return Tokens(padded, mask.long())
