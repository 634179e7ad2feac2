"""Label strings for texts, from one trained run or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from torch import Tensor

from xmc.distributed.launch import join_ranks
from xmc.model import XMCModel, load_model
from xmc.runs import model_folder
from xmc.serving.ensemble import CANDIDATES, Ensemble
from xmc.types import TopK


class Predictor:
    """Answers with label strings: `Predictor.load("runs/quickstart").predict(["text"], k=5)`."""

    def __init__(self, model: XMCModel | Ensemble) -> None:
        for member in model.members if isinstance(model, Ensemble) else [model]:
            member.eval()
        self.model = model

    @classmethod
    def load(
        cls,
        folder: str | Path | Sequence[str | Path],
        weights: Sequence[float] | None = None,
        *,
        candidates: int = CANDIDATES,
    ) -> Predictor:
        """From a run folder, a model folder or an export; several answer together (`Ensemble`).

        In processes that torchrun started each has a part of the labels: all ask for the same texts
        and have the same answers. Raises ModelError naming a bad or missing file.
        """
        world = join_ranks()
        folders = [folder] if isinstance(folder, str | Path) else list(folder)
        models = [load_model(model_folder(Path(path)), world=world) for path in folders]
        if len(models) > 1:
            return cls(Ensemble(models, weights, candidates=candidates))
        if weights is not None:
            raise ValueError(f"expected several runs with weights {list(weights)}, got one")
        return cls(models[0])

    def predict(self, texts: list[str], k: int = 5) -> list[list[tuple[str, float]]]:
        """The k best labels of each text with their scores, best first.

        The score of a model trained with "bce" is the estimated probability of the label, that of
        "squared_hinge" is the margin (positive: more likely than not); several models give the
        weighted mean of their estimated probabilities.
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
        names = self.model.labels
        iterator = iter(texts)
        while chunk := list(islice(iterator, batch_size)):
            best, scores = self._answer(chunk, min(k, len(names)))
            for row_labels, row_scores in zip(best.labels.tolist(), scores.tolist(), strict=True):
                yield [
                    (names[label], score)
                    for label, score in zip(row_labels, row_scores, strict=True)
                    if label >= 0
                ]

    def _answer(self, texts: list[str], k: int) -> tuple[TopK, Tensor]:
        """The best labels and their scores as they are shown."""
        if isinstance(self.model, Ensemble):
            best = self.model.topk(self.model.transform(texts), k)
            return best, best.scores
        best = self.model.topk(self.model.features.transform(texts), k)
        return best, self.model.shown(best.scores)
