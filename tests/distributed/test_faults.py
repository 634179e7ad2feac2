"""What happens to several ranks where one fails, is killed or is told to stop; under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xmc.distributed.collectives import World
from xmc.distributed.launch import OtherRankError, RankError, local_device
from xmc.distributed.torchrun import launched_local_rank, launched_rank, launched_ranks

WORKER = Path(__file__).with_name("training_worker.py")
RECIPE = """
features.min_df = 1
encoder.dim = 24
head.fan_in = 6
train.epochs = 400
train.batch_size = 20
train.checkpoint_every = 3
"""
VALUES: dict[str, Any] = {
    "features": {"min_df": 1},
    "encoder": {"dim": 24},
    "head": {"fan_in": 6},
    "train": {"epochs": 2, "batch_size": 20},
}


def torchrun(*arguments: object, stdin: int | None = None) -> subprocess.Popen[str]:
    """`xmc` in two processes, their output together."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    return subprocess.Popen(
        [*launch, "-m", "xmc", *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"nothing in {seconds} s"
        time.sleep(0.05)
    return value


def steps(run: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(
    tiny_data: Path, tmp_path: Path, xmc: Callable[..., tuple[int, str, str]]
) -> None:
    """Killed in two processes, gone on with and told to stop in two, ended in one."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = tmp_path / "run"
    command = ["train", tmp_path / "recipe.toml", "--data", tiny_data, "--out", run]
    command += ["--cache", tmp_path / "cache"]

    process = torchrun(*command)
    wait_for(lambda: steps(run), process)
    os.kill(children(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "xmc: rank 0: another rank has ended or does not answer" in output
    assert "GLHF" not in output
    assert "exitcode  : -9" in output
    killed = steps(run)[-1]

    process = torchrun(*command, "--resume")
    reached = wait_for(lambda: max(steps(run)) > killed and max(steps(run)), process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    output, _ = process.communicate(timeout=60)
    stopped = steps(run)[-1]
    assert stopped >= reached
    assert f"stopped by SIGTERM after step {stopped}; add --resume" in output

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = [event["epoch"] for event in log if event["event"] == "validation"]
    assert epochs == list(range(1, stopped // 18 + 1))  # once each: 360 rows in steps of 20

    code, _, err = xmc(*command, "--resume", "--set", "train.epochs=3")
    assert code == 2
    assert "--resume: train.epochs was 400" in err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rank_0_reads_and_prints(
    ranks: Any, tiny_data: Path, tmp_path: Path, xmc: Callable[..., tuple[int, str, str]]
) -> None:
    """One answer a line of standard input."""
    run = tmp_path / "run"
    ranks(1, WORKER, "train", VALUES, tiny_data, run)
    process = torchrun("predict", run, "-k", 2, stdin=subprocess.PIPE)
    output, _ = process.communicate("word1\nword2 noise3\n", timeout=120)
    answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    _, out, _ = xmc("predict", run, "-k", 2, stdin=b"word1\nword2 noise3\n")
    expected = [json.loads(line) for line in out.splitlines()]
    assert [answer["text"] for answer in answers] == ["word1", "word2 noise3"]
    assert [[label["label"] for label in answer["labels"]] for answer in answers] == [
        [label["label"] for label in answer["labels"]] for answer in expected
    ]


def test_a_rank_that_is_gone_is_named_as_the_reason(ranks: Any) -> None:
    said = ranks(2, WORKER, "leave")
    assert said[1] == "left"
    assert said[0].startswith("another rank has ended or does not answer: ")
    assert "gloo" not in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rank_0_works_for_all(ranks: Any, size: int) -> None:
    for rank, seen in enumerate(ranks(size, WORKER, "first_rank")):
        assert seen["alone"] == (5 if rank == 0 else None)
        assert seen["first"] == rank + 5
        assert seen["items"] == list("abcdefg")
        assert seen["none"] == []
        assert seen["calls"] == ([0] if rank == 0 else [])
        failure = "OtherRankError: rank 0 has failed"
        assert seen["failed"] == ("ValueError: no such file" if rank == 0 else failure)
        assert seen["reading"] == ("ValueError: not UTF-8" if rank == 0 else failure)


def test_a_command_for_one_process_is_refused_under_torchrun(
    xmc: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (launched_rank(), launched_ranks(), launched_local_rank()) == (0, 1, 0)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (launched_rank(), launched_ranks(), launched_local_rank()) == (3, 4, 1)
    code, out, err = xmc("options")
    assert (code, out) == (2, "")
    assert err == (
        "xmc: rank 3: xmc options: expected one process, got 4 (torchrun), "
        "which is for train, evaluate, predict\n"
    )


def test_a_rank_keeps_quiet_where_rank_0_speaks(
    xmc: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a moment: torchrun ends every rank as soon as one has ended."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise errors.pop()

    errors = [RankError("rank 1: no room on the disk"), OtherRankError("rank 0 has failed")]
    waits: list[float] = []
    monkeypatch.setattr("xmc.training.run.train", fail)
    monkeypatch.setattr("xmc.distributed.launch.join_ranks", lambda timeout: World(2, 3))
    monkeypatch.setattr("xmc.cli.time.sleep", waits.append)
    for name, value in {"RANK": "2", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    command = ("train", "quickstart", "--data", tmp_path, "--out", tmp_path / "run")
    assert xmc(*command) == (2, "", "")
    assert waits == [1]
    assert xmc(*command) == (2, "", "xmc: rank 2: rank 1: no room on the disk\n")


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    assert local_device("cuda") == torch.device("cuda")  # alone: torch's own choice
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert local_device("cpu") == torch.device("cpu")
    assert local_device("cuda") == torch.device("cuda", 1)
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="expected at most 2 ranks on this machine, one a GPU"):
        local_device("cuda")
