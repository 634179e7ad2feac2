"""The command for several machines: two torchruns, one a machine, here both on this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file


def torchrun(node: int, port: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--node-rank", str(node)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "xmc"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_two_machines_train_as_one_process(
    tiny_data: Path, tmp_path: Path, xmc: Callable[..., tuple[int, str, str]]
) -> None:
    options = ["features.min_df=1", "encoder.dim=24", "head.fan_in=6", "train.epochs=1"]
    common = ["train", "quickstart", "--data", tiny_data, "--cache", tmp_path / "cache"]
    common += [part for option in options for part in ("--set", option)]
    port = free_port()
    nodes = [torchrun(node, port, *common, "--out", tmp_path / "two") for node in range(2)]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert xmc(*common, "--out", tmp_path / "one")[0] == 0
    two, one = (load_file(tmp_path / n / "model" / "weights.safetensors") for n in ("two", "one"))
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        assert (two[name].double() - tensor.double()).abs().max() < 1e-4, name
