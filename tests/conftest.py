"""Fixtures shared by all tests."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

# Triton reads this when it is first imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """Dense float64 truths, `tests/oracle.py`."""
    return _module("oracle")


@pytest.fixture(scope="session")
def contrastive_oracle() -> ModuleType:
    """Contrastive losses on the whole matrix, `tests/contrastive_oracle.py`."""
    return _module("contrastive_oracle")


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """Whole trainings: started, stopped, resumed, read and compared, `tests/runs.py`."""
    return _module("runs")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(size, WORKER, "task", *arguments)`: a call in several processes, `tests/ranks.py`."""
    with tempfile.TemporaryDirectory(prefix="xmc-ranks-") as folder:
        pool = _module("ranks").Ranks(Path(folder))
        yield pool
        pool.close()


@pytest.fixture(scope="session")
def save_bert() -> Callable[..., Path]:
    """`save_bert(folder, words, **sizes)`: a tiny transformer that knows words, `tests/bert.py`."""
    save: Callable[..., Path] = _module("bert").save_bert
    return save


@pytest.fixture(scope="session")
def bert_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of a small BERT, for plans; no weights."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
    ).save_pretrained(folder)
    return folder


def _module(name: str) -> ModuleType:
    """A file of this folder, which stays off `sys.path`."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"xmc_test_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The benchmark scripts that a test file names in `MODULES`, as modules.

    Off `sys.path` and `sys.modules` again afterwards.
    """
    names: tuple[str, ...] = request.module.MODULES
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def run_bench() -> Callable[..., str]:
    """Run a benchmark script with arguments; what it printed, its exit status checked."""

    def run(script: str, *arguments: object, expected: int = 0) -> str:
        command = [sys.executable, BENCH / script, *arguments]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def xmc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, standard output, standard error)."""
    from xmc.cli import main

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xmc", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canonical folder of 400 + 100 short texts whose words give away their 30 labels."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    folder.mkdir()
    generator = random.Random(5)
    labels = [f"label {number}" for number in range(30)]
    with gzip.open(folder / "lbl.json.gz", "wt", encoding="utf-8") as file:
        for number, title in enumerate(labels):
            file.write(json.dumps({"uid": str(number), "title": title}) + "\n")
    for split, size in (("trn", 400), ("tst", 100)):
        with gzip.open(folder / f"{split}.json.gz", "wt", encoding="utf-8") as file:
            for row in range(size):
                # Label 0 is the most frequent, the last are rare.
                positives = sorted({int(30 * generator.random() ** 2) for _ in range(2)})
                words = [f"word{label}" for label in positives for _ in range(2)]
                words += [f"noise{generator.randrange(200)}" for _ in range(6)]
                generator.shuffle(words)
                document = {
                    "uid": f"{split}{row}",
                    "title": words[0],
                    "content": " ".join(words[1:]),
                    "target_ind": positives,
                    "target_rel": [1.0] * len(positives),
                }
                file.write(json.dumps(document) + "\n")
    return folder
