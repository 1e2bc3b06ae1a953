"""Data sets of VAE latents: pixels -> posterior mean and standard deviation, and back to pictures."""

from __future__ import annotations

import os

import numpy as np
import torch

from training import encoders
from training.dataset.convert import DatasetWriter, check_dest
from training.dataset.sources import open_source


def encode_dataset(
    source,               # Images: path or package.
    dest,                 # Folder or .zip of latents, `IIIII/img-mean-std-IIIIIIII.npy`, float32 [8,H/8,W/8].
    *,
    model_url="stabilityai/sd-vae-ft-mse",  # VAE: local folder or name on the hub.
    max_images=None,      # Use only the first so many images.
    batch=8,              # Images per VAE call.
    device=None,          # None: a GPU where there is one.
    overwrite=False,
    dry_run=False,
    progress=lambda items, text: items,
):  # fmt: skip
    """Write a data set of latents; labels and sources are kept. Returns a summary dict. ValueError."""
    source, summary = _open(source, dest, max_images, overwrite, latents=False)
    if dry_run:
        return summary
    encoder, device = _encoder(model_url, batch, device)
    labels = source.labels if source.labels is not None else [None] * source.count
    with DatasetWriter(dest, overwrite, source.num_classes, source.class_names) as writer:
        for indices in progress(_batches(summary["count"], batch), os.path.basename(dest)):
            images = [np.array(source.read(i).convert("RGB")).transpose(2, 0, 1) for i in indices]
            _check_equal(images, [source.describe(i) for i in indices])
            latents = encoder.encode_pixels(torch.from_numpy(np.stack(images)).to(device)).cpu().numpy()
            for index, array in zip(indices, latents, strict=True):
                writer.add_latents(index, array, labels[index], source.describe(index))
    return summary


def decode_dataset(
    source,               # Data set of latents written by `encode_dataset`.
    dest,                 # Folder or .zip of images.
    *,
    model_url="stabilityai/sd-vae-ft-mse",
    max_images=None,
    batch=8,
    sample_seed=None,     # Draw latents from the posterior with this seed; None decodes its mean.
    device=None,
    overwrite=False,
    dry_run=False,
    progress=lambda items, text: items,
):  # fmt: skip
    """Write the pictures behind a data set of latents. Returns a summary dict. ValueError."""
    source, summary = _open(source, dest, max_images, overwrite, latents=True)
    if dry_run:
        return summary
    import PIL.Image

    encoder, device = _encoder(model_url, batch, device)
    generator = None if sample_seed is None else torch.Generator().manual_seed(sample_seed)
    labels = source.labels if source.labels is not None else [None] * source.count
    with DatasetWriter(dest, overwrite, source.num_classes, source.class_names) as writer:
        for indices in progress(_batches(summary["count"], batch), os.path.basename(dest)):
            arrays = [np.asarray(source.read(i), dtype=np.float32) for i in indices]
            _check_equal(arrays, [source.describe(i) for i in indices])
            raw = torch.from_numpy(np.stack(arrays))
            if generator is None and raw.shape[1] == 2 * encoder.scale.numel():
                raw[:, raw.shape[1] // 2 :] = 0  # No spread: the posterior mean.
            images = encoder.decode(encoder.encode_latents(raw, generator).to(device)).cpu()
            for index, image in zip(indices, images, strict=True):
                picture = PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                writer.add_image(index, picture, labels[index], source.describe(index))
    return summary


def _open(path, dest, max_images, overwrite, latents):
    check_dest(dest, overwrite)
    source = open_source(path)
    if source.latents != latents:
        raise ValueError(
            f"--source={path}: holds images, not latents; run `dataset_tool.py encode` first"
            if latents
            else f"--source={path}: holds arrays, not images; encode takes images"
        )
    count = source.count if max_images is None else min(source.count, max_images)
    return source, {"source": source.name, "dest": os.fspath(dest), "count": count, "num_classes": source.num_classes}


def _encoder(model_url, batch, device):
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = encoders.StabilityVAEEncoder(vae_name=model_url, batch_size=batch)
    encoder.init(device)
    return encoder, device


def _batches(count, size):
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _check_equal(arrays, names):
    for array, name in zip(arrays, names, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(f"{name}: shape {list(array.shape)} differs from {list(arrays[0].shape)}; convert first")
