"""Phase alignment of PFGM++ (Figure 3): at equal sigma = r / sqrt(D) the posterior over the data is the same for every D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from metrics import figures
from metrics.table import grouped
from torch_utils.random import seeded_generator
from training.dataset import ImageFolderDataset, load_arrays
from training.encoders import StandardRGBEncoder
from training.processes import GaussianKernel
from training.processes.pfgmpp import PFGMpp, posterior_weights


def mean_tvd(
    data: torch.Tensor, kernel: GaussianKernel, sigmas: Sequence[float], num: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard error) [len(sigmas)] of the total variation distance of the posterior over the data from uniform.

    1/2 sum_i |w_i - 1/n| of `num` noisy points of data [n, *data_shape]: near 1 where a point knows its datum, near 0 where
    it has forgotten it. The noise is the same at every sigma, and for every D but for its length.
    """
    n = len(data)
    index = torch.arange(num) % n
    noise = kernel.unit_noise((num, *data.shape[1:]), generator, dtype=torch.float64)
    found = []
    for sigma in sigmas:
        weights = posterior_weights(data[index].double() + sigma * noise, data, sigma, kernel.D)
        found.append((weights - 1 / n).abs().sum(1) / 2)
    return torch.stack([tvd.mean() for tvd in found]), torch.stack([tvd.std() / num**0.5 for tvd in found])


def rows(
    dataset: ImageFolderDataset, dims: Sequence[float], sigmas: Sequence[float], num: int, seed: int
) -> list[dict]:
    """{D, sigma, tvd, error} of the images of a data set, in the units that networks see. Raises ValueError for sigma <= 0."""
    if not min(sigmas) > 0 or not math.isfinite(sum(sigmas)):
        raise ValueError(f"--sigmas={','.join(f'{s:g}' for s in sigmas)}: give noise levels > 0")
    images = StandardRGBEncoder().encode_latents(load_arrays(dataset)[0])
    found = []
    for D in dims:
        parts = mean_tvd(images, PFGMpp(D), sigmas, num, seeded_generator("cpu", seed, 12))
        values = zip(sigmas, *(part.tolist() for part in parts), strict=True)
        found += [{"D": f"{D:g}", "sigma": sigma, "tvd": tvd, "error": error} for sigma, tvd, error in values]
    return found


def plot(found: Sequence[dict], stem: str | Path) -> list[Path]:
    """The distance against r = sigma sqrt(D) of finite D, where curves are apart, and against sigma, where they meet."""
    fig, (left, right) = figures.figure(columns=2, width=3.6, height=2.8, sharey=True)
    curves = grouped((row["D"], row) for row in found)
    for look, (D, line) in zip(figures.ordered(list(curves)), curves.items(), strict=True):
        tvd, sigma = [row["tvd"] for row in line], [row["sigma"] for row in line]
        bars = [1.96 * row["error"] for row in line]
        finite, style = math.isfinite(float(D)), look | dict(markersize=3.5, capsize=1.5, linewidth=1.1)
        figures.intervals(right, sigma, tvd, bars, label=f"$D$ = {D}" if finite else r"$D = \infty$", **style)
        if finite:
            figures.intervals(left, [s * float(D) ** 0.5 for s in sigma], tvd, bars, **style)
    left.set(xscale="log", xlabel=r"$r = \sigma\,\sqrt{D}$", ylabel="total variation distance\nfrom uniform")
    right.set(xscale="log", xlabel=r"noise level $\sigma$")
    figures.legend(right)
    return figures.save(fig, stem)
