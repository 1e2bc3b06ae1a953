"""What stable targets change: the training loss of one network, and the spread of its target, with and without them.

Both are evaluated on the same draws (image, noise level, noise), so they differ by the target alone. Xu et al., "Stable
Target Field" (ICLR 2023): the target's variance falls at the noise levels where several images could have been the datum.
"""

import math
from collections import defaultdict

import torch

from torch_utils.random import seeded_generator
from training.dataset import load_arrays
from training.encoders import StandardRGBEncoder
from training.losses import Draws, EDM2Loss, StableTargets
from training.processes import GaussianKernel, aug_dim
from training.processes.pfgmpp import PosteriorMean
from training.processes.states import expand

EDGES = (0.0, 0.2, 0.6, 2.0, math.inf)  # noise levels between which the loss is also reported
RANGES = {"all": (0.0, math.inf)} | {f"{a:g} to {b:g}": (a, b) for a, b in zip(EDGES[:-1], EDGES[1:], strict=True)}


@torch.no_grad()
def loss_statistics(
    net: torch.nn.Module, kernel, dataset, encoder, P_mean: float, P_std: float, num: int = 4096,
    num_references: int = 512, batch: int = 64, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Rows of {levels, target, count, mean, variance, target_variance} per image, without uncertainty weighting.

    target: "image" or "stable"; levels: "all" or a range of noise levels. mean, variance: of the loss over images.
    target_variance: mean square of the target minus what it estimates, the exact posterior mean over the whole data set
    (of the image's label), with the loss's weight; it does not depend on the network. kernel: GaussianKernel or PFGMpp,
    None: Gaussian; encoder: None: pixels. Reference batches are drawn per `batch` images, of the image's own label where
    the network has labels.
    """
    images, labels = load_arrays(dataset)
    device = next(net.parameters()).device
    encoder = encoder or StandardRGBEncoder()
    clean = encoder.encode_latents(images.to(device), seeded_generator(device, seed, 0))
    labels = labels.to(device) if net.label_dim else None

    def draw(n, generator):
        index = torch.randint(len(clean), [n], generator=generator, device=device)
        return clean[index], None if labels is None else labels[index]

    loss = EDM2Loss(P_mean, P_std, net.sigma_data, kernel=kernel or GaussianKernel(), uncertainty=False)
    stable = StableTargets(draw, num_references, aug_dim(kernel))
    exact = PosteriorMean(clean, aug_dim(kernel), labels)
    found, sigma = defaultdict(list), []  # per target: losses and its spread, [2, n]
    for start in range(0, num, batch):
        generator = seeded_generator(device, seed, 1, start)
        draws = loss.draw(*draw(min(batch, num - start), generator), generator)
        center = exact(draws.images + draws.noise, draws.sigma, draws.labels)
        sigma.append(draws.sigma.cpu())
        for name, target in (("image", draws.images), ("stable", stable(draws, generator))):
            losses = loss.evaluate(net, Draws({**draws, "targets": target}))
            spread = expand(draws.weight, center) * (target - center).square()
            found[name].append(torch.stack([v.double().flatten(1).mean(1).cpu() for v in (losses, spread)]))
    sigma, rows = torch.cat(sigma), []
    for levels, (low, high) in RANGES.items():
        mask = (sigma >= low) & (sigma < high)
        for target, parts in found.items():
            losses, spread = torch.cat(parts, dim=1)[:, mask]
            if len(losses) > 1:
                row = {"levels": levels, "target": target, "count": len(losses), "mean": float(losses.mean())}
                rows.append({**row, "variance": float(losses.var()), "target_variance": float(spread.mean())})
    return rows
