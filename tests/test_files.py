from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from xmc.files import check_free, new_folder, write_file, write_json


def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {"P@1": 0.5})

    def half(temporary: Path) -> None:
        temporary.write_text("{")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, half)
    assert json.loads(path.read_text()) == {"P@1": 0.5}
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_file_is_complete_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synced first, renamed after: a crash between the two leaves the old file."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    write_json(tmp_path / "a.json", [1])
    assert events == ["sync", "rename", "sync"]  # the content, then the folder's entry
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_a_failed_folder_vanishes(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as work:
            (work / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_whole_and_replaces_only_an_empty_one(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as work:
        (work / "a").write_text("x")
        assert not out.exists()
    assert (out / "a").read_text() == "x"
    with pytest.raises(FileExistsError, match="out: already exists"), new_folder(out):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    with new_folder(empty) as work:
        (work / "b").write_text("y")
    assert (empty / "b").read_text() == "y"


def test_check_free_refuses_files_and_full_folders(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(FileExistsError, match="already exists"):
            check_free(taken)
