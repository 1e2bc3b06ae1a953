"""Denoising loss on held-out data at fixed noise levels and seeds: comparable between runs, arms and snapshots."""

import torch

from torch_utils.random import seeded_generator
from training.dataset import load_arrays

NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


@torch.no_grad()
def denoising_loss(net, dataset, encoder, noise_levels=NOISE_LEVELS, seed=0, max_images=1024, batch=256, kernel=None):
    """Mean of |D(y + sigma n) - y|^2 (sigma^2 + sd^2) / (sigma sd)^2 per pixel, at each noise level (EDM's weight).

    The noise of image i depends on (seed, i) alone. Returns {"loss": mean over levels and images,
    "levels": {sigma: mean}, "sources": {label: mean}} (sources only where the data has labels).
    """
    device = next(net.parameters()).device
    chosen = dataset
    if len(dataset) > max_images:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        chosen = dataset.subset(order[:max_images].sort().values.numpy())
    images, labels = load_arrays(chosen)
    sd = getattr(net, "sigma_data", 0.5)
    table = torch.zeros(len(chosen), len(noise_levels), dtype=torch.float64)
    for start in range(0, len(chosen), batch):
        rows = slice(start, min(start + batch, len(chosen)))
        generators = [seeded_generator("cpu", seed, 7, i) for i in range(rows.start, rows.stop)]
        clean = encoder.encode_latents(images[rows].to(device), seeded_generator(device, seed, 8, start))
        onehot = labels[rows].to(device) if labels.shape[1] and net.label_dim else None
        for column, sigma in enumerate(noise_levels):
            if kernel is None:
                noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators])
            else:
                noise = torch.cat([kernel.unit_noise([1, *clean.shape[1:]], g) for g in generators])
            denoised = net(clean + sigma * noise.to(device), torch.full([len(clean)], sigma, device=device), onehot)
            weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
            table[rows, column] = weight * (denoised - clean).double().square().flatten(1).mean(dim=1).cpu()
    result = {
        "loss": float(table.mean()),
        "levels": {f"{s:g}": float(v) for s, v in zip(noise_levels, table.mean(0), strict=True)},
    }
    if labels.shape[1]:
        ids = labels.argmax(dim=1)
        result["sources"] = {int(k): float(table[ids == k].mean()) for k in ids.unique()}
    return result
