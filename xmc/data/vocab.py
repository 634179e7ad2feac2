"""Texts to weighted bags of word n-grams: sublinear tf-idf, L2-normalised.

A word is a maximal run of letters, digits and underscores of the lower-cased text, so `np.asarray`
is two words and `as_strided` is one. A pair is two neighbouring words. The weight of an n-gram in a
document is `(1 + ln tf) * (ln((1 + N) / (1 + df)) + 1)`, divided by the norm of the row (N
documents, df of them with the n-gram; the smoothed idf of scikit-learn's TfidfVectorizer).

Rows do not depend on the rows around them: `Vocabulary.transform` gives a text at prediction the
bits that it has in the training cache.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xmc.config import FeatureConfig
from xmc.data.formats import DataError
from xmc.files import write_file
from xmc.types import Bag

_WORD = re.compile(r"\w+")
_FILE = "vocabulary.safetensors"
_VERSION = 1
_CHUNK_ROWS = 1024  # fits ROW_BITS
_CHUNK_WORDS = 1 << 20  # a chunk ends with the text that passes it
ROW_BITS = 10  # two word ids of up to 27 bits and a row of the chunk share 64 bits
_MEMO = 1 << 20  # words whose hash is remembered


class WordChunk(NamedTuple):
    """The words of up to 1,024 consecutive texts."""

    ids: np.ndarray  # [n] int64 word ids in reading order, -1 for a word that counts for nothing
    lengths: np.ndarray  # [R] int64 number of words of each text


class BagChunk(NamedTuple):
    """The features of consecutive texts."""

    counts: np.ndarray  # [R] int64 number of features of each text
    ids: np.ndarray  # [nnz] int32 feature ids, sorted and distinct within a row
    values: np.ndarray  # [nnz] float32


@dataclass(frozen=True)
class NGrams:
    """The features of a tf-idf vocabulary: words, and pairs of words."""

    words: list[str]  # [W] distinct; those that are features or parts of one
    word_features: np.ndarray  # [W] int32 feature of the word alone, -1 for none
    pairs: np.ndarray  # [P] int64 sorted: first word id * W + second word id
    pair_features: np.ndarray  # [P] int32


class Vocabulary:
    """What turns texts into bags; fitted by `xmc.data.vocab_fit.fit_vocabulary`."""

    def __init__(
        self,
        options: FeatureConfig,
        num_rows: int,
        frequencies: np.ndarray,  # [num_features] int32 rows that have the feature
        ngrams: NGrams | None = None,  # None where features are hashed
    ) -> None:
        self.options = options
        self.num_rows = num_rows
        self.frequencies = frequencies
        self.ngrams = ngrams
        self._idf = np.log((1 + num_rows) / (1 + frequencies.astype(np.float64))) + 1
        self._lookup = hashed_words() if ngrams is None else _known_words(ngrams.words)

    @property
    def num_features(self) -> int:
        return len(self.frequencies)

    def transform(self, texts: Iterable[str]) -> Bag:
        """The bags of the given texts, in memory."""
        chunks = list(self.encode(texts))
        counts = np.concatenate([chunk.counts for chunk in chunks] or [np.empty(0, np.int64)])
        ids = np.concatenate([chunk.ids for chunk in chunks] or [np.empty(0, np.int32)])
        values = np.concatenate([chunk.values for chunk in chunks] or [np.empty(0, np.float32)])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return Bag(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(offsets),
            torch.from_numpy(values),
        )

    def encode(self, texts: Iterable[str]) -> Iterator[BagChunk]:
        """The bags of a stream of texts, some hundred rows at a time."""
        return self.encode_words(word_chunks(texts, self._lookup))

    def encode_words(self, chunks: Iterable[WordChunk]) -> Iterator[BagChunk]:
        """`encode` from word ids of this vocabulary."""
        for chunk in chunks:
            yield self._weigh(*self._count(chunk), len(chunk.lengths))

    def digest(self) -> str:
        """Names the vocabulary by its content."""
        hasher = blake2b(digest_size=16)
        record = [_VERSION, self.num_rows, bag_options(self.options)]
        hasher.update(json.dumps(record).encode())
        for name, array in sorted(self._arrays().items()):
            hasher.update(name.encode())
            hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `vocabulary.safetensors` into the folder, which is made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, metadata = self._arrays(), {"xmc": json.dumps(self._metadata())}
        write_file(folder / _FILE, lambda path: save_file(arrays, path, metadata=metadata))

    @classmethod
    def load(cls, folder: str | Path) -> Vocabulary:
        """Read what `save` wrote. Raises DataError naming a missing or damaged file."""
        path = Path(folder) / _FILE
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads((file.metadata() or {})["xmc"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if record["version"] != _VERSION:
                raise DataError(f"{path}: expected version {_VERSION}, got {record['version']}")
            ngrams = None
            if "words" in arrays:
                words = arrays["words"].tobytes().decode().split("\n")[:-1]
                parts = (arrays[name] for name in ("word_features", "pairs", "pair_features"))
                ngrams = NGrams(words, *parts)
            options = FeatureConfig(**record["options"])
            return cls(options, record["num_rows"], arrays["frequencies"], ngrams)
        except FileNotFoundError:
            raise DataError(f"{path}: expected a vocabulary, got no such file") from None
        except DataError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: expected a vocabulary, got: {reason}") from None

    def _metadata(self) -> dict[str, object]:
        options = dataclasses.asdict(self.options)
        return {"version": _VERSION, "num_rows": self.num_rows, "options": options}

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"frequencies": self.frequencies}
        if self.ngrams is not None:
            text = "".join(f"{word}\n" for word in self.ngrams.words)  # no word has a line break
            arrays["words"] = np.frombuffer(text.encode(), dtype=np.uint8)
            arrays["word_features"] = self.ngrams.word_features
            arrays["pairs"] = self.ngrams.pairs
            arrays["pair_features"] = self.ngrams.pair_features
        return arrays

    def _count(self, chunk: WordChunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, feature and term frequency [n] of every feature of the chunk, sorted."""
        if self.ngrams is None:
            return count_hashed(chunk, self.options)
        known = chunk.ids >= 0
        features = self.ngrams.word_features[chunk.ids[known]]
        single = features >= 0
        keys = (row_ids(chunk)[known][single] << 32) | features[single]
        keys, terms = runs(np.sort(keys))
        if self.options.ngrams == 2 and len(self.ngrams.pairs):
            pair_keys, pair_terms = self._count_pairs(chunk)
            keys = np.concatenate([keys, pair_keys])
            terms = np.concatenate([terms, pair_terms])
            order = np.argsort(keys, kind="stable")
            keys, terms = keys[order], terms[order]
        return keys >> 32, keys & 0xFFFFFFFF, terms

    def _count_pairs(self, chunk: WordChunk) -> tuple[np.ndarray, np.ndarray]:
        """Keys `row << 32 | feature` and frequencies of the pairs that are features."""
        assert self.ngrams is not None
        # Sorted by pair, each distinct pair of the chunk is looked up once, in order.
        sorted_keys, terms = runs(pair_keys(chunk, len(self.ngrams.words)))
        pairs, rows = sorted_keys >> ROW_BITS, sorted_keys & ((1 << ROW_BITS) - 1)
        distinct, repeats = runs(pairs)
        known = self.ngrams.pairs
        places = np.minimum(np.searchsorted(known, distinct.astype(np.int64)), len(known) - 1)
        hit = known[places] == distinct.astype(np.int64)
        features = np.repeat(np.where(hit, self.ngrams.pair_features[places], -1), repeats)
        keep = features >= 0
        return (rows[keep].astype(np.int64) << 32) | features[keep], terms[keep]

    def _weigh(
        self, rows: np.ndarray, features: np.ndarray, terms: np.ndarray, num_rows: int
    ) -> BagChunk:
        weights = _one_plus_log(terms) * self._idf[features]
        # bincount adds one by one in order: the norm of a row does not depend on its neighbours.
        norms = np.sqrt(np.bincount(rows, weights * weights, minlength=num_rows))
        values = (weights / norms[rows]).astype(np.float32)
        counts = np.bincount(rows, minlength=num_rows)
        return BagChunk(counts, features.astype(np.int32), values)


