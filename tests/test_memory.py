"""The peak of a process is its own."""

from __future__ import annotations

import subprocess
import sys

import torch

from xmc.memory import peak_memory_bytes

_CHILD = "from xmc.memory import peak_memory_bytes; print(peak_memory_bytes())"


def test_the_peak_counts_memory_that_was_freed() -> None:
    before = peak_memory_bytes()
    del_me = torch.ones(before // 4 + 50_000_000)  # four bytes each: more than was ever held
    size = del_me.numel() * 4
    del del_me
    assert peak_memory_bytes() >= size


def test_the_peak_of_the_parent_is_not_that_of_the_child() -> None:
    alone = int(subprocess.check_output([sys.executable, "-c", _CHILD]))
    held = torch.ones(alone // 2)  # twice as many bytes as the child alone
    child = int(subprocess.check_output([sys.executable, "-c", _CHILD]))
    assert peak_memory_bytes() > held.numel() * 4
    assert child < 1.3 * alone
