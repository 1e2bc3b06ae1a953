"""Energy-based models in one and two dimensions, one for all sources or one per source (theory paper, Sec. 4.3).

The paper has no energy-based experiment; this one follows its model class: energy u(x, y) = MLP(x, V[y]) on [0, 1]^D
and p(x | y) = exp(-u) / integral exp(-u). In so few dimensions the integral is exact up to quadrature, so maximum
likelihood needs no sampling, and total variation is an integral as well.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math

import numpy as np
import torch

from simulations.configs import EbmConfig, Rule
from simulations.mle import MLP, Conditional, Outcome, compare, fit, mixed_fields


def quadrature(D: int, panels: int, nodes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss-Legendre rule on [0, 1]^D: points [G, D] and weights [G], G = (panels * nodes)^D."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    axis = ((np.arange(panels)[:, None] + (x + 1) / 2) / panels).reshape(-1)
    weight = np.tile(w / (2 * panels), panels)
    grid = np.stack(np.meshgrid(*[axis] * D, indexing="ij"), axis=-1).reshape(-1, D)
    return grid, functools.reduce(np.outer, [weight] * D).reshape(-1)


TV_PANELS = {1: 2048, 2: 128}  # errors far below those between seeds
TRAINING_PANELS = {1: 64, 2: 12}


class Truth:
    """Smooth densities of the K sources: log p_k = scale * mixed_fields - log Z_k.

    A random field is a cosine series over the frequencies 0..modes per axis without the constant, with normal
    coefficients, E f^2 = 1 on average over the square.
    """

    def __init__(self, config: EbmConfig, seed: int) -> None:
        self.D, self.K = config.D, config.K
        rng = np.random.default_rng([seed, 0])
        self.frequencies = np.array(list(itertools.product(range(config.modes + 1), repeat=config.D))[1:])  # [F, D]
        count = len(self.frequencies)
        size = np.sqrt(2.0 ** (self.frequencies > 0).sum(axis=1) / count)  # unit power for each frequency
        self.coefficients = config.scale * size * mixed_fields(config, lambda: rng.standard_normal(count))  # [K, F]
        points, weights = quadrature(config.D, 64, 8)
        self.log_z = np.log(np.exp(self._field(points)) @ weights)  # [K]

    def _field(self, x: np.ndarray, source: int | None = None) -> np.ndarray:
        basis = np.cos(np.pi * x[:, None, :] * self.frequencies).prod(axis=2)  # [G, F]
        return (self.coefficients if source is None else self.coefficients[source]) @ basis.T

    def log_density(self, x: np.ndarray, source: int) -> np.ndarray:
        """log p(x | source) at x [G, D]."""
        parts = [self._field(part, source) for part in np.array_split(x, len(x) // 2**16 + 1)]
        return np.concatenate(parts) - self.log_z[source]

    def sample(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """n i.i.d. pairs by rejection: x [n, D], sources [n]. Nested: fewer samples are the first of more."""
        sources = np.random.default_rng([seed, 1]).integers(0, self.K, size=n)
        x = np.empty([n, self.D])
        for k in range(self.K):
            x[sources == k] = self._sample_source(int((sources == k).sum()), k, seed)
        return x, sources

    def _sample_source(self, count: int, source: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, 2, source])
        grid, _ = quadrature(self.D, 64)
        slope = np.pi * np.abs(self.coefficients[source]) @ np.linalg.norm(self.frequencies, axis=1)
        highest = self._field(grid, source).max() + slope * math.sqrt(self.D) / 128  # an upper bound, not a guess
        accepted = [np.empty([0, self.D])]
        while sum(map(len, accepted)) < count:
            proposal = rng.random([4096, self.D])
            accepted.append(proposal[np.log(rng.random(4096)) < self._field(proposal, source) - highest])
        return np.concatenate(accepted)[:count]


class EBM(Conditional):
    """energy(x [r, D], source [r]) -> [r]; p(x | y) = exp(-energy) / Z_y. Label embeddings in [0, 1]^de."""

    def __init__(self, K: int, D: int, de: int, W: int, L: int) -> None:
        super().__init__()
        self.labels = torch.nn.Parameter(torch.rand(K, de))
        self.mlp = MLP(D + de, 1, W, L)
        with torch.no_grad():  # first-layer kinks at random points of the cube; at zero, they leave bad local optima
            first = self.mlp.layers[0]
            first.bias.copy_(-(first.weight * torch.rand(first.weight.shape)).sum(dim=1))
        points, weights = quadrature(D, TRAINING_PANELS[D])
        self.register_buffer("points", torch.from_numpy(points).float(), persistent=False)
        self.register_buffer("log_weights", torch.from_numpy(np.log(weights)).float(), persistent=False)

    def energy(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([x, self.labels[source]], dim=1)).squeeze(1)

    def nll(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood, normalised on the training grid."""
        present, inverse = source.unique(return_inverse=True)
        labels = present.repeat_interleave(len(self.points))
        energy = self.energy(self.points.repeat(len(present), 1), labels).view(len(present), -1)
        log_z = torch.logsumexp(self.log_weights - energy, dim=1)  # [sources present]
        return (self.energy(x, source) + log_z[inverse]).mean()

    @torch.no_grad()
    def log_density(self, x: np.ndarray, source: int, panels: int) -> np.ndarray:
        """log p(x | source) in float64 at x [G, D], normalised on a grid of `panels` per axis; 512 are exact to 1e-6."""
        grid, weights = quadrature(x.shape[1], panels)
        model = copy.deepcopy(self).double()

        def energy(points):
            parts = torch.from_numpy(np.ascontiguousarray(points)).split(1 << 16)
            return torch.cat([model.energy(p, torch.full([len(p)], source)) for p in parts])

        log_z = torch.logsumexp(torch.from_numpy(np.log(weights)) - energy(grid), dim=0)
        return (-energy(x) - log_z).numpy()


def run_cell(config: EbmConfig, rule: Rule, seed: int) -> Outcome:
    """Draw sources and data, fit one multi-source and K single-source networks by the same rule, measure by quadrature."""
    D, truth = config.D, Truth(config, seed)
    x, sources = truth.sample(config.n, seed)
    points, weights = quadrature(D, TV_PANELS[D])
    densities = np.exp([truth.log_density(points, k) for k in range(config.K)])  # [K, G]

    def tv(p, q):
        return 0.5 * float(np.abs(p - q) @ weights)

    def train(own, labels, count):
        data, labels = torch.from_numpy(x[own]).float(), torch.from_numpy(labels)
        build = lambda: EBM(count, D, config.de, config.W, config.L)
        return fit(build, lambda model, index: model.nll(data[index], labels[index]), len(data), rule, seed)

    def density(model, label):
        return np.exp(model.log_density(points, label, TV_PANELS[D]))

    def histogram(own):  # about 2 n^(1/(D + 2)) bins per axis
        bins = max(1, round(2 * len(own) ** (1 / (D + 2))))
        cell = lambda z: np.ravel_multi_index(np.minimum((z * bins).astype(int), bins - 1).T, [bins] * D)
        return np.bincount(cell(x[own]), minlength=bins**D)[cell(points)] * bins**D / len(own)

    return compare(densities, np.ones(len(points)), tv, sources, train, density, histogram)
