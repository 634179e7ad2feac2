import io
import json
import math
import os

import pytest
import torch
from rich.console import Console

from xmc.evaluation.metrics import MetricAccumulator
from xmc.evaluation.propensity import Propensity
from xmc.evaluation.report import format_scores, notes, render, render_comparison, to_dict, to_json
from xmc.types import SparseLabels, TopK


def make_scores(**options):
    labels = SparseLabels.from_lists([[0], [1], [], [0, 2]], 5)
    accumulator = MetricAccumulator((1, 2), **options)
    predicted = torch.tensor([[0, 1], [0, 2], [0, 1], [0, -1]])
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, -math.inf]])
    accumulator.update(TopK(scores, predicted), labels)
    return accumulator.compute()


def everything():
    train = SparseLabels.from_lists([[0], [0, 1], [0, 2], [3]], 5)
    return make_scores(
        inv_propensity=Propensity.from_labels(train),
        frequencies=train.frequencies(),
        threshold=1.5,
        bootstrap=50,
        seed=9,
    )


def printed(renderable, **options):
    file = io.StringIO()
    Console(file=file, width=100, **options).print(renderable)
    return file.getvalue()


def test_plain_table_shows_per_cent_and_how_to_read_it():
    assert format_scores(make_scores(), decimals=1) == "\n".join(
        [
            "%              @1    @2",
            "P            50.0  25.0",
            "nDCG         50.0  40.3",  # (1 + 0 + 0 + 1/1.63093) / 4
            "R            37.5  37.5",
            "RP           50.0  37.5",
            "coverage     33.3  33.3",
            "abandonment  50.0  50.0",
            "rows: 4, 1 of them without labels: kept, they count as 0",
            "labels: 5, 3 of them on these rows",
            "short: 1 rows have fewer than 2 predictions",
        ]
    )


def test_notes_name_constants_bins_threshold_and_intervals():
    lines = notes(everything())
    assert (
        'propensity: a = 0.55, b = 1.5, N = 4 (preset "default"; '
        "N and label counts of the training rows)" in lines
    )
    assert (
        "bins: head 1, torso 1, tail 3 labels, each about a third of the training occurrences"
        in lines
    )
    assert "F1: labels of the top-k with a score of at least 1.5" in lines
    assert "intervals: 95%, Poisson bootstrap over rows, 50 replicates, seed 9" in lines

    unknown = notes(make_scores(inv_propensity=torch.ones(5), drop_empty=True))
    assert "propensity: inverse propensities as given, a, b and N not known" in unknown
    assert "rows: 4, 1 of them without labels: dropped, they count in no metric" in unknown


def test_every_score_and_interval_has_a_cell():
    scores = everything()
    text = format_scores(scores, decimals=3)
    rows, last = {}, ""
    for line in text.splitlines():
        name, *cells = line.split("  ")
        last = name.strip() or last
        rows.setdefault(last, []).extend(cell.strip() for cell in cells if cell)
    for name, value in scores.values.items():
        family, _, rest = name.partition("@")
        k, _, part = rest.partition("/")
        cells = rows[f"{family} {part}".strip()]
        column = scores.ks.index(int(k)) if k else 0
        assert cells[column] == ("-" if math.isnan(value) else f"{100 * value:.3f}")
        if name in scores.intervals:
            low, high = (f"{100 * end:.3f}" for end in scores.intervals[name])
            width = len(scores.ks) if k else 1
            assert cells[width + column] == f"{low}..{high}"


def test_off_a_terminal_the_output_is_plain_text():
    assert printed(render(make_scores(), title="test split")) == (
        "test split\n" + format_scores(make_scores()) + "\n"
    )


def test_on_a_terminal_the_output_is_a_table_with_the_same_numbers():
    text = printed(render(everything(), title="[split]"), force_terminal=True, color_system=None)
    assert "┏" in text
    assert "[split]" in text
    assert "a = 0.55" in text
    for cell in ("P ", "50.00", "micro-F1"):
        assert cell in text


def test_comparison_has_a_line_for_each_system():
    systems = {"dense [x]": make_scores(), "sparse": everything()}
    plain = printed(render_comparison(systems, ("P@1", "PSP@1"), title="heads", decimals=1))
    psp = 100 * systems["sparse"].values["PSP@1"]
    assert plain.splitlines() == [
        "heads",
        "%           P@1  PSP@1",
        "dense [x]  50.0      -",
        f"sparse     50.0   {psp:.1f}",
    ]


def test_json_holds_fractions_constants_and_null_for_undefined(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    scores = everything()
    to_json(scores, path)
    read = json.loads(path.read_text())
    assert read == to_dict(scores)
    assert read["values"]["P@1"] == 0.5
    assert read["values"]["R@1/torso"] == 0.0
    assert read["intervals"]["P@1"] == list(scores.intervals["P@1"])
    assert read["counts"]["empty_rows"] == 1
    assert read["empty_rows"] == "kept"
    assert read["propensity"] == {
        "a": 0.55,
        "b": 1.5,
        "N": 4,
        "source": 'preset "default"; N and label counts of the training rows',
    }
    assert os.listdir(tmp_path) == ["scores.json"]

    nothing = torch.tensor([3, 2, 1, 1, 0])
    labels = SparseLabels.from_lists([[0]], 5)
    accumulator = MetricAccumulator((1,), frequencies=nothing, bootstrap=5)
    accumulator.update(TopK(torch.ones(1, 1), torch.zeros(1, 1)), labels)
    undefined = to_dict(accumulator.compute())
    assert undefined["values"]["R@1/tail"] is None
    assert undefined["intervals"]["R@1/tail"] == [None, None]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    path.write_text("old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        to_json(make_scores(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing/s.json: expected an existing folder"):
        to_json(make_scores(), tmp_path / "missing" / "s.json")
