"""`describe` counts what is there; the table and the plot show it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from xmc.data.formats import DataError, Document, Label, write_folder
from xmc.data.info import FolderInfo, describe, plot_frequencies, render

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eurlex57k"


@pytest.fixture
def info(tmp_path: Path) -> FolderInfo:
    trn = [Document(f"a{n}", "t", f"text {n}", [0]) for n in range(8)]
    trn += [Document("b", "t", "text 0", [0, 1]), Document("c", "", "x" * 500, [1, 2])]
    trn += [Document("d", "none", "", [])]
    tst = [
        Document("e", "t", "text 3", [0, 3]),
        Document("f", "t", "new", [3]),
        Document("g", "t", "old", [1, 2, 4]),
    ]
    titles = ["a", "b", "b", "", "e"]
    labels = [Label(str(number), title) for number, title in enumerate(titles)]
    filters = {"tst": np.array([[0, 3], [1, 0]])}
    write_folder(tmp_path / "data", {"trn": trn, "tst": tst}, labels, filters=filters)
    return describe(tmp_path / "data")


def test_counts(info: FolderInfo) -> None:
    assert (info.num_labels, info.untitled_labels, info.shared_titles) == (5, 1, 2)
    trn, tst = info.splits
    assert (trn.name, trn.documents, trn.label_uses, trn.labels) == ("trn", 11, 12, 3)
    assert (trn.without_labels, trn.repeated_texts, trn.texts_in_training) == (1, 1, 0)
    assert trn.longest[0] == (500, "c")
    assert [chars for chars, _ in trn.longest] == [500, 7, 7]
    assert trn.median_chars == 7
    assert (tst.name, tst.documents, tst.label_uses, tst.labels) == ("tst", 3, 6, 5)
    assert (tst.texts_in_training, tst.unseen_labels, tst.unseen_uses) == (1, 2, 3)
    assert tst.filter_pairs == 2
    assert info.frequencies.tolist() == [9, 2, 1, 0, 0]


def test_histogram_bins_double(info: FolderInfo) -> None:
    assert info.histogram() == [("0", 2), ("1", 1), ("2-3", 1), ("4-7", 0), ("8-15", 1)]


def test_the_table_shows_the_numbers(info: FolderInfo) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(info))
    lines = [line.split() for line in console.export_text().splitlines()]
    found = [[word for word in line if word not in "│┃"] for line in lines]
    assert ["documents", "11", "3"] in found
    assert ["labels", "per", "document", "1.09", "2.00"] in found
    assert ["share", "of", "label", "uses", "unseen", "50.00%"] in found
    assert ["filter", "pairs", "0", "2"] in found
    assert ["0", "2", "#" * 40] in found
    assert ["8-15", "1", "#" * 20] in found
    assert ["trn", "500", "c"] in found


def test_repeated_indices_are_counted_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "trn.json").write_text('{"title": "t", "target_ind": [0, 0, 0]}\n')
    (tmp_path / "lbl.json").write_text('{"title": "l"}\n')
    found = describe(tmp_path)
    assert found.splits[0].repeated_indices == 2
    assert found.splits[0].label_uses == 1


def test_the_plot_is_a_png(info: FolderInfo, tmp_path: Path) -> None:
    plot_frequencies(info, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: expected a data folder"):
        describe(tmp_path / "nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data/eurlex57k beside the checkout")
def test_eurlex57k_has_its_published_sizes() -> None:
    found = describe(SHARED)
    assert [split.documents for split in found.splits] == [45_000, 6_000, 6_000]
    assert (found.num_labels, found.splits[0].labels) == (4_271, 4_108)
    assert round(found.splits[0].label_uses / 45_000, 2) == 5.07
    # "frequent", "few-shot" and "zero-shot" of Chalkidis et al. 2019
    frequencies = found.frequencies
    groups = ((frequencies >= 50).sum(), ((frequencies > 0) & (frequencies < 50)).sum())
    assert (*groups, (frequencies == 0).sum()) == (746, 3_362, 163)
