"""Compare the message-driven pipeline with torch's GPipe and 1F1B schedules on the same stages.

    python scripts/bench/pipeline.py [--stages 2,4] [--micro-batches 16] [--runs 10 --plot]
    python scripts/bench/pipeline.py --limits 4,8      (micro-batches let in; default: as many as
                                                        stages, and twice as many)
    python scripts/bench/pipeline.py --table | --plot  (from the lines measured before)

Each rank is a process on the CPU (gloo) with one thread and a cut of a small BERT. A stage sleeps
after its forward pass (10 ms) and before its backward pass (20 ms) for each micro-batch: the sleep
stands for a device's work, so that ranks that share cores still work at the same time. Scenarios:
"even"; "one slow" takes --factor times as long at one of --slow-stages; "one irregular" as long on
the average there, exponentially distributed; "all irregular" has sleeps of variance 1/2 (Gamma) at
all stages. Sleeps are drawn anew for each run, the same for all engines, whose runs take turns.

Reported: the time of a step until the last rank is done, the share of it in which a rank is in
neither a forward nor a backward pass (mean over ranks, median over runs), how many micro-batches
a rank held at most between their two passes, the CPU's time per rank, and what time and share
would be (simulated) for the same sleeps if nothing else took time. Appends a JSON line per engine
and scenario to `scripts/bench/results/pipeline.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch.multiprocessing as mp
from pipeline_settings import SCENARIOS, Setting
from provenance import RESULTS, append, provenance
from records import Record, latest, markdown, read_records, where_from

_FIELDS = ("what", "stages", "micro_batches", "scenario", "slow_stage", "factor")


def main() -> None:
    """Measure, or report what was measured."""
    options = parse()
    if options.measure:
        for stages in options.stages:
            records = measured(options, stages)
            append(options.output, records)
            show(records)
            worst = max(record["gradient_difference"] for record in records)
            if worst > 1e-4:
                sys.exit(f"expected the gradients of GPipe from every engine, got {worst:.1e} off")
    if options.table:
        print(table(read_records(options.output)))
    if options.plot:
        print(f"wrote {plot(read_records(options.output), options.output).name}")


def measured(options: argparse.Namespace, stages: int) -> list[Record]:
    """Lines of all scenarios and engines on so many ranks."""
    from pipeline_jobs import measure  # only here: it takes seconds to load

    settings = [
        Setting(
            stages,
            options.micro_batches,
            scenario,
            forward_ms=options.forward_ms,
            slow_stage=slow,
            factor=options.factor,
        )
        for scenario in options.scenarios
        for slow in (_slow_stages(options, stages) if scenario.startswith("one") else [0])
    ]
    limits = options.limits or [stages, 2 * stages]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, settings, limits, options.runs), nprocs=stages)
        lines = json.loads(Path(folder, "lines.json").read_text())
    about = provenance(packages=["transformers"]) | {"threads": 1}
    each = len(lines) // len(settings)
    return [
        {"operation": "pipeline step", **line, **asdict(settings[number // each]), **about}
        for number, line in enumerate(lines)
    ]


def show(records: Sequence[Record]) -> None:
    """Print lines, a block for each scenario."""
    for (stages, scenario), block in itertools.groupby(
        records, lambda r: (r["stages"], _scenario(r))
    ):
        lines = list(block)
        r = lines[0]
        print(
            f"{stages} stages, {r['micro_batches']} micro-batches, {scenario}, "
            f"{r['forward_ms']:g} ms a forward pass"
        )
        for r in lines:
            ranks = " ".join(f"{share:.0%}" for share in r["idle_share_by_rank"])
            most = max(r["max_in_flight_by_rank"])
            print(
                f"  {r['what']:25s}{r['median_ms']:8.1f} ms "
                f"({r['p20_ms']:.1f} - {r['p80_ms']:.1f}; ideal {r['ideal_ms']:.1f})  "
                f"idle {r['idle_share']:.0%} (ranks {ranks}; ideal {r['ideal_idle_share']:.0%})  "
                f"in flight {most}, CPU {r['cpu_ms']:.0f} ms",
                flush=True,
            )


def table(records: Sequence[Record]) -> str:
    """Markdown of the lines measured last."""
    header = ["ranks", "scenario", "engine", "ms a step (p20 - p80)", "ideal ms", "idle"]
    header += ["ideal idle", "in flight"]
    rows = []
    for r in latest(records, _FIELDS):
        spread = f"{r['median_ms']:.0f} ({r['p20_ms']:.0f} - {r['p80_ms']:.0f})"
        idle, most = f"{r['idle_share']:.0%}", str(max(r["max_in_flight_by_rank"]))
        ideal = f"{r['ideal_ms']:.0f}", f"{r['ideal_idle_share']:.0%}"
        place = str(r["stages"]), _scenario(r), r["what"]
        rows.append([*place, spread, ideal[0], idle, ideal[1], most])
    return f"{where_from(records)}\n\n{markdown(header, rows)}"


def plot(records: Sequence[Record], output: Path) -> Path:
    """Idle share by scenario and engine: bars, dots for the ranks, lines for the ideal."""
    records = latest(records, _FIELDS)
    sizes = sorted({r["stages"] for r in records})
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(7 * len(sizes), 4), squeeze=False, sharey=True
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        here = [r for r in records if r["stages"] == size]
        scenarios = list(dict.fromkeys(_scenario(r) for r in here))
        engines = list(dict.fromkeys(r["what"] for r in here))
        width = 0.8 / len(engines)
        for number, engine in enumerate(engines):
            lines = [r for r in here if r["what"] == engine]
            at = [scenarios.index(_scenario(r)) + (number + 0.5) * width - 0.4 for r in lines]
            axis.bar(at, [100 * r["idle_share"] for r in lines], width * 0.9, label=engine)
            for x, r in zip(at, lines, strict=True):
                shares = [100 * share for share in r["idle_share_by_rank"]]
                axis.plot([x] * len(shares), shares, "k.", markersize=3)
                axis.plot([x], [100 * r["ideal_idle_share"]], "k_", markersize=9)
        labels = [scenario.replace(", ", "\n") for scenario in scenarios]
        axis.set_xticks(range(len(scenarios)), labels, fontsize=8)
        axis.set_title(f"{size} stages, {here[0]['micro_batches']} micro-batches")
        axis.set_ylim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("idle, % of a step (dots: ranks, -: ideal)")
    figure.tight_layout()
    path = output.with_suffix(".png")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _scenario(r: Record) -> str:
    if not r["scenario"].startswith("one"):
        return str(r["scenario"])
    return f"{r['scenario']}, stage {r['slow_stage']}, {r['factor']:g}x"


def _slow_stages(options: argparse.Namespace, stages: int) -> list[int]:
    return sorted({stage % stages for stage in options.slow_stages})


def parse() -> argparse.Namespace:
    """The command line; `measure` says whether anything is to be timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=_numbers, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--scenarios", type=_scenarios, default=list(SCENARIOS))
    parser.add_argument(
        "--slow-stages", type=_stages, default=[0, -1], help="one at a time; -1: the last"
    )
    parser.add_argument("--factor", type=float, default=2.0, help="of the slow stage's sleep")
    parser.add_argument("--forward-ms", type=float, default=10.0, help="of sleep; backward twice")
    parser.add_argument("--limits", type=_numbers, help="micro-batches let in, as 4,8")
    parser.add_argument("--runs", type=int, help="of each engine; default: 10")
    parser.add_argument("--table", action="store_true", help="print markdown")
    parser.add_argument("--plot", action="store_true", help="write a plot beside the lines")
    parser.add_argument("--output", type=Path, default=RESULTS / "pipeline.jsonl")
    options = parser.parse_args()
    if min(options.stages) < 2:
        parser.error(f"expected at least 2 stages, got {min(options.stages)}")
    if options.micro_batches < max(options.stages):
        parser.error(
            f"expected at least as many micro-batches as stages ({max(options.stages)}), "
            f"which 1F1B needs, got {options.micro_batches}"
        )
    options.measure = bool(options.runs) or not (options.table or options.plot)
    options.runs = options.runs or 10
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text}")
    return numbers


def _stages(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _scenarios(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(SCENARIOS)}, by commas, got {name}"
            )
    return names


if __name__ == "__main__":
    main()
