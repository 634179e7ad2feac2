"""Processes that stand for ranks: started once a test session, one call in all of them at a time.

A call is a function of a worker file, `def task(*arguments)`, run in `size` processes that
are the ranks of a fresh gloo group (torch's default group); what it returns comes back in a list
by rank. Starting Python and torch takes seconds, so the processes stay for the next call.
"""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_SECONDS = 120  # for one call


class Ranks:
    """`ranks(2, WORKER, "task", argument)` -> [result of rank 0, result of rank 1]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # of a short name: there are limits on those of sockets
        self._processes: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._calls = 0

    def __call__(self, size: int, worker: Path, task: str, *arguments: Any) -> list[Any]:
        while len(self._processes) < size:
            self._processes.append(self._start())
        self._calls += 1
        store = self._folder / f"store-{self._calls}"
        for rank, (_, connection) in enumerate(self._processes[:size]):
            _send(connection, (str(worker), task, rank, size, str(store), arguments))
        answers = []
        for rank, (process, connection) in enumerate(self._processes[:size]):
            try:
                assert connection.poll(_SECONDS), f"rank {rank} did not answer in {_SECONDS} s"
                answers.append(_receive(connection))
            except (AssertionError, EOFError, OSError) as error:
                self.close()
                raise AssertionError(f"rank {rank}: {error!r}, exit {process.poll()}") from None
        failures = [
            f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good
        ]
        if failures:
            # A group that was made on some ranks only leaves torch's names of groups apart.
            self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for process, connection in self._processes:
            connection.close()
            process.kill()
            process.wait()
        self._processes = []

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        address = str(self._folder / f"socket-{self._calls}-{len(self._processes)}")
        with Listener(address) as listener:
            command = [sys.executable, "-W", "error", __file__, address]
            process = subprocess.Popen(command)
            return process, listener.accept()


def _serve(address: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with Client(address) as connection:
        while True:
            try:
                file, task, rank, size, store, arguments = _receive(connection)
            except EOFError:
                return
            torch.manual_seed(0)
            try:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, size),
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=60),
                )
                dist.barrier()  # a task may end before another rank has connected to this one
                answer = (True, getattr(_load(file), task)(*arguments))
            except BaseException:
                answer = (False, traceback.format_exc())
            finally:
                # Closes the connections: a rank that waits for this one ends with an error.
                if dist.is_initialized():
                    dist.destroy_process_group()
            _send(connection, answer)


def _send(connection: Connection, value: Any) -> None:
    """Plain pickle: what torch registers for such connections would share memory instead."""
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _serve(sys.argv[1])
