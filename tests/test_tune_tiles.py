"""The tuner of the Triton kernels, with a made-up clock: what it picks, skips, keeps and writes."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from xmc_kernels._triton import tiles
from xmc_kernels._triton.launch import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench"
MODULES = ("classifier_jobs", "provenance", "tile_table", "timing", "tune_tiles")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = tiles.architecture(torch.device(DEVICE))
STEP = (True, False, True)  # one index row per label, float32
DEFAULT = tiles.TABLES["default"]
BLOCK_KERNELS = {"_blocks_fwd_kernel", "_blocks_input_kernel", "_blocks_weight_kernel"}


@pytest.fixture(scope="module")
def bench():
    """The tuner as a module, off `sys.path` and `sys.modules` again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("tune_tiles")
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def shape(bench):
    return bench.Shape(L=64, D=32, F=8, B=4)


@pytest.fixture
def row(bench):
    sizes = {"block_b": (32, 64), "num_warps": (4, 8), "block_f": (32, 128), "walk": (8, 16)}
    return bench.Row("tiles", STEP, sizes)


def present():
    """The sizes that a launcher would read now."""
    return tiles.table(torch.device(DEVICE)).tiles[STEP]


def test_every_row_times_kernels_of_its_own(bench, shape):
    kernels = {}
    for row in bench.rows(DEFAULT):
        with bench.recorded() as launches:
            for run in bench.cases(row, [shape], DEVICE):
                run()
        names = [one.kernel.__name__ for one in launches]
        sizes = [one.constants for one in launches]
        kernels[row.field, row.key] = names
        if row.field == "tiles" and row.key[0]:
            assert names == ["_classifier_step_kernel"]
            assert sizes[0]["BLOCK_G"] == (16 if row.key[1] else 1)
        elif row.field == "tiles":
            forward = "_fan_in_shared_fwd_kernel" if row.key[1] else "_fan_in_fwd_kernel"
            assert names == [forward, "_fan_in_bwd_kernel"]
        elif row.field == "products":
            kernel = row.key[0] if row.key[0] != "sigmoid" else "gradient"
            assert f"_similarity_{kernel}_kernel" in names
        else:
            assert set(names) <= {*BLOCK_KERNELS, "_gradient_kernel", "_update_kernel"}
            assert set(names) >= BLOCK_KERNELS
    assert len(kernels) == sum(map(len, (DEFAULT.tiles, DEFAULT.blocks, DEFAULT.products)))


@pytest.fixture
def nothing_runs(bench, monkeypatch):
    """Candidates are free: only the made-up clock tells them apart."""
    monkeypatch.setattr(bench, "cases", lambda row, shapes, device: [lambda: None])


@pytest.mark.usefixtures("nothing_runs")
def test_the_fastest_sizes_win(bench, shape, row):
    best = tiles.Tiles(block_g=1, block_f=32, block_b=64, walk=16, num_warps=8)

    def clock(run):
        wrong = sum(getattr(present(), name) != getattr(best, name) for name in row.sizes)
        return 1.0 + wrong

    tuner = bench.Tuner(HERE, DEVICE, clock, lambda launches: 0)
    assert tuner.best_row(DEFAULT, row, [shape]) == best
    times = {tuple(r["sizes"].values()): r["median_ms"] for r in tuner.records}
    assert times[1, 32, 64, 16, 8] == [1.0]
    assert len(times) == len(tuner.records)  # nothing is timed twice
    assert tiles.TABLES["default"] is DEFAULT


def test_candidates_that_raise_or_spill_are_skipped(bench, shape):
    row = bench.Row("tiles", STEP, {"num_warps": (8,), "block_f": (128,), "walk": (64,)})

    def clock(run):
        if present().num_warps == 8:
            raise RuntimeError("out of resources: shared memory")
        return 1.0 / present().block_f / present().walk

    def spills(launches):
        assert [one.kernel.__name__ for one in launches] == ["_classifier_step_kernel"]
        return 24 if present().block_f == 128 else 0

    tuner = bench.Tuner(HERE, DEVICE, clock, spills)
    best = tuner.best_row(DEFAULT, row, [shape])
    assert (best.num_warps, best.block_f, best.walk) == (4, 64, 64)
    reasons = {r["not_available"] for r in tuner.records if "not_available" in r}
    assert reasons == {
        "RuntimeError: out of resources: shared memory",
        "RuntimeError: spills 24 registers",
    }


