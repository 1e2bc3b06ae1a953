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
        self.num_sources = int(num_sources)
        self.width = None

    def _allocate(self, width):
        self.width, rows = int(width), 1 + self.num_sources
        self.n = torch.zeros(rows, dtype=torch.int64)
        self.sum = torch.zeros(rows, width, dtype=torch.float64)
        self.outer = torch.zeros(rows, width, width, dtype=torch.float64)

    def _grow(self, num_sources):
        """Make room for source ids that were not announced."""
        more = num_sources - self.num_sources
        if self.width is not None and more > 0:
            for name in ("n", "sum", "outer"):
                rows = getattr(self, name)
                setattr(self, name, torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]))
        self.num_sources = max(self.num_sources, num_sources)

    def update(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> FeatureStatistics:
        """features: [N, F]; labels: [N] integers (-1: no source; counted overall only) or None."""
        f = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if self.width is None:
            self._allocate(f.shape[1])
        if f.shape[1] != self.width:
            raise ValueError(f"features of width {f.shape[1]} after features of width {self.width}")
        self._add(0, f)
        if self.num_sources and labels is not None and len(labels):
            labels = torch.as_tensor(labels).cpu()
            self._grow(int(labels.max()) + 1)
            for source in labels.unique().tolist():
                if source >= 0:
                    self._add(1 + source, f[labels == source])
        return self

    def _add(self, row, f):
        self.n[row] += len(f)
        self.sum[row] += f.sum(0)
        self.outer[row] += f.T @ f

    def all_reduce(self) -> FeatureStatistics:
        """Sum over all processes, also those that saw no image and so do not know the width yet."""
        if get_world_size() == 1:
            return self
        device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
        shape = torch.tensor([self.width or 0, self.num_sources], device=device)
        width, num_sources = all_reduce_(shape, "max").tolist()
        self._grow(num_sources)
        if self.width is None and width > 0:
            self._allocate(width)
        if self.width not in (None, width):
            raise ValueError(f"features of width {self.width} on one process and {width} on another")
        if self.width is not None:
            for name in ("n", "sum", "outer"):
                setattr(self, name, all_reduce_(getattr(self, name).to(device)).cpu())
        return self

    def count(self, source: int | None = None) -> int:
        """Images of one source or of all."""
        return 0 if self.width is None else int(self.n[0 if source is None else 1 + source])

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


def gather_rows(arrays: dict[str, np.ndarray] | None, order: np.ndarray) -> dict[str, np.ndarray]:
    """Concatenate [n_r, ...] arrays of all ranks and sort the rows by the integers `order` [n_r].

    arrays: dict of numpy arrays (None on a rank without images). Returns a dict of the whole arrays on every rank.
    """
    parts = [(arrays, order)]
    if get_world_size() > 1:
        parts = [None] * get_world_size()
        torch.distributed.all_gather_object(parts, (arrays, order))
    parts = [part for part in parts if part[0] is not None and len(part[1])]
    if not parts:
        raise ValueError("no images on any process")
    rows = np.argsort(np.concatenate([part[1] for part in parts]), kind="stable")
    return {name: np.concatenate([part[0][name] for part in parts])[rows] for name in parts[0][0]}
