"""What a kernel costs on an architecture, compiled here without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xmc_kernels._triton.launch import INTERPRETED, Launch

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = [["tt.divisibility", 16]]


def resources(launch: Launch, architecture: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and tensor-core use of a launch.

    `architecture` is 80, 90 or 100. Raises RuntimeError where the kernels are interpreted.
    """
    if INTERPRETED:
        raise RuntimeError("expected a process without TRITON_INTERPRET=1, got interpreted kernels")
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(_source(launch), target=target, options=launch.options)
    ptx, usage = compiled.asm["ptx"], _usage(compiled.asm["cubin"])
    return {
        "kernel": launch.kernel.__name__,
        "architecture": architecture,
        "num_warps": launch.num_warps,
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": _tensor_cores(ptx),
    }


def _source(launch: Launch) -> ASTSource:
    """The kernel specialised as a call would: aligned pointers and multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = _ALIGNED
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = _ALIGNED
    return ASTSource(launch.kernel, signature, constants, attributes)


def _usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` says: REG, STACK, SHARED, LOCAL ..."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def _tensor_cores(ptx: str) -> str:
    """The family of matrix instructions in PTX, or an empty string."""
    for family in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if family in ptx:
            return family.split(".")[0]
    return ""
