"""What exported models weigh, lose and take: sizes, P@k, time to open, time of one query.

    python scripts/bench/exports.py RUN --data DATA [--split validation]   # a trained run
    python scripts/bench/exports.py --labels 1000000                       # synthetic, no quality

Exports a run once for each weight dtype, indices packed, and evaluates it. Opening is everything
from the folder to the first answer in a process that has imported the package and compiled its
kernels; the files are in the page cache. Queries are one text at a time, exact top 10, encoder and
label strings included, after warming up, in turns over all forms. `--labels` builds a bag model
(D = 512, F = 32) of so many labels with random weights. Lines go to
`scripts/bench/results/exports.jsonl`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, append, provenance

import xmc
from xmc.config import from_dict
from xmc.data.formats import read_documents
from xmc.data.vocab_fit import fit_vocabulary
from xmc.heads.classifier import ClassifierHead
from xmc.model import XMCModel, load_model
from xmc.nn.compressed import WeightDtype
from xmc.nn.encoder import BagEncoder

DTYPES: tuple[WeightDtype, ...] = ("float32", "bfloat16", "int8", "int4")
DIM, FAN_IN, WORDS = 512, 32, 20_000  # of synthetic models
QUERIES = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="folder that xmc train wrote")
    parser.add_argument("--data", type=Path, help="the data of the run")
    parser.add_argument("--split", default="validation", help="what to score (default: validation)")
    parser.add_argument("--labels", type=int, help="of a synthetic model, instead of a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="folder of encoded features")
    parser.add_argument("--output", type=Path, default=RESULTS / "exports.jsonl")
    options = parser.parse_args()
    if (options.run is None) == (options.labels is None):
        parser.error("expected a run or --labels")
    if options.run is not None and options.data is None:
        parser.error("expected --data with a run")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        records = measure(options, Path(folder))
    append(options.output, records)
    for record in records:
        print({key: value for key, value in record.items() if key not in provenance()})


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A record per form."""
    if options.labels is None:
        source: Path | XMCModel = options.run
        texts = [d.text for d in islice(read_documents(options.data, "tst"), QUERIES)]
    else:
        source, texts = synthetic(options.labels)
    records = []
    for dtype in DTYPES:
        done = xmc.export(source, folder / dtype, weight_dtype=dtype)
        model = load_model(folder / dtype)
        records.append(
            {
                "what": "exported model",
                "weight_dtype": dtype,
                "labels": len(model.labels),
                "dim": model.config.encoder.dim,
                "fan_in": model.config.head.fan_in,
                **{f"{part}_bytes": size for part, size in done.bytes.items()},
            }
        )
    del source
    predictors = {}
    for dtype, record in zip(DTYPES, records, strict=True):
        xmc.Predictor.load(folder / dtype).predict(texts[:1], k=10)  # compiles
        started = time.perf_counter()
        predictors[dtype] = xmc.Predictor.load(folder / dtype)
        predictors[dtype].predict(texts[:1], k=10)
        record["open_seconds"] = time.perf_counter() - started
    for dtype, record in zip(DTYPES, records, strict=True):
        record |= quality(options, folder / dtype)
    times = in_turns({d: lambda t, p=p: p.predict([t], k=10) for d, p in predictors.items()}, texts)
    for dtype, record in zip(DTYPES, records, strict=True):
        cuts = statistics.quantiles(times[dtype], n=100)
        record["query_ms"] = {"p50": 1e3 * cuts[49], "p95": 1e3 * cuts[94], "p99": 1e3 * cuts[98]}
        record |= provenance()
    return records


def quality(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.labels is not None:
        return {}
    scores = xmc.evaluate(folder, options.split, data=options.data, cache=options.cache).values
    return {"split": options.split, **{f"P@{k}": scores[f"P@{k}"] for k in (1, 3, 5)}}


def in_turns(
    forms: dict[WeightDtype, Callable[[str], object]], texts: list[str]
) -> dict[WeightDtype, list[float]]:
    """Seconds of each form on each text, one form after the other on every text."""
    times: dict[WeightDtype, list[float]] = {form: [] for form in forms}
    for text in texts:
        for form, run in forms.items():
            started = time.perf_counter()
            run(text)
            times[form].append(time.perf_counter() - started)
    return times


def synthetic(num_labels: int) -> tuple[XMCModel, list[str]]:
    """A bag model with random weights, and texts of 20 of its words."""
    config = from_dict(
        {"features": {"min_df": 1}, "encoder": {"dim": DIM}, "head": {"fan_in": FAN_IN}},
        source="exports.py",
    )
    torch.manual_seed(0)
    vocabulary = [f"word{number}" for number in range(WORDS)]
    with tempfile.TemporaryDirectory() as folder:
        spill = Path(folder) / "words"
        features, _ = fit_vocabulary([" ".join(vocabulary)] * 2, config.features, spill)
    encoder = BagEncoder(features.num_features, DIM)
    head = ClassifierHead.from_config(DIM, num_labels, config.head)
    labels = [f"a label with a name of some length, number {n}" for n in range(num_labels)]
    generator = random.Random(0)
    texts = [" ".join(generator.sample(vocabulary, 20)) for _ in range(QUERIES)]
    return XMCModel(config, features, labels, encoder, head), texts


if __name__ == "__main__":
    main()
