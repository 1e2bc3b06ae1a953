"""2-D data sets for the experiments on points: a registry of samplers, with densities where they are known.

CLD's two (Dockhorn et al. 2022, appendix on toy data), and the standard ones of the field. `TOY_DATA[name](n, generator)`
returns n points, float32 [n, 2]; an entry of your own is a choice of simulations/run_toy.py at once.
"""

import math

import torch

from dnnlib.util import one_of
from simulations import tree

CENTERS = ((0.0, 0.0), (0.8, 0.8), (0.8, -0.8), (-0.8, -0.8), (-0.8, 0.8))


def multimodal_swissroll(n, generator=None):
    """Five swiss rolls of radius 0.047 to 0.141: one at the origin, four at (+-0.8, +-0.8).

    A roll is (a cos a, a sin a) / 100 with a = 1.5 pi (1 + 2 U), plus noise of standard deviation 0.002. How many points
    fall into each is multinomial.
    """
    a = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    roll = torch.stack([a * a.cos(), a * a.sin()], dim=1) + 0.2 * torch.randn(n, 2, generator=generator)
    return 0.01 * roll + torch.tensor(CENTERS)[torch.randint(5, (n,), generator=generator)]


def swissroll_logp(x: torch.Tensor, nodes: int = 2048) -> torch.Tensor:
    """log density [N] of `multimodal_swissroll` at points [N, 2]: noise around the curve of the nearest roll, by the midpoint
    rule; the next one is 400 standard deviations away.
    """
    a = 1.5 * math.pi * (1 + 2 * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes)
    roll = 0.01 * torch.stack([a * a.cos(), a * a.sin()], dim=1)
    centers, found = torch.tensor(CENTERS, dtype=torch.float64), []
    for rows in x.double().split(256):
        away = rows - centers[torch.cdist(rows, centers).argmin(dim=1)]
        squares = torch.cdist(away, roll).square() / (2 * 0.002**2)
        found.append(torch.logsumexp(-squares, dim=1) - math.log(nodes * len(CENTERS) * 2 * math.pi * 0.002**2))
    return torch.cat(found)


def _grid(reach, pitch, std, turn=((1.0, 0.0), (0.0, 1.0)), weights=None):
    """Mixture of Gaussians on a square grid of -reach to reach times the pitch, turned; equal weights by default."""
    side = pitch * torch.arange(-reach, reach + 1, dtype=torch.float64)
    centers = torch.cartesian_prod(side, side) @ torch.as_tensor(turn, dtype=torch.float64)
    covariance = (std**2 * torch.eye(2, dtype=torch.float64)).expand(len(centers), 2, 2)
    return tree.GaussianMixture([1 / len(centers)] * len(centers) if weights is None else weights, centers, covariance)


def mixture():
    """Nine Gaussians of standard deviation 0.05 with weights 1 to 9, on a tilted grid of pitch 0.6."""
    return _grid(1, 0.6, 0.05, ((0.8, -0.6), (0.6, 0.8)), range(1, 10))


def rings(n, generator=None):
    """Three rings of radius 0.3, 0.6 and 0.9 with points in proportion to their length, radial noise 0.02."""
    which = torch.multinomial(torch.tensor([1.0, 2.0, 3.0]), n, replacement=True, generator=generator)
    radius = 0.3 * (which + 1) + 0.02 * torch.randn(n, generator=generator)
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)


def rings_logp(x):
    """log density [N] of `rings` at points [N, 2] (to the accuracy of radial noise that never reaches the centre)."""
    r = x.double().norm(dim=1, keepdim=True)  # [N, 1]
    centres = 0.3 * torch.arange(1, 4, dtype=torch.float64)
    radial = -0.5 * ((r - centres) / 0.02) ** 2 - math.log(0.02 * math.sqrt(2 * math.pi))
    return torch.logsumexp(radial + torch.log(centres / centres.sum()), dim=1) - torch.log(2 * math.pi * r[:, 0])


# name: function without arguments -> mixture with .sample, .logp and .denoiser; each is one of TOY_DATA too.
MIXTURES = {
    "diamond": lambda: _grid(1, 0.5 / math.sqrt(2), 0.04, ((1.0, -1.0), (1.0, 1.0))),  # pitch 0.5, at 45 degrees
    "25gaussians": lambda: _grid(2, 0.4, 0.03),
    "mixture": mixture,
    "tree": lambda: tree.ground_truth("A"),
}


def _sampler(make):
    return lambda n, generator=None: make().sample((n,), generator=generator).float()


TOY_DATA = {"multimodal_swissroll": multimodal_swissroll, "rings": rings} | {
    k: _sampler(m) for k, m in MIXTURES.items()
}


def get(name):
    """Sampler of a data set by name. Raises ValueError that lists the known ones."""
    if name not in TOY_DATA:
        raise ValueError(f"--dataset={name} {one_of(name, TOY_DATA)}")
    return TOY_DATA[name]


def logp(name):
    """The true log density as a function of points [N, 2], or None where nobody wrote it down."""
    known = {"rings": rings_logp, "multimodal_swissroll": swissroll_logp}
    return (lambda x: MIXTURES[name]().logp(x.float()).double()) if name in MIXTURES else known.get(name)
