"""The canonical folder: what goes in comes out, and what breaks a rule is named by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from xmc.data.formats import (
    DataError,
    DataWarning,
    Document,
    Label,
    available_splits,
    count_labels,
    has_split,
    read_documents,
    read_filter,
    read_labels,
    write_folder,
)

LABELS = [Label("a", "graphics cards"), Label("b", "mäuse"), Label("c", "")]
DOCUMENTS = [
    Document("1", "One", "first\ttext", [0, 2]),
    Document("2", "Zwei \u2028 ü", "", []),
    Document("3", "", 'quotes " and \\ and \n breaks', [1]),
]


def make(folder: Path, *, filters: dict[str, np.ndarray] | None = None) -> Path:
    splits = {"trn": DOCUMENTS, "test": DOCUMENTS[:1]}
    write_folder(folder, splits, LABELS, filters=filters)
    return folder


def plain(folder: Path, lines: list[str | bytes], *, labels: int = 3) -> Path:
    """A folder of uncompressed files whose training split has exactly these lines."""
    folder.mkdir(exist_ok=True)
    titles = [json.dumps({"uid": str(row), "title": f"label {row}"}) for row in range(labels)]
    (folder / "lbl.json").write_text("\n".join(titles) + "\n", "utf-8")
    data = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
    (folder / "trn.json").write_bytes(data)
    return folder


GOOD = '{"uid": "1", "title": "t", "content": "c", "target_ind": [0]}'


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    assert list(read_documents(folder, "trn")) == DOCUMENTS
    assert list(read_documents(folder, "test")) == DOCUMENTS[:1]
    assert DOCUMENTS[0].text == "One\nfirst\ttext"
    assert read_labels(folder) == ["graphics cards", "mäuse", "c"]
    assert available_splits(folder) == ["trn", "tst"]
    assert has_split(folder, "train")
    assert not has_split(folder, "val")


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "one"), make(tmp_path / "two")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["lbl.json.gz", "trn.json.gz", "tst.json.gz"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    header = (first / "trn.json.gz").read_bytes()[:10]
    assert header[3:8] == bytes(5)  # no file name, no time


def test_rows_follow_the_repositorys_keys(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    with gzip.open(folder / "trn.json.gz") as file:
        row = json.loads(file.readline())
    assert row == {
        "uid": "1",
        "title": "One",
        "content": "first\ttext",
        "target_ind": [0, 2],
        "target_rel": [1.0, 1.0],
    }


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    before = (folder / "trn.json.gz").read_bytes()
    with pytest.raises(FileExistsError, match="already exists"):
        make(folder)
    assert (folder / "trn.json.gz").read_bytes() == before
    bad = [Document("x", "t", "", [3])]
    message = r"document x: expected sorted, distinct label indices in \[0, 3\), got \[3\]"
    with pytest.raises(DataError, match=message):
        write_folder(tmp_path / "other", {"trn": bad}, LABELS)
    with pytest.raises(DataError, match=r"got \[1, 0\]"):
        write_folder(tmp_path / "other", {"trn": [Document("x", "t", "", [1, 0])]}, LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert len(list(read_documents(make(tmp_path / "data"), "trn"))) == 3


def test_files_without_gz_and_rows_with_fewer_keys(tmp_path: Path) -> None:
    folder = plain(
        tmp_path,
        [
            '{"title": "only a title", "target_ind": []}',
            '{"uid": 7, "content": "c", "target_ind": []}',
        ],
    )
    assert list(read_documents(folder, "trn")) == [
        Document("0", "only a title", "", []),
        Document("7", "", "c", []),
    ]
    assert count_labels(folder) == 3


def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    folder = plain(tmp_path, [GOOD, "", "  "])
    assert len(list(read_documents(folder, "trn"))) == 1


def test_repeated_label_indices_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = [
        GOOD,
        '{"title": "t", "target_ind": [2, 0, 2, 2]}',
        '{"title": "t", "target_ind": [1, 1]}',
    ]
    folder = plain(tmp_path, lines)
    message = r"trn\.json: dropped 3 repeated label indices, the first in line 2"
    with pytest.warns(DataWarning, match=message):
        documents = list(read_documents(folder, "trn"))
    assert [document.labels for document in documents] == [[0], [0, 2], [1]]
    assert [document.repeats for document in documents] == [0, 2, 1]


def test_shared_and_empty_titles_stay_usable(tmp_path: Path) -> None:
    labels = [Label("x", "Data"), Label("y", "Data"), Label("z", " "), Label("w", "one")]
    write_folder(tmp_path / "data", {"trn": []}, labels)
    assert read_labels(tmp_path / "data") == ["Data (x)", "Data (y)", "z", "one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{not json}",
            r"expected a JSON object, got Expecting property name .* at column 2: \{not",
        ),
        ("[1, 2]", r"expected a JSON object, got \[1, 2\]"),
        ("", r"expected a JSON object, got an empty line"),
        ("[" * 100_000, r"expected a JSON object, got maximum recursion"),
        (b'{"title": "caf\xe9", "target_ind": []}', r"expected UTF-8, got byte 0xe9 at column 15"),
        (
            '{"title": "\\ud800", "target_ind": []}',
            "expected title to be Unicode .* lone surrogate",
        ),
        ('{"uid": "9", "target_ind": []}', r"expected title or content, got keys uid, target_ind"),
        ('{"title": 5, "target_ind": []}', r"expected title to be a string, got 5"),
        (
            '{"title": "t", "content": null, "target_ind": []}',
            "expected content .* string, got None",
        ),
        ('{"uid": [], "title": "t", "target_ind": []}', r"expected uid .* integer, got \[\]"),
        ('{"uid": true, "title": "t", "target_ind": []}', r"expected uid .* integer, got True"),
        ('{"title": "t"}', r"expected target_ind to be a list of label indices, got keys title"),
        ('{"title": "t", "target_ind": 3}', r"expected target_ind to be a list .* got 3"),
        ('{"title": "t", "target_ind": [1.0]}', r"expected integers in target_ind, got 1\.0"),
        ('{"title": "t", "target_ind": [true]}', r"expected integers in target_ind, got True"),
        ('{"title": "t", "target_ind": ["0"]}', r"expected integers in target_ind, got '0'"),
        ('{"title": "t", "target_ind": [3]}', r"expected label indices in \[0, 3\) .* got 3"),
        ('{"title": "t", "target_ind": [0, -1]}', r"expected label indices in \[0, 3\) .* got -1"),
        (
            '{"title": "t", "target_ind": [0], "target_rel": [1.0, 1.0]}',
            r"expected target_rel to be a list of 1 numbers like target_ind, got \[1\.0, 1\.0\]",
        ),
        (
            '{"title": "t", "target_ind": [0], "target_rel": [0.0]}',
            r"expected positive numbers in target_rel, got 0\.0",
        ),
        (
            '{"title": "t", "target_ind": [0], "target_rel": [NaN]}',
            r"expected positive numbers in target_rel, got nan",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_rule_and_value(
    tmp_path: Path, line: str | bytes, message: str
) -> None:
    folder = plain(tmp_path, [GOOD, line, GOOD])
    with pytest.raises(DataError, match=rf"trn\.json:2: {message}") as caught:
        list(read_documents(folder, "trn"))
    assert "\n" not in str(caught.value)


def test_rows_before_a_bad_one_are_given_first(tmp_path: Path) -> None:
    reader = read_documents(plain(tmp_path, [GOOD, "{"]), "trn")
    assert next(reader).uid == "1"
    with pytest.raises(DataError):
        next(reader)


def test_a_label_without_a_name_is_an_error(tmp_path: Path) -> None:
    folder = plain(tmp_path, [GOOD])
    (folder / "lbl.json").write_text('{"uid": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"lbl\.json:2: expected uid or title, got keys text"):
        read_labels(folder)


def test_a_cut_gzip_file_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    path = folder / "trn.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(
        DataError, match=r"trn\.json\.gz:\d+: expected a whole gzip file, got: Comp"
    ):
        list(read_documents(folder, "trn"))
    path.write_bytes(b"no gzip at all")
    with pytest.raises(
        DataError, match=r"trn\.json\.gz:1: expected a whole gzip file, got: Not a gz"
    ):
        list(read_documents(folder, "trn"))


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: expected a data folder, got no such folder"):
        list(read_documents(tmp_path / "nowhere", "trn"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: expected a data folder, got a file"):
        read_labels(tmp_path / "file")
    with pytest.raises(DataError, match=r"expected trn\.json\.gz or trn\.json, got neither"):
        available_splits(tmp_path)
    folder = make(tmp_path / "data")
    with pytest.raises(DataError, match=r"expected val\.json\.gz or val\.json, got neither"):
        list(read_documents(folder, "validation"))
    with pytest.raises(DataError, match=r"expected a split among trn, val, tst, .* got 'dev'"):
        list(read_documents(folder, "dev"))
    (folder / "trn.json").touch()
    with pytest.raises(DataError, match=r"expected one of trn\.json\.gz and trn\.json, got both"):
        list(read_documents(folder, "trn"))


def test_filters_are_read_sorted_and_distinct(tmp_path: Path) -> None:
    pairs = np.array([[2, 1], [0, 2], [2, 1]])
    folder = make(tmp_path / "data", filters={"trn": pairs})
    found = read_filter(folder, "train", num_rows=3, num_labels=3)
    assert found.tolist() == [[0, 2], [2, 1]]
    assert read_filter(folder, "tst", num_rows=1, num_labels=3).shape == (0, 2)
    assert read_filter(folder, "val", num_rows=1, num_labels=3).shape == (0, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1", "expected two integers (document, label), got 1"),
        ("1 x", "expected two integers (document, label), got 1 x"),
        ("1 2 3", "expected two integers (document, label), got 1 2 3"),
        ("3 0", "expected a document index in [0, 3), got 3"),
        ("-1 0", "expected a document index in [0, 3), got -1"),
        ("0 3", "expected a label index in [0, 3), got 3"),
    ],
)
def test_a_bad_filter_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    folder = make(tmp_path / "data")
    (folder / "filter_labels_test.txt").write_text(f"0 0\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_filter(folder, "tst", num_rows=3, num_labels=3)
    assert str(caught.value).endswith(f"filter_labels_test.txt:2: {message}")
