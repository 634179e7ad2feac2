"""Fitting a vocabulary to a stream of texts in bounded memory.

One pass splits the texts into words and writes word ids to disk; pairs are counted and features are
encoded from those ids, in array operations. In memory stay at most `_MAX_LIVE_WORDS` words (4
million, with 4 bytes for each distinct word ever met) and then `_MAX_PAIRS` counted pairs (8
million): 0.7 GB above the import of torch, measured with 6 million distinct words. Where the texts
have more, the rarest so far are forgotten: only n-grams about as rare as those can come out with
too low a count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from xmc.config import FeatureConfig
from xmc.data.formats import DataError
from xmc.data.vocab import (
    ROW_BITS,
    NGrams,
    Vocabulary,
    WordChunk,
    count_hashed,
    hashed_words,
    pair_keys,
    row_ids,
    runs,
    word_chunks,
)

_MAX_LIVE_WORDS = 1 << 22
_MAX_PAIRS = 1 << 23
_MERGE_SIZE = 1 << 22  # new pairs gathered before they are merged into the counts


class WordFile:
    """Chunks of word ids in a file, written once and read as often as needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: list[tuple[int, int]] = []  # words and texts of each chunk

    def write(self, chunks: Iterable[WordChunk]) -> Iterator[WordChunk]:
        """Pass the chunks on while they are written; ids must be below 2^32."""
        with self.path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk.ids.astype(np.uint32).data)
                file.write(chunk.lengths.astype(np.uint32).data)
                self.sizes.append((len(chunk.ids), len(chunk.lengths)))
                yield chunk

    def read(self, table: np.ndarray | None = None) -> Iterator[WordChunk]:
        """The chunks, with each id replaced by `table[id]` where a table is given."""
        with self.path.open("rb") as file:
            for num_words, num_rows in self.sizes:
                ids = np.fromfile(file, np.uint32, num_words)
                lengths = np.fromfile(file, np.uint32, num_rows).astype(np.int64)
                mapped = ids if table is None else table[ids]
                yield WordChunk(mapped.astype(np.int64), lengths)


def fit_vocabulary(
    texts: Iterable[str], options: FeatureConfig, spill: Path
) -> tuple[Vocabulary, Iterator[WordChunk]]:
    """Fit to the texts, read once; `spill` is a file to write (4 bytes a word).

    Also returns the texts as word ids, for `Vocabulary.encode_words`; they are read from the file.
    Raises DataError where no n-gram is frequent enough.
    """
    file = WordFile(spill)
    if options.vocabulary == "hashing":
        return _fit_hashing(texts, options, file), file.read()
    words, frequencies, num_rows = _count_words(texts, file)
    frequent = _at_least(frequencies, options.min_df, options.max_features)
    table = np.full(len(frequencies), -1, np.int32)
    table[frequent] = np.arange(len(frequent), dtype=np.int32)
    names = [""] * len(frequent)
    for word, number in words.items():
        if table[number] >= 0:
            names[table[number]] = word
    words.clear()
    pairs, pair_frequencies = np.empty(0, np.int64), np.empty(0, np.int64)
    if options.ngrams == 2:
        pairs, pair_frequencies = _count_pairs(file.read(table), len(names))
        keep = pair_frequencies >= options.min_df
        pairs, pair_frequencies = pairs[keep], pair_frequencies[keep]
    vocabulary, renumbered = _select(
        names, frequencies[frequent], pairs, pair_frequencies, num_rows, options
    )
    table = np.where(table >= 0, renumbered[table], -1).astype(np.int32)
    return vocabulary, file.read(table)


def _fit_hashing(texts: Iterable[str], options: FeatureConfig, file: WordFile) -> Vocabulary:
    frequencies = np.zeros(1 << options.hash_bits, np.int32)
    num_rows = 0
    for chunk in file.write(word_chunks(texts, hashed_words())):
        _, features, _ = count_hashed(chunk, options)
        distinct, counts = runs(np.sort(features))
        frequencies[distinct] += counts.astype(np.int32)
        num_rows += len(chunk.lengths)
    if not frequencies.any():
        raise DataError(f"expected words in the training texts, got none in {num_rows} texts")
    return Vocabulary(options, num_rows, frequencies)


def _count_words(
    texts: Iterable[str], file: WordFile
) -> tuple[dict[str, int], np.ndarray, int]:  # ids of the live words, rows that have each id, N
    words: defaultdict[str, int] = defaultdict()
    words.default_factory = count().__next__
    frequencies = np.zeros(1 << 16, np.int32)
    num_ids = num_rows = 0
    for chunk in file.write(word_chunks(texts, words.__getitem__)):
        keys, _ = runs(np.sort((chunk.ids << ROW_BITS) | row_ids(chunk)))
        distinct, counts = runs(keys >> ROW_BITS)
        num_ids = max(num_ids, int(distinct[-1]) + 1) if len(distinct) else num_ids
        while num_ids > len(frequencies):
            frequencies = np.concatenate([frequencies, np.zeros_like(frequencies)])
        frequencies[distinct] += counts.astype(np.int32)
        num_rows += len(chunk.lengths)
        if len(words) > _MAX_LIVE_WORDS:
            _forget_rarest_(words, frequencies)
    live = np.zeros(num_ids, bool)
    live[np.fromiter(words.values(), np.int64, len(words))] = True
    return words, np.where(live, frequencies[:num_ids], 0), num_rows


