"""Bags equal scikit-learn's on the shared case, repeat exactly, and fit in bounded memory."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from xmc.config import FeatureConfig
from xmc.data import vocab_fit
from xmc.data.formats import DataError
from xmc.data.vocab import Vocabulary, count_hashed, hashed_words, word_chunks
from xmc.data.vocab_fit import fit_vocabulary
from xmc.types import Bag

ODD_TEXTS = [
    "",
    "   ",
    "a",
    "Ünïcode ÜNÏCODE straße",
    "np.asarray(as_strided, 3)",
    "x" * 300,
    "a a a a",
]


def corpus(size: int, seed: int = 1) -> list[str]:
    generator = random.Random(seed)
    words = [f"w{number}" for number in range(80)]
    texts = []
    for _ in range(size):
        length = generator.randrange(0, 30)
        texts.append(" ".join(words[int(80 * generator.random() ** 2)] for _ in range(length)))
    return texts


def dense(bag: Bag, num_features: int) -> np.ndarray:
    parts = (bag.weights.numpy(), bag.ids.numpy(), bag.offsets.numpy())
    return scipy.sparse.csr_matrix(parts, shape=(len(bag), num_features)).toarray()


def names_of(vocabulary: Vocabulary) -> list[str]:
    """The n-gram of each feature."""
    ngrams = vocabulary.ngrams
    assert ngrams is not None
    names = {}
    for word, feature in zip(ngrams.words, ngrams.word_features.tolist(), strict=True):
        if feature >= 0:
            names[feature] = word
    for pair, feature in zip(ngrams.pairs.tolist(), ngrams.pair_features.tolist(), strict=True):
        first, second = divmod(pair, len(ngrams.words))
        names[feature] = f"{ngrams.words[first]} {ngrams.words[second]}"
    return [names[feature] for feature in range(vocabulary.num_features)]


def fit(texts: list[str], options: FeatureConfig, folder: Path) -> Vocabulary:
    return fit_vocabulary(texts, options, folder / "words")[0]


@pytest.mark.parametrize("ngrams", [1, 2])
@pytest.mark.parametrize("min_df", [1, 2, 5])
def test_weights_equal_scikit_learn(tmp_path: Path, ngrams: int, min_df: int) -> None:
    texts = [*corpus(300), *ODD_TEXTS, *ODD_TEXTS]
    held_out = [*corpus(50, seed=2), *ODD_TEXTS, "never seen before w1 w2"]
    vocabulary = fit(texts, FeatureConfig(ngrams=ngrams, min_df=min_df), tmp_path)
    theirs = TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"\w+", ngram_range=(1, ngrams), min_df=min_df
    ).fit(texts)
    names = names_of(vocabulary)
    assert sorted(names) == sorted(theirs.vocabulary_)
    columns = [theirs.vocabulary_[name] for name in names]
    for sample in (texts, held_out):
        mine = dense(vocabulary.transform(sample), vocabulary.num_features)
        expected = theirs.transform(sample).toarray()[:, columns]
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)


def test_rows_are_sorted_distinct_and_normalised(tmp_path: Path) -> None:
    texts = corpus(100)
    bag = fit(texts, FeatureConfig(ngrams=2), tmp_path).transform(texts)
    assert (bag.ids.dtype, bag.offsets.dtype, bag.weights.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    for row in range(len(texts)):
        ids = bag.ids[bag.offsets[row] : bag.offsets[row + 1]]
        assert bool((ids[1:] > ids[:-1]).all())
        norm = bag.weights[bag.offsets[row] : bag.offsets[row + 1]].double().square().sum()
        assert len(ids) == 0 or abs(float(norm) - 1) < 1e-6


@pytest.mark.parametrize("limit", [1, 7, 40, 200])
def test_max_features_keeps_the_most_frequent_ties_by_words(tmp_path: Path, limit: int) -> None:
    texts = corpus(120)
    every = fit(texts, FeatureConfig(ngrams=2, min_df=1), tmp_path)
    order = sorted(
        zip((-every.frequencies).tolist(), (name.split() for name in names_of(every)), strict=True)
    )
    some = fit(texts, FeatureConfig(ngrams=2, min_df=1, max_features=limit), tmp_path)
    assert names_of(some) == [" ".join(words) for _, words in order[:limit]]
    assert some.frequencies.tolist() == [-count for count, _ in order[:limit]]


@pytest.mark.parametrize("ngrams", [1, 2])
def test_hashed_weights_equal_a_plain_computation(tmp_path: Path, ngrams: int) -> None:
    texts = [*corpus(60), *ODD_TEXTS]
    options = FeatureConfig(vocabulary="hashing", ngrams=ngrams, hash_bits=10)
    vocabulary = fit(texts, options, tmp_path)
    assert vocabulary.num_features == 1024
    counted = []
    for text in texts:
        chunk = next(word_chunks([text], hashed_words()))
        _, features, terms = count_hashed(chunk, options)
        counted.append(dict(zip(features.tolist(), terms.tolist(), strict=True)))
        words = text.lower().replace(".", " ").replace("(", " ").replace(",", " ").replace(")", " ")
        num_words = len(words.split())
        assert sum(counted[-1].values()) == num_words + (ngrams - 1) * max(num_words - 1, 0)
    frequency = np.zeros(1024)
    for row in counted:
        frequency[list(row)] += 1
    expected = np.zeros((len(texts), 1024))
    for number, row in enumerate(counted):
        for feature, terms in row.items():
            idf = math.log((1 + len(texts)) / (1 + frequency[feature])) + 1
            expected[number, feature] = (1 + math.log(terms)) * idf
        expected[number] /= max(np.linalg.norm(expected[number]), 1e-30)
    np.testing.assert_allclose(dense(vocabulary.transform(texts), 1024), expected, atol=1e-6)


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        "from xmc.config import FeatureConfig;from xmc.data.vocab import *;"
        "o=FeatureConfig(vocabulary='hashing',ngrams=2,hash_bits=20);"
        "c=next(word_chunks(['Grüße an die Welt'],hashed_words()));"
        "print(count_hashed(c,o)[1].tolist())"
    )
    seen = set()
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
        )
        seen.add(result.stdout.strip())
    options = FeatureConfig(vocabulary="hashing", ngrams=2, hash_bits=20)
    chunk = next(word_chunks(["Grüße an die Welt"], hashed_words()))
    assert seen == {str(count_hashed(chunk, options)[1].tolist())}


@pytest.mark.parametrize("kind", ["tfidf", "hashing"])
def test_a_text_has_the_same_bits_alone_and_in_the_training_stream(
    tmp_path: Path, kind: str
) -> None:
    texts = [*corpus(2500), *ODD_TEXTS]  # several chunks
    options = FeatureConfig(vocabulary=kind, ngrams=2, hash_bits=12)
    vocabulary, words = fit_vocabulary(texts, options, tmp_path / "words")
    chunks = list(vocabulary.encode_words(words))
    assert len(chunks) == 3
    ids = np.concatenate([chunk.ids for chunk in chunks])
    values = np.concatenate([chunk.values for chunk in chunks])
    offsets = np.cumsum(np.concatenate([[0], *(chunk.counts for chunk in chunks)]))
    bag = vocabulary.transform(texts)
    assert torch.equal(bag.ids, torch.from_numpy(ids).long())
    assert torch.equal(bag.weights, torch.from_numpy(values))
    assert bag.offsets.tolist() == offsets.tolist()
    for row in (0, 1, 1023, 1024, 2499, 2502, 2506):
        alone = vocabulary.transform([texts[row]])
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        assert torch.equal(alone.ids, bag.ids[part])
        assert torch.equal(alone.weights, bag.weights[part])


@pytest.mark.parametrize("kind", ["tfidf", "hashing"])
def test_a_saved_vocabulary_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    texts = [*corpus(200), *ODD_TEXTS]
    vocabulary = fit(texts, FeatureConfig(vocabulary=kind, ngrams=2, hash_bits=12), tmp_path)
    vocabulary.save(tmp_path / "saved")
    loaded = Vocabulary.load(tmp_path / "saved")
    assert loaded.options == vocabulary.options
    assert loaded.digest() == vocabulary.digest()
    mine, theirs = vocabulary.transform(texts), loaded.transform(texts)
    assert torch.equal(mine.ids, theirs.ids)
    assert torch.equal(mine.weights, theirs.weights)
    other = fit(corpus(199), FeatureConfig(vocabulary=kind, ngrams=2, hash_bits=12), tmp_path)
    assert other.digest() != vocabulary.digest()


def test_transform_of_nothing_is_an_empty_bag(tmp_path: Path) -> None:
    vocabulary = fit(corpus(50), FeatureConfig(), tmp_path)
    empty = vocabulary.transform([])
    assert (len(empty), len(empty.ids)) == (0, 0)
    assert vocabulary.transform(["", "unknownword"]).offsets.tolist() == [0, 0, 0]


def test_texts_without_usable_words_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least min_df = 2 training texts, got none in 2 texts"):
        fit(["one", "two"], FeatureConfig(), tmp_path)
    with pytest.raises(
        DataError, match="expected words in the training texts, got none in 1 texts"
    ):
        fit(["..."], FeatureConfig(vocabulary="hashing"), tmp_path)


def test_a_damaged_vocabulary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="safetensors: expected a vocabulary, got no such file"):
        Vocabulary.load(tmp_path)
    fit(corpus(50), FeatureConfig(), tmp_path).save(tmp_path)
    path = tmp_path / "vocabulary.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="safetensors: expected a vocabulary, got: "):
        Vocabulary.load(tmp_path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(DataError, match="safetensors: expected version 1, got 9"):
        Vocabulary.load(tmp_path)


def test_merging_in_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus(3000)
    whole = fit(texts, FeatureConfig(ngrams=2), tmp_path)
    monkeypatch.setattr(vocab_fit, "_MERGE_SIZE", 50)
    assert fit(texts, FeatureConfig(ngrams=2), tmp_path).digest() == whole.digest()


def test_limits_forget_the_rarest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the n-grams in memory, the most frequent ones keep their exact counts."""
    generator = random.Random(3)
    texts = [
        " ".join([*(f"often{generator.randrange(10)}" for _ in range(8)), f"once{row}"])
        for row in range(4000)
    ]
    options = FeatureConfig(ngrams=2, min_df=50)
    exact = fit(texts, options, tmp_path)
    monkeypatch.setattr(vocab_fit, "_MAX_LIVE_WORDS", 400)
    monkeypatch.setattr(vocab_fit, "_MAX_PAIRS", 400)
    monkeypatch.setattr(vocab_fit, "_MERGE_SIZE", 400)
    bounded = fit(texts, options, tmp_path)
    assert names_of(bounded) == names_of(exact)
    assert len(names_of(exact)) == 110
    assert bounded.frequencies.tolist() == exact.frequencies.tolist()
