"""The embedded data set: say what a Python function should do, get the calls it will need.

A document is a function with a docstring, in the standard library or an installed package. Its
title is the words of its name (`linear_sum_assignment`: "linear sum assignment"), its content the
docstring; its labels are the qualified names that its body calls (`xmc.data.calls`). Source files
are parsed, never imported or run; test folders are left out.

Texts (title and content) that occur again are dropped, then labels of fewer than `min_count`
documents, then documents without labels; all are counted in the report. The split hangs on a hash
of the module, so that near copies within a file stay on one side: about 80% training, 10%
validation, 10% test.
"""

from __future__ import annotations

import gc
import importlib.util
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from xmc.data.calls import Function, functions_of
from xmc.data.formats import SPLITS, DataError, Document, Label, write_folder
from xmc.data.progress import track
from xmc.files import check_free

DEFAULT_PACKAGES = ("stdlib", "numpy", "scipy", "torch", "transformers")
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
_TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class SourceFile(NamedTuple):
    path: Path
    module: str
    is_package: bool


@dataclass(frozen=True)
class BuildReport:
    """What `build_pydoc` read, kept and dropped."""

    folder: Path
    files: int
    unreadable: list[str]  # files that this Python cannot parse
    functions: int  # with a docstring
    repeated_texts: int
    rare_labels: int
    without_labels: int  # documents whose body calls nothing that is kept
    documents: dict[str, int]  # per split
    labels: int
    label_uses: int
    unseen_labels: int  # kept labels that no training document has
    unseen_uses: float  # share of the test documents' labels that no training document has
    seconds: float

    def render(self) -> str:
        """The report as lines of text."""
        total = sum(self.documents.values())
        splits = ", ".join(f"{count:,} {split}" for split, count in self.documents.items())
        lines = [
            f"{self.folder}: {total:,} documents ({splits}), {self.labels:,} labels, "
            f"{self.label_uses / max(total, 1):.2f} labels per document",
            f"read {self.files:,} files with {self.functions:,} documented functions "
            f"in {self.seconds:.1f} s",
            f"dropped {self.repeated_texts:,} repeated texts, {self.rare_labels:,} rare labels, "
            f"{self.without_labels:,} functions without labels",
            f"{self.unseen_labels:,} labels are in no training document; they are "
            f"{self.unseen_uses:.1%} of the test labels",
        ]
        if self.unreadable:
            names = ", ".join(self.unreadable[:3]) + (", ..." if len(self.unreadable) > 3 else "")
            lines.append(f"could not parse {len(self.unreadable):,} files: {names}")
        return "\n".join(lines)


def build_pydoc(
    out: str | Path,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    *,
    min_count: int = 3,
) -> BuildReport:
    """Write the data set of the given packages as a canonical folder.

    The same installed files give the same bytes. Raises FileExistsError where `out` is there and
    not empty, DataError for a package that is not installed or where nothing is left.
    """
    if min_count < 1:
        raise DataError(f"expected min_count of at least 1, got {min_count}")
    started = time.perf_counter()
    out = Path(out)
    check_free(out)  # now, rather than when all the work is done
    files = [file for package in dict.fromkeys(packages) for file in source_files(package)]
    unreadable: list[str] = []
    functions: list[tuple[str, Function]] = []  # module and function
    with _no_garbage_collection():
        for file in track(files, "Reading source files", len(files)):
            found = _read(file)
            if found is None:
                unreadable.append(str(file.path))
            functions.extend((file.module, function) for function in found or ())
    distinct = list(_first_of_each_text(functions))
    counts = Counter(call for _, function in distinct for call in function.calls)
    labels = sorted(call for call, count in counts.items() if count >= min_count)
    if not labels:
        raise DataError(
            f"expected calls made by at least min_count = {min_count} functions, "
            f"got none in {len(files)} source files of {', '.join(packages)}"
        )
    splits = _documents(distinct, labels)
    write_folder(out, splits, (Label(label, label) for label in labels))
    trained = {label for document in splits["trn"] for label in document.labels}
    tested = [label for document in splits["tst"] for label in document.labels]
    return BuildReport(
        folder=out,
        files=len(files),
        unreadable=unreadable,
        functions=len(functions),
        repeated_texts=len(functions) - len(distinct),
        rare_labels=len(counts) - len(labels),
        without_labels=len(distinct) - sum(map(len, splits.values())),
        documents={split: len(documents) for split, documents in splits.items()},
        labels=len(labels),
        label_uses=sum(len(doc.labels) for documents in splits.values() for doc in documents),
        unseen_labels=len(labels) - len(trained),
        unseen_uses=sum(label not in trained for label in tested) / max(len(tested), 1),
        seconds=time.perf_counter() - started,
    )


