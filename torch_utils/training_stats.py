"""Means of quantities reported between two status lines, over all ranks, without device synchronisation per report."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from torch_utils import distributed as dist


def _moments(value):
    """[number of finite elements, their sum, number of others] float64, without waiting for the device."""
    value = value.to(torch.float64).flatten()
    finite = value.isfinite()
    return torch.stack([finite.sum(), value.where(finite, 0).sum(), (~finite).sum()]).to(torch.float64)


class Collector:
    """report(name, value) any number of times; means() gives {name: mean} over all ranks since the last call.

    Non-finite samples are left out of the mean and counted: `nonfinite_share[name]` after `means()`. All ranks must
    know the same names; a rank that has nothing to report calls `report(name, [])`.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        # float64 sums; Apple's accelerator has no float64, its sums live on the CPU.
        device = torch.device(device)
        self.device = device if device.type != "mps" else torch.device("cpu")
        self.sums = {}  # name -> (moments of what was reported from the host, [those from the device])
        self.nonfinite_share = {}

    def report(self, name: str, value: float | Sequence[float] | torch.Tensor) -> None:
        """value: number or tensor of any shape; every element is one sample."""
        host, device = self.sums.setdefault(name, (np.zeros(3), []))
        if torch.is_tensor(value) and value.device.type != "cpu":
            value = value.detach().to(self.device)
            moments = _moments(value)
            device[:] = [device[0] + moments] if device else [moments]
            return
        # On the host few operations: the loop spends little beside them.
        value = torch.as_tensor(value).detach() if not isinstance(value, (int, float)) else value
        count, total = (value.numel(), value.sum(dtype=torch.float64).item()) if torch.is_tensor(value) else (1, value)
        host += (count, total, 0) if math.isfinite(total) else _moments(torch.as_tensor(value)).numpy()

    def so_far(self, name: str) -> float | None:
        """The mean of what this rank alone has reported since the last `means()`; waits for the device."""
        host, device = self.sums.get(name, (np.zeros(3), []))
        count, total, _ = host + sum(moments.cpu().numpy() for moments in device)
        return float(total / count) if count > 0 else None

    def means(self) -> dict[str, float | None]:
        """{name: mean or None}, in order of first report; starts anew. Raises RuntimeError if ranks know other names."""
        names = list(self.sums)
        if dist.get_world_size() > 1 and dist.broadcast_object(names) != names:
            raise RuntimeError(f"rank {dist.get_rank()} reported other statistics than rank 0: {names}")
        if not names:
            return {}
        host = torch.from_numpy(np.stack([self.sums[name][0] for name in names])).to(self.device)
        zero = torch.zeros(3, dtype=torch.float64, device=self.device)
        table = host + torch.stack([sum(self.sums[name][1], zero) for name in names])
        table = dist.all_reduce_(table).cpu()
        rows = list(zip(names, table, strict=True))
        self.nonfinite_share = {n: float(bad / max(count + bad, 1)) for n, (count, _, bad) in rows}
        self.sums = {name: (np.zeros(3), []) for name in names}
        return {n: float(s / count) if count > 0 else None for n, (count, s, _) in rows}