def bag_options(options: FeatureConfig) -> dict[str, object]:
    """The options that bags depend on."""
    if options.vocabulary == "hashing":
        names = ["vocabulary", "ngrams", "hash_bits"]
    else:
        names = ["vocabulary", "ngrams", "min_df", "max_features"]
    return {name: getattr(options, name) for name in names}


def word_chunks(texts: Iterable[str], lookup: Callable[[str], int]) -> Iterator[WordChunk]:
    """Split texts into words and replace these by their ids."""
    ids: list[np.ndarray] = []
    size = 0
    for text in texts:
        words = _WORD.findall(text.lower())
        ids.append(np.fromiter(map(lookup, words), dtype=np.int64, count=len(words)))
        size += len(words)
        if len(ids) == _CHUNK_ROWS or size >= _CHUNK_WORDS:
            yield WordChunk(np.concatenate(ids), np.array([len(row) for row in ids]))
            ids, size = [], 0
    if ids:
        yield WordChunk(np.concatenate(ids), np.array([len(row) for row in ids]))


def row_ids(chunk: WordChunk) -> np.ndarray:
    """The row of the chunk that each word belongs to, [n] int64."""
    return np.repeat(np.arange(len(chunk.lengths)), chunk.lengths)


def pair_keys(chunk: WordChunk, num_words: int) -> np.ndarray:
    """Sorted `(first * W + second) << 10 | row` [n] uint64 of all neighbours that are known."""
    ids, rows = chunk.ids, row_ids(chunk)
    valid = (ids[:-1] >= 0) & (ids[1:] >= 0) & (rows[:-1] == rows[1:])
    pairs = (ids[:-1] * num_words + ids[1:])[valid].astype(np.uint64)
    return np.sort((pairs << np.uint64(ROW_BITS)) | rows[:-1][valid].astype(np.uint64))


