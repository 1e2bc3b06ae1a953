"""Streamed float64 feature statistics, overall and per source, merged over processes.

As long as the images of a group are no more than the features are wide, the group keeps them and works in their span:
exact, and n F numbers in place of F^2. Beyond that it keeps the sum of outer products. Groups without images keep nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import psutil
import torch

from metrics.distances import Gaussian
from torch_utils.distributed import all_gather_varying, all_reduce_, get_world_size

WORK = 4  # matrices of the size of the overall statistics that a Fréchet distance takes besides


class Group:
    """Features of one group of images: count `n`, `sum` [F], and `rows` [n, F] while n <= F, else `outer` [F, F]."""

    def __init__(self, width: int):
        self.n, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        self._rows = []
        self.outer = None

    @property
    def rows(self) -> torch.Tensor | None:
        """[n, F]; None where the sum of outer products is kept in place of them."""
        if self.outer is not None:
            return None
        self._rows = [torch.cat([self.sum.new_zeros(0, len(self.sum)), *self._rows])]
        return self._rows[0]

    def update(self, features: torch.Tensor) -> None:
        """features: [m, F] float64."""
        self.n, self.sum = self.n + len(features), self.sum + features.sum(0)
        self._rows.append(features)
        if self.outer is not None or self.n > len(self.sum):
            self._to_outer()

    def merge(self, other: Group) -> None:
        """Add the images of another group."""
        if other.outer is None:
            self.update(other.rows)
            return
        self._to_outer()
        self.n, self.sum, self.outer = self.n + other.n, self.sum + other.sum, self.outer + other.outer

    def _to_outer(self):
        rows, self._rows = torch.cat([self.sum.new_zeros(0, len(self.sum)), *self._rows]), []
        self.outer = rows.T @ rows if self.outer is None else self.outer.addmm_(rows.T, rows)

    def all_reduce(self, total: int, device: torch.device) -> None:
        """Sum over all processes, which hold `total` images together."""
        if total <= len(self.sum):
            rows = all_gather_varying(self.rows.to(device)).cpu()
            self.n, self.sum, self._rows = total, rows.sum(0), [rows]
            return
        self._to_outer()
        self.n, self.sum = total, all_reduce_(self.sum.to(device)).cpu()
        self.outer = all_reduce_(self.outer.to(device)).cpu()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mu [F], sigma [F, F]), sigma with the n - 1 normalisation."""
        mu = self.sum / self.n
        if self.outer is not None:
            return mu, (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        centred = self.rows - mu
        return mu, centred.T @ centred / (self.n - 1)

    def gaussian(self) -> Gaussian:
        """The normal distribution of the same mean and covariance."""
        return Gaussian.of_features(self.rows) if self.outer is None else Gaussian.of_moments(*self.moments(), self.n)


class FeatureStatistics:
    """Mean and covariance of features, in float64, of all images and of each of K sources.

    >>> statistics = FeatureStatistics(num_sources=10)
    >>> for images, labels in batches:
    ...     statistics.update(detector.features(images), labels)
    >>> statistics.all_reduce()                     # over processes; ranks may have seen nothing at all
    >>> mu, sigma = statistics.moments(source=3)    # source=None: all images

    `groups`: {row: Group} of those that have images; row 0 is overall, row 1 + k is source k. The width F is learned
    from the first features. num_sources=0 keeps overall statistics alone; otherwise larger source ids make room for
    themselves.
    """

    def __init__(self, num_sources: int = 0):
        self.num_sources = num_sources  # K
        self.width = 0  # F; 0 before the first features
        self.groups = {}

    @property
    def n(self) -> torch.Tensor:
        """Images, int64 [1 + K]; row 0 is overall."""
        return torch.tensor([self.groups[row].n if row in self.groups else 0 for row in range(1 + self.num_sources)])

    def update(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> FeatureStatistics:
        """features: [N, F]; labels: [N] integers (-1: no source; counted overall only) or None.

        Raises ValueError for another width than before, and for values that are not finite.
        """
        f = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if self.width not in (0, f.shape[1]):
            raise ValueError(f"features of width {f.shape[1]} after features of width {self.width}")
        if bad := int((~f.isfinite()).any(1).sum()):
            raise ValueError(f"features of {bad} of {len(f)} images hold NaN or infinity")
        labels = torch.as_tensor([] if labels is None or not self.num_sources else labels).cpu()
        sources = [source for source in labels.unique().tolist() if source >= 0]
        self.num_sources, self.width = max(self.num_sources, 1 + max(sources, default=-1)), f.shape[1]
        self._group(0).update(f)
        for source in sources:
            self._group(1 + source).update(f[labels == source])
        return self

    def _group(self, row):
        return self.groups.setdefault(row, Group(self.width))

    def only(self, sources: Sequence[int]) -> FeatureStatistics:
        """Statistics of the images of some of the sources; they have to be known by source."""
        part = FeatureStatistics()
        part.width = self.width
        for row in (1 + source for source in sources):
            if row in self.groups:
                part._group(0).merge(self.groups[row])
        return part

    def all_reduce(self) -> FeatureStatistics:
        """Sum over all processes, also those that saw no image and so do not know the width yet."""
        if get_world_size() == 1:
            return self
        device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
        num_sources, width = all_reduce_(torch.tensor([self.num_sources, self.width], device=device), "max").tolist()
        if self.width not in (0, width):
            raise ValueError(f"features of width {self.width} on one process and {width} on another")
        self.num_sources, self.width = num_sources, width
        for row, total in enumerate(all_reduce_(self.n.to(device)).tolist()):
            if total:
                self._group(row).all_reduce(total, device)
        return self

    def count(self, source: int | None = None) -> int:
        """Images of one source or of all."""
        row = 0 if source is None else 1 + source
        return self.groups[row].n if row in self.groups else 0

    def _of_two(self, source):
        if (n := self.count(source)) < 2:
            where = "overall" if source is None else f"of source {source}"
            raise ValueError(f"{n} image(s) {where}: mean and covariance need at least 2")
        return self.groups[0 if source is None else 1 + source]

    def moments(self, source: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(mu [F], sigma [F, F]) float64 arrays, sigma with the n - 1 normalisation; of one source or overall.

        Raises ValueError with fewer than two images.
        """
        mu, sigma = self._of_two(source).moments()
        return mu.numpy(), sigma.numpy()

    def gaussian(self, source: int | None = None) -> Gaussian:
        """The same as what `distances.frechet` compares; a matrix [F, F] is made only where n > F."""
        return self._of_two(source).gaussian()


def require_memory(what: str, num_images: int, width: int, num_sources: int = 0) -> None:
    """Raises ValueError, in one line, where statistics of so many images of K sources would not fit into memory."""
    rows = min(num_images, width)
    needed = 8 * width * (rows * (1 + WORK) + min(num_images, num_sources * width))
    if needed <= (free := free_memory()):
        return
    per_source = "no statistics per source (--no-per-source), " if num_sources else ""
    raise ValueError(
        f"{what}: statistics of {num_images} images with {width} features take about {needed / 1e9:.3g} GB, and "
        f"{free / 1e9:.3g} GB are free: use fewer images, {per_source}smaller ones, or a detector of fewer features "
        f"such as classifier:FILE"
    )


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, and of its own address space where that is limited."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - psutil.Process().memory_info().vms)
    return max(free, 0)


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
