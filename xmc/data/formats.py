"""The canonical data folder: JSON lines of documents and labels, read and written as streams.

`trn.json.gz`, `tst.json.gz`, optional `val.json.gz`: one object a line with `uid`, `title`,
`content`, `target_ind` (rows of the label file, from 0) and `target_rel`. `lbl.json.gz`: `uid` and
`title`. Optional `filter_labels_train.txt` and `filter_labels_test.txt`: lines
`document_row label_row` of pairs that say nothing, because the label is the document.
The same names without `.gz` are read too.

A file that breaks a rule stops the reading with one `DataError` line; no row is ever skipped.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xmc.files import new_folder

SPLITS = ("trn", "val", "tst")
_ALIASES = {"train": "trn", "validation": "val", "valid": "val", "test": "tst"}
_FILTERS = {"trn": "filter_labels_train.txt", "tst": "filter_labels_test.txt"}
_PAIR = re.compile(rb"\s*([+-]?\d{1,18})\s+([+-]?\d{1,18})\s*", re.ASCII)
_COMPRESSION = 6  # fixed, so that the same input gives the same bytes


class DataError(ValueError):
    """Data that breaks a rule of its format: one line, `file:line: expected ..., got ...`."""


class DataWarning(UserWarning):
    """Data that was read, but not exactly as it stands in the file."""


@dataclass(frozen=True)
class Document:
    """One row of a split."""

    uid: str
    title: str
    content: str
    labels: list[int]  # sorted, distinct rows of the label file
    repeats: int = 0  # label indices that were dropped because the row had them twice

    @property
    def text(self) -> str:
        """What an encoder reads."""
        return f"{self.title}\n{self.content}"


@dataclass(frozen=True)
class Label:
    """One row of the label file."""

    uid: str
    title: str


def split_name(split: str) -> str:
    """`trn`, `val` or `tst`, also from `train`, `validation` and `test`."""
    name = _ALIASES.get(split, split)
    if name not in SPLITS:
        known = ", ".join((*SPLITS, *_ALIASES))
        raise DataError(f"expected a split among {known}, got {split!r}")
    return name


def split_path(folder: str | Path, split: str) -> Path:
    """The file of a split, or of the labels (`lbl`); DataError where there is none."""
    folder = Path(folder)
    name = split if split == "lbl" else split_name(split)
    if not folder.is_dir():
        problem = "a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: expected a data folder, got {problem}")
    found = [path for path in _candidates(folder, name) if path.is_file()]
    if not found:
        raise DataError(f"{folder}: expected {name}.json.gz or {name}.json, got neither")
    if len(found) > 1:
        raise DataError(f"{folder}: expected one of {name}.json.gz and {name}.json, got both")
    return found[0]


def available_splits(folder: str | Path) -> list[str]:
    """The splits that the folder holds, in the order trn, val, tst."""
    found = [s for s in SPLITS if any(p.is_file() for p in _candidates(Path(folder), s))]
    if not found:
        split_path(folder, "trn")  # says what is missing
    return found


def has_split(folder: str | Path, split: str) -> bool:
    """Whether the folder holds this split."""
    return split_name(split) in available_splits(folder)


def filter_path(folder: str | Path, split: str) -> Path | None:
    """The filter file of a split, None where there is none."""
    name = _FILTERS.get(split_name(split))
    path = Path(folder) / name if name else None
    return path if path is not None and path.is_file() else None


def read_documents(
    folder: str | Path,
    split: str,
    *,
    num_labels: int | None = None,  # counted from the label file where it is not given
) -> Iterator[Document]:
    """Stream the documents of a split.

    Label indices that a row repeats are dropped, counted in `Document.repeats` and summed in one
    DataWarning at the end; everything else that is wrong is a DataError.
    """
    path = split_path(folder, split)
    if num_labels is None:
        num_labels = count_labels(folder)
    repeats, first = 0, 0
    for number, row in _objects(path):
        where = f"{path}:{number}"
        title, content = _string(row, "title", where), _string(row, "content", where)
        if title is None and content is None:
            raise DataError(f"{where}: expected title or content, got keys {_keys(row)}")
        labels, dropped = _targets(row, num_labels, where)
        if dropped:
            repeats, first = repeats + dropped, first or number
        uid = _uid(row, number, where)
        yield Document(uid, title or "", content or "", labels, dropped)
    if repeats:
        message = f"{path}: dropped {repeats} repeated label indices, the first in line {first}"
        warnings.warn(message, DataWarning, stacklevel=2)


def read_label_rows(folder: str | Path) -> Iterator[Label]:
    """Stream the label file as it stands; a missing uid becomes the row number."""
    path = split_path(folder, "lbl")
    for number, row in _objects(path):
        where = f"{path}:{number}"
        if "uid" not in row and "title" not in row:
            raise DataError(f"{where}: expected uid or title, got keys {_keys(row)}")
        yield Label(_uid(row, number, where), _string(row, "title", where) or "")


def read_labels(folder: str | Path) -> list[str]:
    """The name of every label: its title, or its uid where the title is empty.

    Titles that several labels share become `title (uid)`, so that a prediction says which.
    """
    names, uids = [], []
    for label in read_label_rows(folder):
        names.append(label.title if label.title.strip() else label.uid)
        uids.append(label.uid)
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{name} ({uid})" if name in shared and name != uid else name
        for name, uid in zip(names, uids, strict=True)
    ]


def count_labels(folder: str | Path) -> int:
    """L, the number of rows of the label file."""
    return sum(1 for _ in read_label_rows(folder))


def read_filter(
    folder: str | Path,
    split: str,
    *,
    num_rows: int | None,  # None: not known yet, no upper bound for document indices
    num_labels: int,
) -> np.ndarray:  # [n, 2] int64: document row, label row; sorted, distinct
    """The pairs of a split that are neither trained nor predicted; empty without a filter file."""
    path = filter_path(folder, split)
    pairs = array("q")
    if path is not None:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                match = _PAIR.fullmatch(line)
                if match is None:
                    raise DataError(
                        f"{path}:{number}: expected two integers (document, label), "
                        f"got {_shorten(line.decode('utf-8', 'replace').rstrip())}"
                    )
                row, label = int(match[1]), int(match[2])
                if row < 0 or (num_rows is not None and row >= num_rows):
                    rule = f"expected a document index in [0, {num_rows or 'number of rows'})"
                    raise DataError(f"{path}:{number}: {rule}, got {row}")
                if not 0 <= label < num_labels:
                    rule = f"expected a label index in [0, {num_labels})"
                    raise DataError(f"{path}:{number}: {rule}, got {label}")
                pairs.extend((row, label))
    return np.unique(np.frombuffer(pairs, dtype=np.int64).reshape(-1, 2), axis=0)


def write_folder(
    folder: str | Path,
    splits: Mapping[str, Iterable[Document]],
    labels: Iterable[Label],
    *,
    filters: Mapping[str, np.ndarray] | None = None,  # split -> [n, 2] document row, label row
) -> None:
    """Write a canonical folder; it appears whole or not at all, and equal input gives equal bytes.

    An existing folder with anything in it is a FileExistsError. Label indices are checked.
    """
    with new_folder(Path(folder)) as work:
        num_labels = 0
        with _gzip_lines(work / "lbl.json.gz") as out:
            for label in labels:
                out.write(_encode({"uid": label.uid, "title": label.title}))
                num_labels += 1
        for split, documents in splits.items():
            with _gzip_lines(work / f"{split_name(split)}.json.gz") as out:
                for document in documents:
                    _check_labels(document, num_labels)
                    out.write(_encode(_row(document)))
        for split, pairs in (filters or {}).items():
            lines = "".join(f"{row} {label}\n" for row, label in pairs.tolist())
            (work / _FILTERS[split_name(split)]).write_text(lines, "utf-8")


def _candidates(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.json.gz", folder / f"{name}.json"]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line of a JSON-lines file as (line number from 1, object)."""
    number = 0
    blank = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    blank = blank or number
                    continue
                if blank:  # blank lines are fine at the end only: rows are counted by line
                    raise DataError(f"{path}:{blank}: expected a JSON object, got an empty line")
                yield number, _object(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = str(error).rstrip(".")
        raise DataError(f"{path}:{number + 1}: expected a whole gzip file, got: {what}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise DataError(f"{where}: expected UTF-8, got {got}") from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}: {_shorten(text.strip())}"
        raise DataError(f"{where}: expected a JSON object, got {got}") from None
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, endless nesting
        raise DataError(f"{where}: expected a JSON object, got {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {_shorten(text.strip())}")
    return row


def _string(row: dict[str, Any], key: str, where: str) -> str | None:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{where}: expected {key} to be a string, got {_shorten(repr(value))}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: expected {key} to be Unicode text, got a lone surrogate"
            ) from None
    return value if key in row else None


def _uid(row: dict[str, Any], number: int, where: str) -> str:
    value = row.get("uid", number - 1)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: expected uid to be a string or an integer, got {_shorten(repr(value))}"
        )
    return value


