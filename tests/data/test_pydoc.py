"""The embedded data set, built from a small package made here."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from xmc.data.formats import DataError, available_splits, read_documents, read_labels
from xmc.data.pydoc import build_pydoc, source_files, split_of, title_of

MODULE = '''
import re
import os.path as p

def parse{n}(text):
    """Parse the text number {n}."""
    return re.compile(text), p.join(text), seldom{n}()

def seldom{n}():
    """The same words everywhere."""
    return p.join("a")

def nothing{n}():
    """Call nothing of interest, {n}."""
    return len("a")
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = tmp_path / "site" / "xmc_made_up"
    for folder in (root, root / "low", root / "tests"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text('raise RuntimeError("nothing is imported")\n')
    for number in range(40):
        (root / "low" / f"mod{number}.py").write_text(MODULE.format(n=number))
    (root / "tests" / "test_x.py").write_text(MODULE.format(n="t"))
    (root / "low" / "test_y.py").write_text(MODULE.format(n="y"))
    (root / "bad.py").write_text("def (:\n")
    (root / "notes.txt").write_text("no source")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "xmc_made_up"


def test_counts_labels_and_splits(tmp_path: Path, package: str) -> None:
    report = build_pydoc(tmp_path / "out", [package])
    assert report.files == 43  # 40 modules, 2 packages, 1 bad
    assert [Path(name).name for name in report.unreadable] == ["bad.py"]
    assert report.functions == 120
    # Titles differ by the number, so that no text repeats; `seldom` is called once by each.
    assert report.repeated_texts == 0
    assert report.rare_labels == 40
    assert report.without_labels == 40
    assert report.labels == 2
    assert report.label_uses == 120
    assert sum(report.documents.values()) == 80
    assert (report.unseen_labels, report.unseen_uses) == (0, 0.0)
    assert read_labels(tmp_path / "out") == ["os.path.join", "re.compile"]
    assert "80 documents" in report.render()
    assert "could not parse 1 files" in report.render()
    assert package not in sys.modules

    for split in available_splits(tmp_path / "out"):
        for document in read_documents(tmp_path / "out", split):
            module, _, own = document.uid.rpartition(".")
            assert split_of(module) == split
            assert document.title == own
            number = own.removeprefix("parse").removeprefix("seldom")
            if own.startswith("parse"):
                assert document.content == f"Parse the text number {number}."
                assert document.labels == [0, 1]
            else:
                assert document.content == "The same words everywhere."
                assert document.labels == [0]


def test_repeated_texts_are_dropped_before_labels_are_counted(tmp_path: Path, package: str) -> None:
    root = Path(source_files(package)[0].path).parent
    for number in range(3):
        text = 'import os\ndef same():\n    """Same."""\n    os.fork()\n'
        (root / f"copy{number}.py").write_text(text)
    report = build_pydoc(tmp_path / "out", [package])
    assert report.repeated_texts == 2
    assert "os.fork" not in read_labels(tmp_path / "out")
    assert "os.fork" in read_labels(_build(tmp_path / "all", package, min_count=1))


def _build(out: Path, package: str, min_count: int) -> Path:
    build_pydoc(out, [package], min_count=min_count)
    return out


def test_a_second_build_gives_the_same_bytes(tmp_path: Path, package: str) -> None:
    for name in ("one", "two"):
        build_pydoc(tmp_path / name, [package])
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["lbl.json.gz", "trn.json.gz", "tst.json.gz", "val.json.gz"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_overloads_get_distinct_uids(tmp_path: Path, package: str) -> None:
    root = Path(source_files(package)[0].path).parent
    text = 'import re\nif 1:\n    def f():\n        """A."""\n        re.compile(1)\n'
    text += 'else:\n    def f():\n        """B."""\n        re.compile(1)\n'
    (root / "twice.py").write_text(text)
    build_pydoc(tmp_path / "out", [package])
    uids = []
    for split in available_splits(tmp_path / "out"):
        uids += [document.uid for document in read_documents(tmp_path / "out", split)]
    assert len(set(uids)) == len(uids) == 82
    assert {"xmc_made_up.twice.f", "xmc_made_up.twice.f#2"} <= set(uids)


def test_an_output_folder_in_use_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    monkeypatch.setattr("xmc.data.pydoc.source_files", lambda package: 1 / 0)
    with pytest.raises(FileExistsError, match="out: already exists"):
        build_pydoc(tmp_path / "out", ["stdlib"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "not_installed_here",
            "package not_installed_here: expected an installed package, found none",
        ),
        ("os.path", "package os.path: expected the name of a top-level package"),
        ("sys", "package sys: expected Python source files, found none"),
        ("__main__", "package __main__: expected"),
    ],
)
def test_packages_without_source_are_named(tmp_path: Path, package: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_pydoc(tmp_path / "out", [package])
    assert not (tmp_path / "out").exists()


def test_nothing_left_is_an_error(tmp_path: Path, package: str) -> None:
    with pytest.raises(
        DataError, match="expected calls made by at least min_count = 999 functions"
    ):
        build_pydoc(tmp_path / "out", [package], min_count=999)
    with pytest.raises(DataError, match="expected min_count of at least 1, got 0"):
        build_pydoc(tmp_path / "out", [package], min_count=0)
    assert not (tmp_path / "out").exists()


def test_standard_library_files_are_found_by_module_name() -> None:
    files = {file.module: file for file in source_files("stdlib")}
    assert files["json"].is_package
    assert files["json.decoder"].path.name == "decoder.py"
    assert not any(module.partition(".")[0] in {"test", "numpy"} for module in files)
    single = source_files("typing_extensions")
    assert [(file.module, file.is_package) for file in single] == [("typing_extensions", False)]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("scipy.optimize.linear_sum_assignment", "linear sum assignment"),
        ("m.Class.__init__", "init"),
        ("m.parseIPAddress2", "parse IP Address2"),
        ("m._", ""),
    ],
)
def test_titles_are_the_words_of_the_name(name: str, title: str) -> None:
    assert title_of(name) == title


def test_splits_are_fixed_and_near_their_shares() -> None:
    modules = [f"module{number}" for number in range(5000)]
    splits = [split_of(module) for module in modules]
    assert splits[:8] == ["trn", "trn", "tst", "trn", "trn", "trn", "trn", "tst"]
    assert 0.78 < splits.count("trn") / 5000 < 0.82
    assert 0.085 < splits.count("val") / 5000 < 0.115
    assert 0.085 < splits.count("tst") / 5000 < 0.115


def test_labels_are_written_in_order_of_their_names(tmp_path: Path, package: str) -> None:
    build_pydoc(tmp_path / "out", [package], min_count=1)
    with gzip.open(tmp_path / "out" / "lbl.json.gz") as file:
        titles = [json.loads(line)["title"] for line in file]
    assert titles == sorted(titles)
    assert "xmc_made_up.low.mod7.seldom7" in titles
