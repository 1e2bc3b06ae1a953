"""What stable targets change: the training loss of one network, and the spread of its target, with and without them.

Both are evaluated on the same draws (image, noise level, noise), so they differ by the target alone. Xu et al., "Stable
Target Field" (ICLR 2023): the target's variance falls at the noise levels where several images could have been the datum.
"""

import math

import torch

from torch_utils.random import seeded_generator
from training.dataset import load_arrays
from training.losses import Draws, EDM2Loss, StableTargets
from training.processes import aug_dim
from training.processes.pfgmpp import PosteriorMean
from training.processes.states import expand

EDGES = (0.0, 0.2, 0.6, 2.0, math.inf)  # noise levels between which the loss is also reported


@torch.no_grad()
def loss_statistics(
    net: torch.nn.Module, kernel, dataset, encoder, P_mean: float, P_std: float, num: int = 4096,
    num_references: int = 512, batch: int = 64, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Rows of {levels, target, count, mean, variance, target_variance} per image, without uncertainty weighting.

    target: "image" or "stable"; levels: "all" or a range of noise levels. mean, variance: of the loss over images.
    target_variance: mean square of the target minus what it estimates, the exact posterior mean over the whole data set
    (of the image's label), with the loss's weight; it does not depend on the network. kernel: GaussianKernel or PFGMpp.
    Reference batches are drawn per `batch` images, of the image's own label where the network has labels.
    """
    images, labels = load_arrays(dataset)
    labels = labels if net.label_dim else None
    device = next(net.parameters()).device
    clean = encoder.encode_latents(images.to(device), seeded_generator(device, seed, 0))
    labels = None if labels is None else labels.to(device)

    def references(n, generator):
        index = torch.randint(len(clean), [n], generator=generator, device=device)
        return clean[index], None if labels is None else labels[index]

    loss = EDM2Loss(P_mean, P_std, net.sigma_data, kernel=kernel, uncertainty=False)
    D = aug_dim(kernel)
    stable = StableTargets(references, num_references, D)
    exact = PosteriorMean(clean, D, labels)
    parts = {"image": ([], []), "stable": ([], [])}  # loss and spread of the target
    sigmas = []
    for start in range(0, num, batch):
        generator = seeded_generator(device, seed, 1, start)
        index = torch.randint(len(clean), [min(batch, num - start)], generator=generator, device=device)
        draws = loss.draw(clean[index], None if labels is None else labels[index], generator)
        center = exact(draws.images + draws.noise, draws.sigma, draws.labels)
        for name, target in (("image", draws.images), ("stable", stable(draws, generator))):
            losses = loss.evaluate(net, Draws({**draws, "targets": target}))
            spread = expand(draws.weight, center) * (target - center).square()
            for found, values in zip(parts[name], (losses, spread), strict=True):
                found.append(values.double().flatten(1).mean(1).cpu())
        sigmas.append(draws.sigma.cpu())
    sigma = torch.cat(sigmas)
    rows = []
    for low, high in [(0.0, math.inf), *zip(EDGES[:-1], EDGES[1:], strict=True)]:
        mask = (sigma >= low) & (sigma < high)
        name = "all" if (low, high) == (0.0, math.inf) else f"{low:g} to {high:g}"
        for target, values in parts.items():
            found, spread = (torch.cat(part)[mask] for part in values)
            if len(found) > 1:
                row = {"levels": name, "target": target, "count": len(found), "mean": float(found.mean())}
                rows.append({**row, "variance": float(found.var()), "target_variance": float(spread.mean())})
    return rows
