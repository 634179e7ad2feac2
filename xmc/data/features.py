"""What turns texts into encoder inputs: a vocabulary (bags) or a tokenizer (token ids).

Both have `num_features`, `transform(texts)`, `encode(texts)`, `digest()`, `options` and
`save(folder)`.
"""

from __future__ import annotations

from pathlib import Path

from xmc.config import FeatureConfig
from xmc.data.encoded import Features, fit_cached_vocabulary
from xmc.data.formats import DataError
from xmc.data.tokens import TextTokenizer
from xmc.data.vocab import Vocabulary

__all__ = ["Features", "fit_features", "load_features"]


def fit_features(
    options: FeatureConfig,
    folder: str | Path,  # canonical data folder
    *,
    model: str = "",  # folder or hub name of the transformer, for tokens
    cache: str | Path | None = None,
) -> Features:
    """A vocabulary fitted to the training split, or the tokenizer of a transformer.

    The vocabulary comes from the cache where it holds one of the same texts and options.
    """
    if options.kind == "tokens":
        return TextTokenizer.from_pretrained(model, options)
    return fit_cached_vocabulary(folder, options, cache=cache)


def load_features(folder: str | Path, options: FeatureConfig) -> Features:
    """Read what `save` wrote. Raises DataError where it is missing, damaged or of other options."""
    if options.kind == "tokens":
        return TextTokenizer.from_pretrained(folder, options)
    vocabulary = Vocabulary.load(folder)
    if vocabulary.options != options:
        raise DataError(f"{folder}: expected features of {options}, got {vocabulary.options}")
    return vocabulary