@pytest.mark.usefixtures("nothing_runs")
def test_a_row_stays_where_nothing_is_faster_or_nothing_runs(bench, shape, row):
    now = DEFAULT.tiles[STEP]

    def noisy(run):
        return 1.0 if present() == now else 0.99

    assert bench.Tuner(HERE, DEVICE, noisy, len).best_row(DEFAULT, row, [shape]) == now

    def broken(run):
        raise RuntimeError("no")

    assert bench.Tuner(HERE, DEVICE, broken, len).best_row(DEFAULT, row, [shape]) == now


def test_a_candidate_counts_by_the_geometric_mean_over_shapes(bench):
    values = iter([2.0, 8.0])
    tuner = bench.Tuner(HERE, DEVICE, lambda run: next(values), lambda launches: 0)
    mean = tuner.milliseconds([lambda: None, lambda: None], {"row": "tiles"})
    assert mean == pytest.approx(4.0)
    assert tuner.records == [{"architecture": HERE, "row": "tiles", "median_ms": [2.0, 8.0]}]


def test_strategies_are_timed_by_name(bench, shape, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", (2, 4))

    def clock(run):
        with bench.recorded() as launches:
            run()
        dense = any(one.kernel.__name__ == "_scatter_kernel" for one in launches)
        return 5.0 if dense else 1.0 + 10.0 * (launches[0].arguments["num_rows"] == 4)

    tuner = bench.Tuner(HERE, DEVICE, clock, lambda launches: 0)
    times = tuner.strategies(shape, (False, False, False))
    assert times[2] == pytest.approx({"walk": 1.0, "densify": 5.0})
    assert times[4] == pytest.approx({"walk": 11.0, "densify": 5.0})
    assert bench.breakpoints(times, ()) == ((1, "walk"), (4, "densify"))


def test_breakpoints_name_changes_only_and_skip_what_did_not_run(bench):
    times = {
        64: {"walk": 3.0, "densify": 2.0},
        8: {"walk": 1.0, "densify": 2.0},
        32: {"walk": math.inf, "densify": math.inf},
        16: {"walk": 1.0, "densify": math.inf},
        128: {"walk": 9.0, "densify": 3.0},
    }
    assert bench.breakpoints(times, ()) == ((1, "walk"), (64, "densify"))
    nothing = {8: {"walk": math.inf}}
    assert bench.breakpoints(nothing, ((1, "densify"),)) == ((1, "densify"),)


@pytest.mark.usefixtures("nothing_runs")
def test_every_row_and_strategy_is_tried(bench, shape, monkeypatch):
    monkeypatch.setattr(bench, "step_case", lambda *arguments: lambda: None)
    tuner = bench.Tuner(HERE, DEVICE, lambda run: 1.0, lambda launches: 0)
    table = bench.tune(tuner, DEFAULT, [shape], minutes=1)
    assert table.tiles == DEFAULT.tiles  # all as fast: nothing moves
    assert set(table.strategies.values()) == {((1, "walk"),)}
    tried = {(r["row"], r["key"]) for r in tuner.records}
    assert tried >= {("tiles", key) for key in DEFAULT.tiles}
    assert tried >= {("blocks", key) for key in DEFAULT.blocks}
    assert tried >= {("products", key) for key in DEFAULT.products}
    assert tried >= {("strategies", key) for key in DEFAULT.strategies}
    names = {r["by"] for r in tuner.records if r.get("key") == (False, True, True) and "by" in r}
    assert names == {"walk", "densify", "blocks"}


def test_without_time_the_table_stays(bench, shape, capsys):
    tuner = bench.Tuner(HERE, DEVICE, lambda run: 1.0, lambda launches: 0)
    assert bench.tune(tuner, DEFAULT, [shape], minutes=-1) == DEFAULT
    assert "not reached in -1 minutes: tiles (False, False, False)" in capsys.readouterr().out


def load(path):
    """A file that the tuner wrote, as a module."""
    spec = importlib.util.spec_from_file_location("rewritten_tiles", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_the_table_is_written_as_it_stands(bench):
    text = Path(tiles.__file__).read_text()
    assert text.split(bench.tile_table.BEGIN)[1].split(bench.tile_table.END)[
        0
    ] == bench.tile_table.render(tiles.TABLES)


def test_a_rewritten_file_imports_and_keeps_other_architectures(bench, tmp_path):
    file = tmp_path / "tiles.py"
    shutil.copy(tiles.__file__, file)
    sizes = tiles.Tiles(block_g=1, block_f=128, block_b=32, walk=8, num_warps=4)
    steps = {**DEFAULT.strategies, (False, False, True): ((1, "walk"), (8, "densify"))}
    about = {"date": "2026-11-21", "device": "NVIDIA H100 80GB HBM3", "torch": "2", "triton": "3"}
    tuned = replace(
        bench.with_row(DEFAULT, bench.Row("tiles", STEP, {}), sizes),
        source=bench.source(about),
        strategies=steps,
    )
    bench.tile_table.rewrite(file, {**tiles.TABLES, "sm_90": tuned})
    long = "a device of a very long name, " * 6 + 'with a "quote"'
    bench.tile_table.rewrite(file, {**load(file).TABLES, "sm_80": replace(DEFAULT, source=long)})
    written = load(file)
    assert list(written.TABLES) == [*tiles.TABLES, "sm_90", "sm_80"]
    assert bench.tile_table.render(written.TABLES).count("Table(") == len(written.TABLES)
    # Another module's classes: equal by what they print.
    assert repr(written.TABLES["default"]) == repr(DEFAULT)
    assert repr(written.TABLES["sm_90"]) == repr(tuned)
    assert written.TABLES["sm_80"].source == long
    assert tuned.source == "2026-11-21: timed on NVIDIA H100 80GB HBM3, torch 2, triton 3"
    original, new = Path(tiles.__file__).read_text(), file.read_text()
    assert new.split(bench.tile_table.BEGIN)[0] == original.split(bench.tile_table.BEGIN)[0]
    assert new.split(bench.tile_table.END)[1] == original.split(bench.tile_table.END)[1]
    assert all(len(line) <= 100 for line in new.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.py"]


def test_a_file_without_markers_is_refused(bench, tmp_path):
    file = tmp_path / "tiles.py"
    file.write_text("TABLES = {}\n")
    with pytest.raises(ValueError, match=r"expected one line '# tuned: begin' .* got 0 and 0"):
        bench.tile_table.rewrite(file, tiles.TABLES)
    assert file.read_text() == "TABLES = {}\n"


def test_all_tables_have_the_rows_of_the_default():
    for table in tiles.TABLES.values():
        assert table.tiles.keys() == DEFAULT.tiles.keys()
        assert table.blocks.keys() == DEFAULT.blocks.keys()
        assert table.products.keys() == DEFAULT.products.keys()
        assert table.strategies.keys() == DEFAULT.strategies.keys()
        for steps in table.strategies.values():
            assert steps[0][0] == 1
            assert [rows for rows, _ in steps] == sorted({rows for rows, _ in steps})


def test_shapes_are_four_numbers(bench):
    assert bench.shape_of("128,768,64,8") == bench.Shape(L=128, D=768, F=64, B=8)
    with pytest.raises(argparse.ArgumentTypeError, match="expected L,D,F,B, got '1,2'"):
        bench.shape_of("1,2")


def run_tuner(*arguments):
    command = [sys.executable, str(BENCH / "tune_tiles.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(not INTERPRETED, reason="needs a machine without a GPU")
def test_without_a_gpu_only_a_dry_run_works(bench):
    before = Path(tiles.__file__).read_text()
    done = run_tuner("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "tiles (True, True, False): {'block_b': (32, 64, 128)" in done.stdout
    assert done.stdout.endswith(bench.tile_table.render(tiles.TABLES) + "\n")
    failed = run_tuner()
    assert failed.returncode == 2
    assert "expected a CUDA device, got none: --dry-run" in failed.stderr
    assert Path(tiles.__file__).read_text() == before
