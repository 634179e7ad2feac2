"""Train a recipe on a data folder, evaluate it on the test split, append the numbers.

    python scripts/bench/recipe.py eurlex57k_bag --data DATA [--set head.kind=dense] [--seed 1]

Several recipes are trained one after the other and evaluated together; their times are added up.

Appends one JSON line to `scripts/bench/results/recipes.jsonl`: test metrics with their 95%
bootstrap intervals, seconds of training (steps and validations apart), of fitting and encoding the
features, peak memory of the whole process and above `import torch`, size of the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from provenance import RESULTS, append, provenance

from xmc.memory import peak_memory_bytes

METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "R@5", "RP@5", "PSP@1", "PSP@3", "PSP@5")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", metavar="recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--propensity", default="default")
    parser.add_argument("--output", type=Path, default=RESULTS / "recipes.jsonl")
    options = parser.parse_args()
    before = peak_memory_bytes()

    import xmc
    from xmc.config import load_recipe
    from xmc.training.log import read_log
    from xmc.training.run import prepare_data

    settings = [*options.settings, f"train.seed={options.seed}"]
    configs = [load_recipe(recipe, settings) for recipe in options.recipes]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        runs = [Path(folder) / recipe for recipe in options.recipes]
        started = time.perf_counter()
        for config in configs:
            prepare_data(config, options.data, cache)
        feature_seconds = time.perf_counter() - started
        started = time.perf_counter()
        models = [
            xmc.train(config, data=options.data, out=run, cache=cache)
            for config, run in zip(configs, runs, strict=True)
        ]
        wall_seconds = time.perf_counter() - started
        peak = peak_memory_bytes()
        scores = xmc.evaluate(
            runs, "test", cache=cache, bootstrap=1000, propensity=options.propensity
        )
        ends = [read_log(run / "log.jsonl")[-1] for run in runs]
    step_seconds = sum(end["seconds"] for end in ends)
    record = {
        "what": f"recipe {' + '.join(options.recipes)}",
        "data": options.data.name,
        "settings": options.settings,
        "seed": options.seed,
        "labels": len(models[0].labels),
        "features": [model.features.num_features for model in models],
        **{name: round(scores.values[name], 5) for name in METRICS},
        "intervals": {name: scores.intervals[name] for name in METRICS if name[0] == "P"},
        "best_epoch": [end["epoch"] for end in ends],
        "step_seconds": step_seconds,
        "train_wall_seconds": round(wall_seconds, 1),
        "feature_seconds": round(feature_seconds, 1),
        "peak_bytes": peak,
        "peak_bytes_above_torch": peak - before,
        "model_bytes": sum(model.num_bytes() for model in models),
        **provenance(),
    }
    append(options.output, [record])
    print("  ".join(f"{name} {100 * record[name]:.2f}" for name in METRICS))
    print(
        f"features {feature_seconds:.1f} s, steps {step_seconds:.1f} s, "
        f"training with validation {wall_seconds:.1f} s, peak {peak / 2**20:,.0f} MiB, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