def _forget_rarest_(words: defaultdict[str, int], frequencies: np.ndarray) -> None:
    """Drop words until at most half of the limit is left; a word that returns starts anew."""
    threshold = _threshold(
        frequencies[np.fromiter(words.values(), np.int64, len(words))], _MAX_LIVE_WORDS // 2
    )
    kept = {word: number for word, number in words.items() if frequencies[number] > threshold}
    words.clear()
    words.update(kept)


def _count_pairs(
    chunks: Iterable[WordChunk], num_words: int
) -> tuple[np.ndarray, np.ndarray]:  # pairs [P] int64 sorted, rows that have each [P] int64
    pairs, frequencies = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    for chunk in chunks:
        keys, _ = runs(pair_keys(chunk, num_words))
        waiting.append(runs((keys >> np.uint64(ROW_BITS)).astype(np.int64)))
        size += len(waiting[-1][0])
        if size >= _MERGE_SIZE:
            pairs, frequencies = _merge([(pairs, frequencies), *waiting])
            waiting, size = [], 0
            if len(pairs) > _MAX_PAIRS:
                keep = frequencies > _threshold(frequencies, _MAX_PAIRS // 2)
                pairs, frequencies = pairs[keep], frequencies[keep]
    return _merge([(pairs, frequencies), *waiting])


def _merge(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Add up the counts of sorted (values, counts); values of the result are distinct, sorted."""
    values = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    order = np.argsort(values, kind="stable")  # merges sorted runs
    distinct, repeats = runs(values[order])
    if not len(distinct):
        return values, counts
    return distinct, np.add.reduceat(counts[order], np.cumsum(repeats) - repeats)


def _threshold(frequencies: np.ndarray, keep: int) -> int:
    """The smallest frequency such that at most `keep` are greater."""
    return int(np.partition(frequencies, len(frequencies) - keep - 1)[len(frequencies) - keep - 1])


def _at_least(frequencies: np.ndarray, min_df: int, max_features: int) -> np.ndarray:
    """Ids with a frequency of min_df or more that can still be among the max_features first.

    A pair is no more frequent than its words, so the same ids bound the words of pairs.
    """
    lowest = min_df
    if len(frequencies) > max_features:
        lowest = max(lowest, int(-np.partition(-frequencies, max_features - 1)[max_features - 1]))
    return np.flatnonzero(frequencies >= lowest)


def _select(
    names: list[str],  # [W]
    frequencies: np.ndarray,  # [W]
    pairs: np.ndarray,  # [P] sorted
    pair_frequencies: np.ndarray,  # [P]
    num_rows: int,
    options: FeatureConfig,
) -> tuple[Vocabulary, np.ndarray]:
    """The most frequent n-grams, ties by their words; and the new id [W] of each word, -1: gone."""
    num_words = len(names)
    if not num_words:
        raise DataError(
            f"expected words that occur in at least min_df = {options.min_df} training texts, "
            f"got none in {num_rows} texts"
        )
    rank = np.empty(num_words, np.int64)
    rank[sorted(range(num_words), key=names.__getitem__)] = np.arange(num_words)
    counts = np.concatenate([frequencies.astype(np.int64), pair_frequencies])
    first = np.concatenate([rank, rank[pairs // num_words]])
    second = np.concatenate([np.full(num_words, -1), rank[pairs % num_words]])
    chosen = np.lexsort((second, first, -counts))[: options.max_features]
    feature = np.full(len(counts), -1, np.int32)
    feature[chosen] = np.arange(len(chosen), dtype=np.int32)

    word_features, pair_features = feature[:num_words], feature[num_words:]
    used = pair_features >= 0
    kept_pairs, kept_features = pairs[used], pair_features[used]
    needed = word_features >= 0
    needed[kept_pairs // num_words] = True
    needed[kept_pairs % num_words] = True
    renumbered = np.where(needed, np.cumsum(needed) - 1, -1)
    num_needed = int(needed.sum())
    # Renumbering keeps the order of words, hence of pairs: they stay sorted.
    moved = renumbered[kept_pairs // num_words] * num_needed + renumbered[kept_pairs % num_words]
    kept_names = [name for name, keep in zip(names, needed.tolist(), strict=True) if keep]
    ngrams = NGrams(kept_names, word_features[needed], moved, kept_features)
    return Vocabulary(options, num_rows, counts[chosen].astype(np.int32), ngrams), renumbered
