"""PFGM++'s toy notebook: two clusters in 1000 dimensions, learned and sampled at several D, judged by its own discrepancy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from metrics.distances import gaussian_kernel
from torch_utils.random import hash_seed, seeded_generator
from training.losses.denoising import EDMLoss
from training.networks_toy import MLPDenoiser
from training.processes.pfgmpp import PFGMpp
from training.samplers import heun

LATENT, N = 10, 1000


def clusters(count: int, embedding: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[2 count, N, 1, 1]: two Gaussians in 10 dimensions (means +1 and -1, standard deviation 0.2), embedded, plus 0.01 noise.

    embedding: [10, N]. The division is the notebook's, which takes the points for ones of variance 1; they have 10.
    """
    means = torch.ones(count, LATENT).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).repeat(count)[:, None]
    latents = means + 0.2 * torch.randn(2 * count, LATENT, generator=generator)
    points = latents @ embedding + 0.01 * torch.randn(2 * count, N, generator=generator)
    return (points / math.hypot(0.2, 1)).clamp(-100, 100)[:, :, None, None]


def discrepancy(x: torch.Tensor, y: torch.Tensor) -> float:
    """The notebook's MMD of points [n, ...] and [m, ...]: biased, the sum of five Gaussian kernels exp(-d^2 / b).

    b: a quarter of the mean squared distance of all points, then doubled four times.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    both = torch.cat([x, y])
    mean = 2 * both.var(0).sum()  # of the squared distance of two different points
    kernels = [gaussian_kernel(float((mean / 4 * 2**i / 2).sqrt())) for i in range(5)]
    inside = lambda a, b: float(sum(kernel(a, b).mean() for kernel in kernels))
    return inside(x, x) + inside(y, y) - 2 * inside(x, y)


def rows(dims: Sequence[float], seeds: Sequence[int], count: int, epochs: int, batch: int = 128) -> list[dict]:
    """{D, seed, mmd, floor, loss_first, loss_last}: each seed draws its own embedding, points, weights and noise.

    floor: the discrepancy of fresh points from the training points. losses: weighted, summed over coordinates, first and last
    epoch. A network of width 32, Adam 1e-3, ln sigma ~ N(-1.2, 1.2^2); Heun, 50 steps, sigma 50 to 0.001.
    """
    found = []
    for seed in seeds:
        generator = seeded_generator("cpu", seed, 0)
        embedding = torch.randn(LATENT, N, generator=generator)
        data, fresh = (clusters(count, embedding, generator) for _ in range(2))
        for D in dims:
            kernel, draws = PFGMpp(D), seeded_generator("cpu", seed, 1)
            torch.manual_seed(hash_seed(seed, 2))
            net = MLPDenoiser(hidden_dim=32, sigma_data=1.0, in_dim=N)
            loss = EDMLoss(sigma_data=1.0, kernel=kernel)
            optimizer, means = torch.optim.Adam(net.parameters(), lr=1e-3), []
            for _ in range(epochs):
                total = 0.0
                for index in torch.randperm(len(data), generator=draws).split(batch):
                    losses = loss.evaluate(net, loss.draw(data[index], generator=draws)).flatten(1).sum(1)
                    optimizer.zero_grad()
                    losses.mean().backward()
                    optimizer.step()
                    total += float(losses.detach().sum())
                means.append(total / len(data))
            noise = kernel.unit_noise(data.shape, seeded_generator("cpu", seed, 3))
            samples = heun(net, noise, num_steps=50, sigma_min=0.001, sigma_max=50)
            scores = dict(mmd=discrepancy(samples, data), floor=discrepancy(fresh, data))
            found.append({"D": f"{D:g}", "seed": seed, **scores, "loss_first": means[0], "loss_last": means[-1]})
    return found
