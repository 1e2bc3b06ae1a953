"""Streamed float64 feature statistics, overall and per source, merged over processes."""

from __future__ import annotations

import numpy as np
import torch

from torch_utils.distributed import all_reduce_, get_world_size


class FeatureStatistics:
    """Count, sum and sum of outer products of features, in float64, for all images and for each of K sources.

    >>> statistics = FeatureStatistics(num_sources=10)
    >>> for images, labels in batches:
    ...     statistics.update(detector.features(images), labels)
    >>> statistics.all_reduce()                     # over processes; ranks may have seen nothing at all
    >>> mu, sigma = statistics.moments(source=3)    # source=None: all images

    `n`: [1 + K] int64, `sum`: [1 + K, F], `outer`: [1 + K, F, F]; row 0 is overall. The width F is learned from the
    first features. num_sources=0 keeps overall sums alone (K F^2 float64 values can be much); otherwise larger source
    ids make room for themselves.
    """

    def __init__(self, num_sources: int = 0):
        self.n = torch.zeros(1 + num_sources, dtype=torch.int64)
        self.sum = torch.zeros(1 + num_sources, 0, dtype=torch.float64)
        self.outer = torch.zeros(1 + num_sources, 0, 0, dtype=torch.float64)

    @property
    def num_sources(self) -> int:
        """K."""
        return len(self.n) - 1

    @property
    def width(self) -> int:
        """F; 0 before the first features."""
        return self.sum.shape[1]

    def _grow(self, num_sources, width):
        """Make room for the first features, and for source ids that were not announced."""
        more, wider = max(num_sources - self.num_sources, 0), width - self.width
        if more or wider:
            pad = torch.nn.functional.pad
            self.n, self.sum = pad(self.n, (0, more)), pad(self.sum, (0, wider, 0, more))
            self.outer = pad(self.outer, (0, wider, 0, wider, 0, more))

    def update(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> FeatureStatistics:
        """features: [N, F]; labels: [N] integers (-1: no source; counted overall only) or None."""
        f = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if self.width not in (0, f.shape[1]):
            raise ValueError(f"features of width {f.shape[1]} after features of width {self.width}")
        labels = torch.as_tensor([] if labels is None or not self.num_sources else labels).cpu()
        sources = [source for source in labels.unique().tolist() if source >= 0]
        self._grow(max(sources, default=-1) + 1, f.shape[1])
        for source in (None, *sources):
            row, part = (0, f) if source is None else (1 + source, f[labels == source])
            self.n[row] += len(part)
            self.sum[row] += part.sum(0)
            self.outer[row] += part.T @ part
        return self

    def all_reduce(self) -> FeatureStatistics:
        """Sum over all processes, also those that saw no image and so do not know the width yet."""
        if get_world_size() == 1:
            return self
        device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
        num_sources, width = all_reduce_(torch.tensor([self.num_sources, self.width], device=device), "max").tolist()
        if self.width not in (0, width):
            raise ValueError(f"features of width {self.width} on one process and {width} on another")
        self._grow(num_sources, width)
        for name in ("n", "sum", "outer"):
            setattr(self, name, all_reduce_(getattr(self, name).to(device)).cpu())
        return self

    def count(self, source: int | None = None) -> int:
        """Images of one source or of all."""
        return int(self.n[0 if source is None else 1 + source])

    def moments(self, source: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(mu [F], sigma [F, F]) float64 arrays, sigma with the n - 1 normalisation; of one source or overall.

        Raises ValueError with fewer than two images.
        """
        row = 0 if source is None else 1 + source
        n = self.count(source)
        if n < 2:
            where = "overall" if source is None else f"of source {source}"
            raise ValueError(f"{n} image(s) {where}: mean and covariance need at least 2")
        mu = self.sum[row] / n
        sigma = (self.outer[row] - n * torch.outer(mu, mu)) / (n - 1)
        return mu.numpy(), sigma.numpy()


def gather_rows(arrays: dict[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """Concatenate [n_r, ...] arrays of all ranks and sort the rows by the integers `order` [n_r].

    arrays: dict of numpy arrays (without images, any). Returns a dict of the whole arrays on every rank.
    """
    parts = [(arrays, order)]
    if get_world_size() > 1:
        parts = [None] * get_world_size()
        torch.distributed.all_gather_object(parts, (arrays, order))
    parts = [part for part in parts if len(part[1])]
    if not parts:
        raise ValueError("no images on any process")
    rows = np.argsort(np.concatenate([part[1] for part in parts]), kind="stable")
    return {name: np.concatenate([part[0][name] for part in parts])[rows] for name in parts[0][0]}
