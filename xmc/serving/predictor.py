"""Label strings for texts, from a trained run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from xmc.model import XMCModel, load_model


class Predictor:
    """Answers with label strings: `Predictor.load("runs/quickstart").predict(["text"], k=5)`."""

    def __init__(self, model: XMCModel) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """From a run folder or a model folder. Raises ModelError naming a bad or missing file."""
        path = Path(folder)
        return cls(load_model(path / "model" if (path / "model").is_dir() else path))

    def predict(self, texts: list[str], k: int = 5) -> list[list[tuple[str, float]]]:
        """The k best labels of each text with their scores, best first.

        The score of a model trained with "bce" is the estimated probability of the label, that of
        "squared_hinge" is the margin (positive: more likely than not).
        """
        if isinstance(texts, str):
            raise TypeError(f"expected a list of texts, got one string {texts[:40]!r}")
        return list(self.stream(texts, k))

    def stream(
        self, texts: Iterable[str], k: int = 5, *, batch_size: int = 256
    ) -> Iterator[list[tuple[str, float]]]:
        """`predict` over any number of texts, `batch_size` in memory at a time."""
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        iterator = iter(texts)
        while chunk := list(islice(iterator, batch_size)):
            inputs = self.model.features.transform(chunk)
            best = self.model.topk(inputs, min(k, len(self.model.labels)))
            scores = best.scores
            if self.model.head.loss == "bce":
                scores = torch.sigmoid(scores)
            for row_labels, row_scores in zip(best.labels.tolist(), scores.tolist(), strict=True):
                yield [
                    (self.model.labels[label], score)
                    for label, score in zip(row_labels, row_scores, strict=True)
                    if label >= 0
                ]
