"""Getting numbers onto a device without waiting for it."""

import functools
from collections.abc import Sequence

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. Only a copy to the CPU waits: one from ordinary memory has been read when the call returns."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


@functools.lru_cache(maxsize=256)
def constant(values: Sequence, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of (nested) tuples of numbers, sent once per device and shared by all that ask: never write into it."""
    return send(torch.tensor(values, dtype=dtype), device)
