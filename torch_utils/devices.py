"""Getting numbers onto a device without waiting for it; memory of the CPU that stays where it is."""

import ctypes
import functools
import sys
from collections.abc import Sequence

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. Only a copy to the CPU waits: one from ordinary memory has been read when the call returns."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


@functools.lru_cache(maxsize=256)
def constant(values: Sequence, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of (nested) tuples of numbers, sent once per device and shared by all that ask: never write into it."""
    return send(torch.tensor(values, dtype=dtype), device)


def keep_memory() -> None:
    """Have glibc keep freed memory for the next step: pages that it returns fault in again, 5 to 10 % of a step on the CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1), mallopt(mmap_threshold, 2**25)  # the largest that are allowed
