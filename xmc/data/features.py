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
from xmc.data.vocab import Vocabulary, bag_options
from xmc.nn.warm_start import bag_model_folder

__all__ = ["Features", "fit_features", "load_features"]


def fit_features(
    options: FeatureConfig,
    folder: str | Path,  # canonical data folder
    *,
    model: str = "",  # where the encoder starts from: its tokenizer or vocabulary is used
    cache: str | Path | None = None,
) -> Features:
    """A vocabulary fitted to the training split, or the tokenizer of a transformer.

    The vocabulary comes from the cache where it holds one of the same texts and options, and from
    `model` where that lends its encoder: raises DataError where its options are others.
    """
    if options.kind == "tokens":
        return TextTokenizer.from_pretrained(model, options)
    if model:
        source = bag_model_folder(model) / "features"
        vocabulary = Vocabulary.load(source)
        if bag_options(vocabulary.options) != bag_options(options):
            raise DataError(
                f"{source}: expected features of {bag_options(options)}, as the recipe has them, "
                f"got {bag_options(vocabulary.options)}"
            )
        # Options that bags do not depend on are the recipe's.
        return Vocabulary(options, vocabulary.num_rows, vocabulary.frequencies, vocabulary.ngrams)
    return fit_cached_vocabulary(folder, options, cache=cache)


def load_features(folder: str | Path, options: FeatureConfig) -> Features:
    """Read what `save` wrote. Raises DataError where it is missing, damaged or of other options."""
    if options.kind == "tokens":
        return TextTokenizer.from_pretrained(folder, options)
    vocabulary = Vocabulary.load(folder)
    if vocabulary.options != options:
        raise DataError(f"{folder}: expected features of {options}, got {vocabulary.options}")
    return vocabulary
