"""The CPU backend's building blocks, its cache and its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import carray, cfunc, from_dtype, njit, types

import xmc_kernels
from xmc_kernels._cpu import threads, vector
from xmc_kernels._cpu.tiles import NARROW, from_tiles, tile_width, to_tiles


@pytest.mark.parametrize("width", NARROW)
def test_sum_and_comparison_of_vectors(width) -> None:
    @njit
    def run(a, b):
        zero = vector.splat(width, np.float32(0))
        x = vector.load(zero, vector.pointer(a), 0)
        return vector.hsum(x), vector.greater(x, vector.load(zero, vector.pointer(b), 0))

    a, b = np.random.default_rng(0).integers(-9, 9, (2, width)).astype(np.float32)
    total, bits = run(a, b)
    assert total == a.sum()
    assert bits == sum(1 << i for i in range(width) if a[i] > b[i])


@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, 100, 128])
@pytest.mark.parametrize("width", NARROW)
def test_tiles_are_the_transposed_batch(num_rows, width) -> None:
    x = torch.randn(num_rows, 37)
    tiles = to_tiles(x, width)
    padded = torch.zeros(len(tiles) * width, 37)
    padded[:num_rows] = x
    expected = padded.view(-1, width, 37).transpose(1, 2)
    assert torch.equal(torch.from_numpy(tiles), expected)
    assert torch.equal(from_tiles(np.stack([tiles] * 3), num_rows), x + x + x)


@pytest.mark.parametrize(
    ("num_rows", "width"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (512, 64)]
)
def test_small_batches_get_narrow_tiles(num_rows, width) -> None:
    assert tile_width(num_rows) == width


@pytest.mark.parametrize(("num_rows", "width"), [(1, 4), (4, 4), (6, 8), (16, 16), (64, 64)])
def test_without_gradients_tiles_are_narrower_still(num_rows, width) -> None:
    assert tile_width(num_rows, NARROW) == width


@pytest.mark.parametrize("at", [0, 64, 2048])
@pytest.mark.parametrize("size", [1, 700, 100_000])
def test_buffers_start_where_asked_in_a_page(at, size) -> None:
    buffer = threads.zeros(2, size, at=at)
    assert buffer.shape == (2, size)
    assert buffer.ctypes.data % threads.PAGE == at
    assert not buffer.any()


def test_shares_are_as_many_as_threads_but_not_tiny(two_threads) -> None:
    assert threads.num_shares(10_001) == 2
    assert threads.num_shares(511) == threads.num_shares(1) == 1


@pytest.mark.parametrize("openmp", [True, False])
def test_every_share_is_computed_once(openmp, monkeypatch) -> None:
    if openmp and threads._openmp() is None:
        pytest.skip("torch runs on no OpenMP with GNU's entry point")
    if not openmp:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    kind = threads.record_type(addresses="counts", integers="unused")

    @cfunc(types.void(types.CPointer(from_dtype(kind))))
    def count(arguments):
        a = carray(arguments, 1)[0]
        counts = vector.at_address(np.int64, a.counts)
        share = vector.next_share(arguments)
        while share < a.num_shares:
            counts[share] += 1
            share = vector.next_share(arguments)

    counts = np.zeros(9, np.int64)
    arguments = threads.record(kind, counts=counts, num_shares=7)
    for _ in range(3):
        threads.launch(count, arguments)
    assert counts.tolist() == [3] * 7 + [0, 0]


def run_python(code: str, *arguments: object) -> str:
    """The output of a fresh interpreter that sees only installed packages."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_operations_load_no_compiler() -> None:
    modules = run_python(
        "import sys, xmc_kernels.classifier, xmc_kernels.fan_in, xmc_kernels.topk\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert "torch" in modules
    assert not {"numba", "llvmlite", "triton", "scipy"} & set(modules)


_SCORE = """
import sys, json
sys.path.insert(0, sys.argv[1])
import numpy, torch
from xmc_kernels.fan_in import fan_in_linear
index = torch.arange(4).repeat(600, 1).to(torch.uint16)
fan_in_linear(torch.ones(2, 9), torch.zeros(600, 4), index)
from xmc_kernels._cpu import fan_in as cpu
kernel = cpu._forward_kernel(4, numpy.uint16, numpy.float32, 1)
print(json.dumps([kernel.cache_hits, cpu.__file__]))
"""


def test_a_second_process_finds_the_compiled_kernels(tmp_path) -> None:
    package = Path(xmc_kernels.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / "xmc_kernels", ignore=ignore)
    runs = [json.loads(run_python(_SCORE, tmp_path)) for _ in range(2)]
    assert all(file.startswith(str(tmp_path)) for _, file in runs)
    assert [hits for hits, _ in runs] == [0, 1]
    # A change of another file is a change of the kernels that inline it.
    with (tmp_path / "xmc_kernels/_cpu/scores.py").open("a") as file:
        file.write("\n")
    assert json.loads(run_python(_SCORE, tmp_path))[0] == 0


_PEAK = """
import resource, sys
import torch
from xmc_kernels.classifier import *
L, D, F, B = int(sys.argv[1]), 768, 32, 64
torch.set_num_threads(2)
index = torch.arange(F).repeat(L, 1).mul_(24).to(torch.uint16)
weight, bias, x = torch.zeros(L, F), torch.zeros(L), torch.randn(B, D)
rule = UpdateRule("adamw")
state = make_state(weight, bias, rule)
for moment in (state.weight_m, state.weight_v):
    moment.fill_(1e-9)  # zeros are not memory until they are written
def step(weight, index, bias, state):
    classifier_step_(x, weight, index, bias, torch.arange(B + 1), torch.arange(B).int(),
        loss="bce", rule=rule, state=state, lr=1e-3, step=1, grad_scale=1 / B)
small = weight[:1024].clone(), index[:1024], bias[:1024].clone()
step(*small, make_state(small[0], small[2], rule))  # compile
def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # reset the peak
before = now()
step(weight, index, bias, state)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_step_needs_little_memory_whatever_the_number_of_labels() -> None:
    extra = {L: int(run_python(_PEAK, L)) for L in (16_384, 131_072)}
    # The scores alone would be 33 MB at 131,072 labels, a gradient of the weights 17 MB.
    assert max(extra.values()) < 8e6, extra
