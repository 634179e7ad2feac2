"""Whether torch.compile can work here, asked before it fails in the middle of a step."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks for code on `device`, in words; empty where it has all it needs."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "torch.compile needs triton, which is not installed"
        # Triton builds a small launcher with whichever of these it finds.
        if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
            return "torch.compile needs a C compiler and finds none"
        return ""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler and finds none"
    return ""