def source_files(package: str) -> list[SourceFile]:
    """The Python files of an installed package, or of the standard library ("stdlib"), by name.

    The package is located, not imported. Raises DataError where there is no Python source.
    """
    found: list[SourceFile] = []
    for root, prefix in _roots(package):
        if root.is_file():
            found.append(SourceFile(root, package, False))
            continue
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if _SKIPPED.intersection(parts) or _TEST_FILE.fullmatch(path.name):
                continue
            is_package = parts[-1] == "__init__"
            parts = prefix + (parts[:-1] if is_package else parts)
            found.append(SourceFile(path, ".".join(parts), is_package))
    if not found:
        raise DataError(f"package {package}: expected Python source files, found none")
    return sorted(found, key=lambda file: (file.module, str(file.path)))


def split_of(module: str) -> str:
    """The split of all documents of a module: by hash, 80% `trn`, 10% `val`, 10% `tst`."""
    code = int.from_bytes(blake2b(module.encode(), digest_size=4).digest(), "big") / 2**32
    return "trn" if code < 0.8 else "val" if code < 0.9 else "tst"


def title_of(name: str) -> str:
    """The words of a function's own name: `m.Class.parse_IPAddress` is "parse IP Address"."""
    own = name.rpartition(".")[2]
    return " ".join(_CAMEL.sub(" ", own).replace("_", " ").split())


def _roots(package: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders (or the one file) of a package and the qualified name of what they hold."""
    if package == "stdlib":
        yield Path(sysconfig.get_path("stdlib")), ()
        return
    if not package.isidentifier():
        raise DataError(f"package {package}: expected the name of a top-level package")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # __main__ and the like
        spec = None
    if spec is None:
        raise DataError(f"package {package}: expected an installed package, found none")
    if spec.submodule_search_locations is not None:
        for place in spec.submodule_search_locations:
            yield Path(place), (package,)
    elif spec.origin is not None and spec.origin.endswith(".py"):
        yield Path(spec.origin), (package,)


def _read(file: SourceFile) -> list[Function] | None:
    try:
        return functions_of(file.path.read_bytes(), file.module, is_package=file.is_package)
    except (SyntaxError, ValueError, RecursionError):
        return None  # meant for another version of Python, or as a test of its parser


def _first_of_each_text(
    functions: Iterable[tuple[str, Function]],
) -> Iterator[tuple[str, Function]]:
    seen: set[tuple[str, str]] = set()
    for module, function in functions:
        text = (title_of(function.name), function.doc)
        if text not in seen:
            seen.add(text)
            yield module, function


def _documents(
    functions: Iterable[tuple[str, Function]], labels: list[str]
) -> dict[str, list[Document]]:
    """The documents of each split; names that occur again (overloads) get a number."""
    rows = {label: row for row, label in enumerate(labels)}
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    names: Counter[str] = Counter()
    for module, function in functions:
        kept = [rows[call] for call in function.calls if call in rows]
        if kept:
            names[function.name] += 1
            again = f"#{names[function.name]}" if names[function.name] > 1 else ""
            title = title_of(function.name)
            document = Document(function.name + again, title, function.doc, kept)
            splits[split_of(module)].append(document)
    return splits


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are many objects without cycles; looking for some takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
