"""Predicted against measured peak memory of a training on synthetic data.

    python scripts/bench/planned_memory.py [--labels 300000] [--set head.fan_in=32 ...]

A few steps with validation and checkpoint, bag encoder, as `xmc plan` counts them. Measured is the
highest resident set of this process, so one shape a process; run it twice where kernels are not
compiled yet. Linux only. Prints a JSON line and with --output appends it to a file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from planned_training import train_synthetic
from provenance import append, provenance

from xmc.memory import peak_memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=300_000)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    before = peak_memory_bytes()

    trained = train_synthetic(options.labels, options.settings)
    measured = peak_memory_bytes() - before

    from xmc.training.planner import make_plan

    plan = make_plan(trained.config, trained.workload)
    record = {
        "what": "predicted and measured peak memory of a training",
        "labels": options.labels,
        "settings": options.settings,
        "predicted_bytes_above_torch": plan.peak_above_torch,
        "measured_bytes_above_torch": measured,
        "error": round(plan.peak_above_torch / measured - 1, 4),
        **provenance(),
    }
    if options.output:
        append(options.output, [record])
    print(json.dumps(record))


if __name__ == "__main__":
    main()
