"""Zeros in host memory, pinned where a GPU copies from and to it."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor, cuda


def host_zeros(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros(length, dtype=dtype)` on the CPU, page-locked if `device`, its user, is CUDA.

    torch's own pinned memory comes in powers of two, up to twice of what is asked for, and stays
    with the process. These pages are as many as needed and go back with the last tensor on them.

    Raises RuntimeError where the system locks no more pages.
    """
    if device.type != "cuda" or length == 0:
        return torch.zeros(length, dtype=dtype)
    pages = _Pinned(-1, length * dtype.itemsize)
    pages.lock(device)
    return torch.frombuffer(pages, dtype=dtype, count=length)


class _Pinned(mmap.mmap):
    """Anonymous pages, zero at first, that CUDA has page-locked."""

    address = 0
    device = torch.device("cpu")

    def lock(self, device: torch.device) -> None:
        address, size = torch.frombuffer(self, dtype=torch.uint8).data_ptr(), len(self)
        with cuda.device(device):
            code = int(cuda.cudart().cudaHostRegister(address, size, 0))
        if code:
            raise RuntimeError(
                f"expected to pin {size:,} bytes of host memory for {device}, got CUDA error {code}"
            )
        self.address, self.device = address, device

    def __del__(self) -> None:
        # Before the pages go, and after all copies. A process that ends gives them back by itself.
        if self.address and not sys.is_finalizing():
            cuda.synchronize(self.device)
            cuda.cudart().cudaHostUnregister(self.address)