def count_hashed(
    chunk: WordChunk, options: FeatureConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, feature and term frequency [n] of every hashed feature of the chunk, sorted."""
    mask = (1 << options.hash_bits) - 1
    rows = row_ids(chunk)
    keys = (rows << 32) | (chunk.ids & mask)
    if options.ngrams == 2:
        same = rows[:-1] == rows[1:]
        mixed = _mix(chunk.ids[:-1][same].astype(np.uint64), chunk.ids[1:][same].astype(np.uint64))
        pairs = (rows[:-1][same] << 32) | (mixed.astype(np.int64) & mask)
        keys = np.concatenate([keys, pairs])
    keys, terms = runs(np.sort(keys))
    return keys >> 32, keys & 0xFFFFFFFF, terms


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a sorted array and how often each occurs (int64)."""
    first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
    return values[first], np.diff(first, append=len(values))


def hashed_words() -> Callable[[str], int]:
    """The CRC-32 of a word, the same in every process and on every machine."""

    class Memo(dict[str, int]):
        def __missing__(self, word: str) -> int:
            if len(self) >= _MEMO:
                self.clear()
            self[word] = code = zlib.crc32(word.encode())
            return code

    return Memo().__getitem__


def _known_words(words: list[str]) -> Callable[[str], int]:
    class Known(dict[str, int]):
        def __missing__(self, word: str) -> int:
            return -1

    return Known((word, number) for number, word in enumerate(words)).__getitem__


def _mix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Hash two 32-bit codes to 64 bits: the finaliser of splitmix64 (Steele et al. 2014)."""
    mixed = (first << np.uint64(32)) | second
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


_LOG_TABLE = np.array([0.0] + [1 + math.log(count) for count in range(1, 4096)])


def _one_plus_log(terms: np.ndarray) -> np.ndarray:
    """`1 + ln(terms)`; by table, because numpy's vector log may round by position in the array."""
    values = _LOG_TABLE[np.minimum(terms, len(_LOG_TABLE) - 1)]
    large = terms >= len(_LOG_TABLE)
    values[large] = [1 + math.log(count) for count in terms[large].tolist()]
    return values
