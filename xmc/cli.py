"""The `xmc` command: data, train, evaluate, predict."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from xmc.config import shipped_recipes

app = typer.Typer(
    name="xmc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Build and inspect data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

_INTERRUPTED = 130  # the shell's exit code for a command ended by Ctrl-C

Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of encoded features, reused between runs (default: ~/.cache/xmc)."),
]


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
) -> None:
    """Extreme multi-label classification with sparse output layers."""
    if show_version:
        print(version("xmc-toolkit"))
        raise typer.Exit


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
    """Train an encoder and its classifier; the best epoch is kept in OUT/model.

    Ctrl-C writes a checkpoint first; the same command with --resume goes on from it, and ends with
    the same result as a run that was never interrupted.
    """
    from xmc.training.run import train as run_training
    from xmc.training.trainer import Interrupted

    try:
        run_training(
            recipe, data=data, out=out, overrides=settings or [], resume=resume, cache=cache
        )
    except Interrupted as stop:
        _note(f"{stop}; add --resume to the same command to go on")
        raise typer.Exit(_INTERRUPTED) from None
    _note(f"best epoch in {out / 'model'}; next: xmc evaluate {out} --split test")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    data: Annotated[
        Path | None,
        typer.Option(help="Another data folder with the same labels (default: the run's own)."),
    ] = None,
    k: Annotated[str, typer.Option("-k", help="Ranks, separated by commas.")] = "1,3,5,10",
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
        typer.Option("--json", help="Where to write the scores (default: in the run folder)."),
    ] = None,
    cache: Cache = None,
) -> None:
    """Print P@k, nDCG@k, recall and propensity-scored metrics, and write them as JSON."""
    from xmc.evaluation.report import render, to_json
    from xmc.serving.evaluate import evaluate as evaluate_run

    with _rows_bar(f"evaluate {split}") as progress:
        scores = evaluate_run(
            run,
            split,
            data=data,
            ks=_ranks(k),
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
    Console().print(render(scores), soft_wrap=True)
    path = json_path or run / f"{'baseline' if baseline else 'evaluation'}-{split}.json"
    to_json(scores, path)
    _note(f"written to {path}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or a model folder.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text; repeatable. Without it, one text per line of standard input."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Labels per text.")] = 5,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl", help='Standard input is JSON lines with "text", or "title" and "content".'
        ),
    ] = False,
) -> None:
    """Answer texts with labels.

    With --text, a table; from standard input, one JSON object a line: {"text": ..., "labels":
    [{"label": ..., "score": ...}]}. Scores are probabilities for bce, margins for squared_hinge.
    """
    from xmc.serving.predictor import Predictor

    predictor = Predictor.load(run)
    if text:
        for line, answer in zip(text, predictor.predict(text, k), strict=True):
            print(line)
            for label, score in answer:
                print(f"  {score:8.4f}  {label}")
        return
    lines, asked = itertools.tee(_read_texts(jsonl))  # answers come a batch behind the lines
    for line, answer in zip(lines, predictor.stream(asked, k), strict=True):
        labels = [{"label": label, "score": round(score, 6)} for label, score in answer]
        print(json.dumps({"text": line, "labels": labels}, ensure_ascii=False))


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
            console.print(f"    {meaning}", highlight=False, markup=False)


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
    console = Console(stderr=True)
    columns = (TextColumn(what), SpinnerColumn(), TextColumn("{task.completed} rows"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda rows: bar.advance(task, rows)


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'-k: expected ranks such as "1,3,5", got "{text}"') from None
    return ranks


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
        print(f"xmc: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


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