def _targets(row: dict[str, Any], num_labels: int, where: str) -> tuple[list[int], int]:
    """The distinct labels of a row, sorted, and how many repeats were dropped."""
    labels = row.get("target_ind")
    if not isinstance(labels, list):
        got = _shorten(repr(labels)) if "target_ind" in row else f"keys {_keys(row)}"
        raise DataError(f"{where}: expected target_ind to be a list of label indices, got {got}")
    for label in labels:
        if type(label) is not int:
            raise DataError(
                f"{where}: expected integers in target_ind, got {_shorten(repr(label))}"
            )
        if not 0 <= label < num_labels:
            raise DataError(
                f"{where}: expected label indices in [0, {num_labels}) in target_ind, got {label}"
            )
    relevance = row.get("target_rel")
    if relevance is not None:
        if not isinstance(relevance, list) or len(relevance) != len(labels):
            raise DataError(
                f"{where}: expected target_rel to be a list of {len(labels)} numbers "
                f"like target_ind, got {_shorten(repr(relevance))}"
            )
        for value in relevance:
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise DataError(f"{where}: expected positive numbers in target_rel, got {value!r}")
    distinct = sorted(set(labels))
    return distinct, len(labels) - len(distinct)


def _check_labels(document: Document, num_labels: int) -> None:
    labels = document.labels
    in_range = not labels or (labels[0] >= 0 and labels[-1] < num_labels)
    if labels != sorted(set(labels)) or not in_range:
        raise DataError(
            f"document {document.uid}: expected sorted, distinct label indices "
            f"in [0, {num_labels}), got {_shorten(str(labels))}"
        )


def _row(document: Document) -> dict[str, Any]:
    return {
        "uid": document.uid,
        "title": document.title,
        "content": document.content,
        "target_ind": document.labels,
        "target_rel": [1.0] * len(document.labels),
    }


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


@contextmanager
def _gzip_lines(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file whose bytes depend only on what is written: no name, no time in its header."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", _COMPRESSION, raw, mtime=0) as out:
        yield out


def _keys(row: dict[str, Any]) -> str:
    return _shorten(", ".join(row) or "none")


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
