"""Denoising loss on held-out data at fixed noise levels and seeds: comparable between runs, arms and snapshots."""

import torch

from torch_utils.random import seeded_generator
from training.dataset import Dataset, label_rows, load_raw
from training.encoders import Encoder
from training.guidance import for_sampling
from training.processes import GaussianKernel

NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
BATCH = 256


class HeldOut:
    """Held-out images in memory: a data set, or a seeded subset of `max_images` of it."""

    def __init__(self, dataset: Dataset, seed: int = 0, max_images: int = 1024) -> None:
        if len(dataset) > max_images:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
            dataset = dataset.subset(order[:max_images].sort().values.numpy())
        self.images, self.labels = load_raw(dataset)
        self.label_dim, self.seed = dataset.label_dim, seed

    @torch.no_grad()
    def denoising_loss(self, net: torch.nn.Module, encoder: Encoder, kernel: object = None) -> dict:
        """Mean of |D(y + sigma n) - y|^2 (sigma^2 + sd^2) / (sigma sd)^2 per pixel, at each noise level (EDM's weight).

        n is the noise of `kernel`, for which the network was trained (None: Gaussian), and depends on (seed, i) alone for
        image i. Returns {"loss": mean over levels and images, "levels": {sigma: mean}}, and where labels are class ids also
        "sources": {label: mean}, "source_levels": {label: {sigma: mean}}. Raises ValueError where the loss of an image is
        not finite.
        """
        kernel, net = kernel or GaussianKernel(), for_sampling(net)
        device, sd, count = next(net.parameters()).device, net.sigma_data, len(self.images)
        table = torch.zeros(count, len(NOISE_LEVELS), dtype=torch.float64)
        for start in range(0, count, BATCH):
            rows = slice(start, min(start + BATCH, count))
            generators = [seeded_generator("cpu", self.seed, 7, i) for i in range(rows.start, rows.stop)]
            raw = self.images[rows].to(device)
            clean = encoder.encode_latents(raw, seeded_generator(device, self.seed, 8, start))
            given = self.label_dim and net.label_dim
            labels = label_rows(self.labels[rows], self.label_dim).to(device) if given else None
            means = []
            for sigma in NOISE_LEVELS:
                noise = torch.cat([kernel.unit_noise([1, *clean.shape[1:]], g) for g in generators])
                denoised = net(clean + sigma * noise.to(device), torch.full([len(clean)], sigma, device=device), labels)
                weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
                means.append(weight * (denoised - clean).double().square().flatten(1).mean(dim=1))
            table[rows] = torch.stack(means, dim=1).cpu()  # one transfer for all levels
        if len(bad := (~table.isfinite()).nonzero()):
            (image, column), images = bad[0].tolist(), len(bad[:, 0].unique())
            raise ValueError(
                f"the denoising loss of {images} of {count} held-out images is not finite, first that of image {image} at "
                f"sigma {NOISE_LEVELS[column]:g}: the network has diverged, or does not fit these data"
            )
        by_level = lambda rows: {f"{s:g}": float(v) for s, v in zip(NOISE_LEVELS, rows.mean(0), strict=True)}
        result = {"loss": float(table.mean()), "levels": by_level(table)}
        if self.labels.ndim == 1:
            ids = self.labels
            result["sources"] = {int(k): float(table[ids == k].mean()) for k in ids.unique()}
            result["source_levels"] = {int(k): by_level(table[ids == k]) for k in ids.unique()}
        return result
