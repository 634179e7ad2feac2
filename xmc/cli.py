"""The `xmc` command: data, plan, train, evaluate, compare, predict, export."""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TextIO, cast, get_args

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from xmc.config import shipped_recipes
from xmc.distributed.torchrun import launched_rank, launched_ranks

app = typer.Typer(
    name="xmc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Build and inspect data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

_ON_RANKS = ("train", "evaluate", "predict")  # commands that several processes run together
_TOO_LARGE = 3  # the exit code of a plan that does not fit
_INTERRUPTED = 130  # the shell's exit code for a command ended by Ctrl-C

Weights = Annotated[
    str | None,
    typer.Option(help="Weights of several runs, such as 0.7,0.3 (default: all alike)."),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of encoded features, reused between runs (default: ~/.cache/xmc)."),
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
) -> None:
    """Extreme multi-label classification with sparse output layers."""
    if show_version:
        print(version("xmc-toolkit"))
        raise typer.Exit
    command = context.invoked_subcommand
    if launched_ranks() > 1 and command not in (None, *_ON_RANKS):
        raise ValueError(
            f"xmc {command}: expected one process, got {launched_ranks()} (torchrun), "
            f"which is for {', '.join(_ON_RANKS)}"
        )


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help=f"A TOML file, or the name of a shipped recipe: {', '.join(shipped_recipes())}."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Data folder (see `xmc data`).")],
    out: Annotated[Path, typer.Option(help="Run folder to write; must not exist yet.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Override a recipe option; repeatable. `xmc options` lists them.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Train an encoder and its classifier, or a dual encoder; the best epoch is kept in OUT/model.

    Ctrl-C writes a checkpoint first; the same command with --resume goes on from it, and ends with
    the same result as a run that was never interrupted.

    On several GPUs, or processes of a CPU: torchrun --nproc-per-node 2 -m xmc train ... Each has a
    part of the classifier, and a share of every batch: the result is that of one process. --resume
    may use another number of them.
    """
    from xmc.distributed.launch import ranks
    from xmc.training.loop import Interrupted
    from xmc.training.run import train as run_training

    try:
        with ranks():
            run_training(
                recipe, data=data, out=out, overrides=settings or [], resume=resume, cache=cache
            )
    except Interrupted as stop:
        _note(f"{stop}; add --resume to the same command to go on")
        raise typer.Exit(_INTERRUPTED) from None
    _note(f"best epoch in {out / 'model'}; next: xmc evaluate {out} --split test")


@app.command()
def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folder; several of the same labels are evaluated together."),
    ],
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    data: Annotated[
        Path | None,
        typer.Option(help="Another data folder with the same labels (default: the run's own)."),
    ] = None,
    weights: Weights = None,
    k: Annotated[
        str | None,
        typer.Option("-k", help="Ranks (default: 1,3,5,10, for a dual encoder 100 too)."),
    ] = None,
    propensity: Annotated[
        str, typer.Option(help="Constants a and b: default, amazon or wikipedia.")
    ] = "default",
    a: Annotated[float | None, typer.Option(help="Propensity constant a (with --b).")] = None,
    b: Annotated[float | None, typer.Option(help="Propensity constant b (with --a).")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Also print F1 of the labels with at least this raw score."),
    ] = None,
    drop_empty: Annotated[
        bool, typer.Option("--drop-empty", help="Leave out rows without labels.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(help="Replicates for 95% intervals (1000 is usual); 0: none.")
    ] = 0,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Score the most frequent labels instead of the model."),
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Where to write the scores (default: in the first run)."),
    ] = None,
    cache: Cache = None,
) -> None:
    """Print P@k, nDCG@k, recall and propensity-scored metrics, and write them as JSON.

    Several runs score the best labels of each of them together: the mean of their probabilities.
    Processes of torchrun share the labels, as in training.
    """
    from xmc.distributed.launch import ranks
    from xmc.evaluation.report import render, to_json
    from xmc.serving.evaluate import evaluate as evaluate_run

    with ranks(), _rows_bar(f"evaluate {split}") as progress:
        scores = evaluate_run(
            runs,
            split,
            data=data,
            weights=_weights(weights),
            ks=None if k is None else _numbers("-k", k, "1,3,5"),
            propensity=propensity,
            a=a,
            b=b,
            threshold=threshold,
            drop_empty=drop_empty,
            bootstrap=bootstrap,
            baseline=baseline,
            cache=cache,
            progress=progress,
        )
    if launched_rank() > 0:
        return
    Console().print(render(scores), soft_wrap=True)
    kind = "baseline" if baseline else "evaluation" if len(runs) == 1 else "ensemble"
    path = json_path or runs[0] / f"{kind}-{split}.json"
    to_json(scores, path)
    _note(f"written to {path}")


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    data: Annotated[Path, typer.Option(help="Data folder (see `xmc data`).")],
    heads: Annotated[
        str,
        typer.Option(
            help="Separated by commas: dense, bottleneck, static, set, rigl, grouped, "
            "grouped-random, pattern; NAME=HEAD gives one another name, for --head-set."
        ),
    ] = "dense,bottleneck,static,set,rigl",
    fan_in: Annotated[
        str | None,
        typer.Option(help="Fan-ins of sparse heads, such as 32,64,128 (default: the recipe's)."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each head.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs and the report (default: runs/compare-RECIPE-DATA)."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="What to score on: validation, or test for the last time.")
    ] = "validation",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Override a recipe option for all heads; repeatable.",
        ),
    ] = None,
    head_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--head-set",
            metavar="HEAD:SECTION.KEY=VALUE",
            help="Override an option for one head (rigl), its NAME, or one line (rigl-64); "
            "repeatable.",
        ),
    ] = None,
    dense_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--dense-set", metavar="SECTION.KEY=VALUE", help="Short for --head-set dense:..."
        ),
    ] = None,
    propensity: Annotated[
        str, typer.Option(help="Constants of PSP@5: default, amazon or wikipedia.")
    ] = "default",
    bootstrap: Annotated[int, typer.Option(help="Replicates for 95% intervals.")] = 1000,
    cache: Cache = None,
) -> None:
    """Train a recipe with several heads under equal steps; one table, compare.json, compare.png.

    A bottleneck is a dense head behind a layer as narrow as makes it the size of the sparse one of
    the same fan-in. Learning rates matter: give each head its own by --head-set. Runs in OUT that
    are finished are not trained again, those that were stopped go on.

    What one option does: --heads static,aux=static --head-set aux:auxiliary.kind=clusters
    """
    from xmc.comparison.compare import PLOT, REPORT
    from xmc.comparison.compare import compare as run_comparison
    from xmc.comparison.report import render
    from xmc.training.loop import Interrupted

    folder = out or Path("runs") / f"compare-{Path(recipe).stem}-{data.name}"
    own = [f"dense:{setting}" for setting in dense_settings or []]
    try:
        comparison = run_comparison(
            recipe,
            data=data,
            out=folder,
            heads=heads.split(","),
            num_seeds=seeds,
            fan_ins=() if fan_in is None else _numbers("--fan-in", fan_in, "32,64,128"),
            settings=settings or [],
            head_settings=[*own, *(head_settings or [])],
            split=split,
            propensity=propensity,
            bootstrap=bootstrap,
            cache=cache,
            note=_note,
        )
    except Interrupted as stop:
        _note(f"{stop}; the same command goes on")
        raise typer.Exit(_INTERRUPTED) from None
    Console().print(render(comparison), soft_wrap=True)
    _note(f"written to {folder / REPORT} and {folder / PLOT}")


@app.command()
def predict(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folder, or a model folder; several answer together."),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text; repeatable. Without it, one text per line of standard input."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Labels per text.")] = 5,
    weights: Weights = None,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl", help='Standard input is JSON lines with "text", or "title" and "content".'
        ),
    ] = False,
) -> None:
    """Answer texts with labels.

    With --text, a table; from standard input, one JSON object a line: {"text": ..., "labels":
    [{"label": ..., "score": ...}]}. Scores are probabilities for bce and of several runs, margins
    for squared_hinge, cosines for a dual encoder. Processes of torchrun share the labels.
    """
    from xmc.distributed.launch import from_rank0, ranks
    from xmc.serving.predictor import Predictor

    with ranks() as world:
        predictor = Predictor.load(runs, _weights(weights))
        if text:
            answers = predictor.predict(text, k)
            for line, answer in zip(text if world.rank == 0 else (), answers, strict=False):
                print(line)
                for label, score in answer:
                    print(f"  {score:8.4f}  {label}")
            return
        # Answers come a batch behind the lines.
        lines, asked = itertools.tee(from_rank0(_read_texts(jsonl), world))
        for line, answer in zip(lines, predictor.stream(asked, k), strict=True):
            labels = [{"label": label, "score": round(score, 6)} for label, score in answer]
            if world.rank == 0:
                print(json.dumps({"text": line, "labels": labels}, ensure_ascii=False))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or a model folder.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist or be empty.")],
    weight_dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, int8 or int4: classifier and table of a bag encoder."
        ),
    ] = "int8",
    packed: Annotated[
        bool, typer.Option("--packed/--plain", help="Indices of log2 D bits, or as trained.")
    ] = True,
) -> None:
    """Write a small model for prediction: `xmc predict OUT`, `xmc evaluate OUT --data DATA`.

    It is read as it is stored, into memory that the system shares between processes and drops when
    it likes. int8 rounds every weight to 1/254 of its label's range, int4 to 1/14.
    """
    from xmc.nn.compressed import WeightDtype
    from xmc.serving.export import export as export_model

    if weight_dtype not in get_args(WeightDtype):
        known = ", ".join(get_args(WeightDtype))
        raise ValueError(f"--weight-dtype: expected one of {known}, got {weight_dtype}")
    done = export_model(run, out, weight_dtype=cast(WeightDtype, weight_dtype), packed=packed)
    table = Table("part", "size", title=f"{out}: {done.total / 1e6:,.1f} MB")
    for part, size in done.bytes.items():
        table.add_row(part, f"{size / 1e6:,.1f} MB")
    Console().print(table)


@app.command()
def plan(
    recipe: Annotated[
        str,
        typer.Argument(help=f"A TOML file, or a shipped recipe: {', '.join(shipped_recipes())}."),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Data folder; encoded into the cache, as training does.")
    ] = None,
    labels: Annotated[int | None, typer.Option(min=1, help="L, instead of --data.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="N, documents, with --labels (default: 100000).")
    ] = None,
    positives_per_row: Annotated[
        float | None,
        typer.Option(min=0, help="Labels of a document, with --labels (default: 5)."),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option(min=1, help="V, with --labels and a tf-idf vocabulary."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="As for `xmc train`."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda (default: train.device).")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What to fit into, such as 24GB or 16GiB (default: the device's own)."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Time parts of a step, two seconds (CPU)."),
    ] = True,
    ranks: Annotated[
        str | None,
        typer.Option(help="Plan for so many processes (torchrun): 8, or 1,8,64, or 1..1000."),
    ] = None,
    weak: Annotated[
        bool,
        typer.Option("--weak/--strong", help="With --ranks, keep the rows of a rank or of a step."),
    ] = False,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            help="Of a rank's network (default: 10Gbit/s on CPUs, 25GB/s on GPUs, assumed)."
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Of a message (default: 50us on CPUs, 20us on GPUs, assumed)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --ranks, draw memory and time over ranks (PNG).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    cache: Cache = None,
) -> None:
    """Predict memory and time of a training before it starts, and say what to change.

    Sizes come from --data, or from numbers: `xmc plan RECIPE --labels 670000 --rows 490000`.
    Predicted are the peak of training and of prediction by component, the bytes of a label and of a
    dense classifier beside it, and the time of a step (run in parts on this machine). Memory is
    that of the process on a CPU, of the card on a GPU, where nothing has been measured yet.

    With --ranks, each of several processes has a part of the labels: memory of one, what it tells
    the others, time of a step, and the smallest number of them that fits --memory:
    `xmc plan RECIPE --labels 100000000 --ranks 1,8,64 --memory 16GB --device cuda`.

    Exit code: 0 fits, 3 does not fit (with the settings to change, first things first).
    """
    from xmc.training import plan_report, scale_report
    from xmc.training.planner import plan_recipe
    from xmc.training.scale_command import plan_ranks

    console = Console(stderr=True)
    with console.status("planning", spinner="dots"):  # shown on a terminal only
        result = plan_recipe(
            recipe,
            overrides=settings or [],
            data=data,
            num_labels=labels,
            num_features=features,
            num_rows=rows,
            positives_per_row=positives_per_row,
            device=device,
            memory=memory,
            measure=measure,
            cache=cache,
        )
        scale = plan_ranks(
            result, ranks, weak=weak, bandwidth=bandwidth, latency=latency, plot=plot
        )
    report, found = (plan_report, result) if scale is None else (scale_report, scale)
    if as_json:
        print(json.dumps(report.to_dict(found), indent=2))
    else:
        Console().print(report.render(found))
    if found.fits is False:
        raise typer.Exit(_TOO_LARGE)


@app.command()
def options(
    recipe: Annotated[
        str | None, typer.Argument(help="Show the values of this recipe instead of the defaults.")
    ] = None,
) -> None:
    """List every option of a recipe with its value and meaning."""
    from xmc.config import describe_options, load_recipe

    console = Console(soft_wrap=not sys.stdout.isatty())
    for name, value, meaning in describe_options(load_recipe(recipe) if recipe else None):
        console.print(f"[bold]{name}[/bold] = {json.dumps(value)}", highlight=False)
        if meaning:
            indented = textwrap.fill(
                meaning,
                width=console.width if sys.stdout.isatty() else len(meaning) + 5,
                initial_indent="    ",
                subsequent_indent="    ",
            )
            console.print(indented, highlight=False, markup=False)


@data_app.command()
def build(
    name: Annotated[str, typer.Argument(help="pydoc: the Python code installed here.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    package: Annotated[
        list[str] | None, typer.Option(help="Read this installed package too; repeatable.")
    ] = None,
) -> None:
    """Build an embedded data set.

    pydoc: a document is a function's docstring, its labels are the functions its body calls.
    Nothing is downloaded, imported or run.
    """
    from xmc.data.pydoc import DEFAULT_PACKAGES, build_pydoc

    if name != "pydoc":
        raise ValueError(f'xmc data build: expected pydoc, got "{name}"')
    report = build_pydoc(out, packages=(*DEFAULT_PACKAGES, *(package or ())))
    print(report.render())


@data_app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Data folder.")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the label frequencies into this PNG.")
    ] = None,
) -> None:
    """Show sizes, label frequencies, longest texts and labels never seen in training."""
    from xmc.data.info import describe, plot_frequencies, render

    description = describe(folder)
    Console().print(render(description))
    if plot is not None:
        plot_frequencies(description, plot)
        _note(f"written to {plot}")


@contextmanager
def _rows_bar(what: str) -> Iterator[Callable[[int], object]]:
    """A count of rows with their rate while a block runs, on a terminal only."""
    console = Console(stderr=True, quiet=launched_rank() > 0)
    columns = (TextColumn(what), SpinnerColumn(), TextColumn("{task.completed} rows"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda rows: bar.advance(task, rows)


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'{option}: expected numbers such as "{example}", got "{text}"') from None


def _weights(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'--weights: expected numbers such as "0.7,0.3", got "{text}"') from None


def _read_texts(jsonl: bool) -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input:{number}: not UTF-8: {error.reason}") from None
        yield _text_of(line, number) if jsonl else line


def _text_of(line: str, number: int) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"standard input:{number}: not JSON: {error}") from None
    if isinstance(record, dict):
        parts = [record.get(key) for key in ("text", "title", "content")]
        found = [part for part in parts if isinstance(part, str)]
        if found:
            return "\n".join(found)
    raise ValueError(
        f'standard input:{number}: expected an object with "text", or "title" and "content"'
    )


def _note(message: str) -> None:
    if launched_rank() == 0:
        Console(stderr=True).print(message, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            app()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, which is its right
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if not _expected(error):
            raise
        if _told_elsewhere(error):
            # torchrun ends all ranks when it sees one end: let the one that tells be the first.
            time.sleep(1)
        else:
            rank = f"rank {launched_rank()}: " if launched_ranks() > 1 else ""
            print(f"xmc: {rank}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _told_elsewhere(error: Exception) -> bool:
    """Whether another rank says what was wrong."""
    if launched_ranks() == 1:
        return False
    from xmc.distributed.launch import OtherRankError

    return isinstance(error, OtherRankError)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _note(f"xmc: warning: {message}")


def _expected(error: Exception) -> bool:
    """Our own errors, and the system's about files; anything else is a bug and shows its trace."""
    if isinstance(error, ImportError):
        return error.name is None  # raised by us, to name a missing extra
    return (
        type(error).__module__.startswith("xmc")
        or type(error) is ValueError
        or isinstance(error, OSError)
    )
