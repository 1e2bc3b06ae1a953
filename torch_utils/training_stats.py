"""Means of quantities reported between two status lines, over all ranks, without device synchronisation per report."""

from collections.abc import Sequence

import torch

from torch_utils import distributed as dist


class Collector:
    """report(name, value) any number of times; means() gives {name: mean} over all ranks since the last call.

    Non-finite samples are left out of the mean and counted: `nonfinite_share[name]` after `means()`. All ranks must
    know the same names; a rank that has nothing to report calls `report(name, [])`.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        # float64 sums; Apple's accelerator has no float64, its sums live on the CPU.
        device = torch.device(device)
        self.device = device if device.type != "mps" else torch.device("cpu")
        self.sums = {}  # name -> sums of what was reported from the host, and from the device
        self.nonfinite_share = {}

    def report(self, name: str, value: float | Sequence[float] | torch.Tensor) -> None:
        """value: number or tensor of any shape; every element is one sample."""
        value = torch.as_tensor(value).detach()
        host = value.device.type == "cpu"  # numbers stay there until the status line
        value = (value if host else value.to(self.device)).to(torch.float64).flatten()
        finite = value.isfinite()
        moments = torch.stack([finite.sum(), value.where(finite, 0).sum(), (~finite).sum()]).to(torch.float64)
        sums = self.sums.setdefault(name, [0, 0])
        sums[not host] = sums[not host] + moments

    def means(self) -> dict[str, float | None]:
        """{name: mean or None}, in order of first report; starts anew. Raises RuntimeError if ranks know other names."""
        names = list(self.sums)
        if dist.get_world_size() > 1 and dist.broadcast_object(names) != names:
            raise RuntimeError(f"rank {dist.get_rank()} reported other statistics than rank 0: {names}")
        if not names:
            return {}
        zero = torch.zeros(3, dtype=torch.float64)
        host, device = (
            torch.stack([zero.to(d) + self.sums[name][k] for name in names]) for k, d in enumerate(("cpu", self.device))
        )
        table = dist.all_reduce_(host.to(self.device) + device).cpu()
        rows = list(zip(names, table, strict=True))
        self.nonfinite_share = {n: float(bad / max(count + bad, 1)) for n, (count, _, bad) in rows}
        self.sums = {name: [0, 0] for name in names}
        return {n: float(s / count) if count > 0 else None for n, (count, s, _) in rows}
