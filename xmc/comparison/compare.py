"""Heads under equal steps: train what is missing, score all on the same documents, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from xmc.comparison.documents import (
    Documents,
    evaluation_set,
    paired_differences,
    score_run,
    training_propensity,
)
from xmc.comparison.heads import Variant, make_variants
from xmc.comparison.plot import plot_comparison
from xmc.comparison.report import Comparison, RunResult, VariantResult, to_dict
from xmc.comparison.runs import Run, is_finished, plan_runs, read_logs, train_apart
from xmc.config import ConfigError
from xmc.data.formats import count_labels, has_split, split_name
from xmc.files import write_json
from xmc.training.run import prepare_data

REPORT = "compare.json"
PLOT = "compare.png"


def compare(
    recipe: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    heads: Sequence[str],
    num_seeds: int = 3,
    fan_ins: Sequence[int] = (),
    settings: Sequence[str] = (),
    head_settings: Sequence[str] = (),
    split: str = "validation",
    propensity: str = "default",
    bootstrap: int = 1000,
    cache: str | Path | None = None,
    note: Callable[[str], object] = print,
) -> Comparison:
    """Train a recipe with every head and seed, and write `compare.json` and `compare.png`.

    Every training is a run folder `OUT/<head>/seed-<seed>` made by `xmc train` in a process of its
    own. Finished ones are not trained again, interrupted ones go on; so a call can be repeated, or
    extended by heads, fan-ins and seeds.

    Args:
        recipe: path of a TOML file or name of a shipped recipe.
        data: canonical data folder.
        heads: see `xmc.comparison.heads.make_variants`, as for `fan_ins` and `head_settings`. They
            are compared with "dense" where it is among them, else with the first.
        num_seeds: seeds from the recipe's `train.seed` on.
        settings: `section.key=value` over the recipe, for every head.
        split: "validation" (rows held out by each seed, where the data has no such split) or
            "test". The best epoch of a run is chosen on validation either way.
        propensity: preset of the constants of PSP@5.
        bootstrap: replicates of the intervals.
        note: told a line before and after every training.

    Raises:
        ConfigError, DataError, ValueError: bad recipe, heads or data, before anything is trained.
        RunError: a folder under `out` that holds another run.
        ComparisonError: a training failed. Interrupted: it was stopped, with a checkpoint.
    """
    data, out = Path(data), Path(out)
    cache = None if cache is None else Path(cache)
    split = _check_split(split)
    if num_seeds < 1:
        raise ConfigError(f"--seeds: expected at least 1, got {num_seeds}")
    if bootstrap < 1:
        raise ConfigError(f"--bootstrap: expected at least 1 replicate, got {bootstrap}")
    variants = make_variants(
        recipe,
        heads,
        count_labels(data),
        fan_ins=fan_ins,
        settings=settings,
        head_settings=head_settings,
    )
    base = variants[0].config  # in rows, steps and features all are alike
    # Builds the features, once for all runs.
    _, train_set, validation_set = prepare_data(base, data, cache)
    if split == "val" and validation_set is None:
        raise ConfigError(
            "train.validation: 0 leaves nothing to compare on, as the data has no val split; "
            "expected a share above 0, or --split test"
        )
    weights = training_propensity(base, data, propensity, cache)
    runs = plan_runs(variants, range(base.train.seed, base.train.seed + num_seeds), out)
    missing = [run for run in runs if not is_finished(run, train_set.key)]
    note(
        f"{len(runs)} runs: {len(variants)} heads x {num_seeds} seeds, "
        f"{len(runs) - len(missing)} finished already"
    )
    clock = _Clock(len(missing))
    scored = {}
    for number, run in enumerate(runs, start=1):
        place = f"[{number}/{len(runs)}] {run.variant.name} seed {run.seed}"
        started = time.perf_counter()
        if run in missing:
            note(f"{place}: training")
            train_apart(run, recipe, data=data, cache=cache)
        documents = evaluation_set(run.config, data, split, cache=cache)
        scored[run] = score_run(run.folder, split, documents, weights)
        if run in missing:
            clock.add(time.perf_counter() - started)
        note(f"{place}: {_scores(scored[run])}{clock.left() if run in missing else ''}")
    baseline = next((variant for variant in variants if variant.head == "dense"), variants[0])
    comparison = Comparison(
        recipe=str(recipe),
        data=data,
        split=split,
        held_out=split == "val" and not has_split(data, "val"),
        num_documents=len(scored[runs[0]].rows),
        baseline=baseline.name,
        propensity=weights,
        replicates=bootstrap,
        results=[_result(variant, baseline, scored, bootstrap) for variant in variants],
    )
    write_json(out / REPORT, to_dict(comparison))
    plot_comparison(comparison, out / PLOT)
    return comparison


def _check_split(split: str) -> str:
    name = split_name(split)
    if name == "trn":
        raise ConfigError(f'--split: expected "validation" or "test", got "{split}"')
    return name


def _result(
    variant: Variant, baseline: Variant, scored: dict[Run, Documents], replicates: int
) -> VariantResult:
    def documents_of(wanted: Variant) -> list[Documents]:
        return [documents for run, documents in scored.items() if run.variant == wanted]

    differences = None
    if variant != baseline:
        differences = paired_differences(
            documents_of(variant), documents_of(baseline), replicates=replicates
        )
    runs = [
        RunResult(run.seed, run.folder, documents.values(), read_logs(run))
        for run, documents in scored.items()
        if run.variant == variant
    ]
    return VariantResult(variant, runs, differences)


class _Clock:
    """Guesses the time that is left by the runs so far."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._spent: list[float] = []

    def add(self, seconds: float) -> None:
        self._spent.append(seconds)

    def left(self) -> str:
        """What to say after a run; the first guess comes with the time of all runs."""
        mean = sum(self._spent) / len(self._spent)
        waiting = self._num_runs - len(self._spent)
        text = f"; {_duration(self._spent[-1])}"
        if len(self._spent) == 1 and waiting:
            text += f", so about {_duration(mean * self._num_runs)} for all {self._num_runs} runs"
        return f"{text}, about {_duration(mean * waiting)} left" if waiting else text


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _scores(documents: Documents) -> str:
    return "  ".join(f"{name} {100 * value:.2f}" for name, value in documents.values().items())
