"""Data sets of VAE latents: pixels -> posterior mean and standard deviation, and back to pictures."""

from __future__ import annotations

import os

import numpy as np
import PIL.Image
import torch

from dnnlib import outputs
from training import encoders
from training.dataset.convert import LatentOptions
from training.dataset.sources import open_source
from training.dataset.writing import DATA_SET, Item, check_dest, dataset_writer


def encode_dataset(source: str, dest: str, **options: object) -> dict:
    """Write a data set of latents, `IIIII/img-mean-std-IIIIIIII.npy`, float32 [8,H/8,W/8]; labels and sources are kept.

    options: those of LatentOptions. Returns a summary. ValueError.
    """

    read = lambda image: np.array(image.convert("RGB")).transpose(2, 0, 1)
    encode = lambda encoder, pixels, device: encoder.encode_pixels(pixels.to(device)).cpu().numpy()
    return _translate(source, dest, LatentOptions(**options), read, encode, from_latents=False)


def decode_dataset(source: str, dest: str, **options: object) -> dict:
    """Write the pictures behind a data set of latents written by `encode_dataset`. Otherwise the same."""
    o = LatentOptions(**options)
    generator = None if o.sample_seed is None else torch.Generator().manual_seed(o.sample_seed)

    read = lambda array: np.asarray(array, dtype=np.float32)

    def decode(encoder, raw, device):
        if generator is None and raw.shape[1] == 2 * encoder.scale.numel():
            raw[:, raw.shape[1] // 2 :] = 0  # no spread: the posterior mean
        images = encoder.decode(encoder.encode_latents(raw, generator).to(device)).cpu()
        return [PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]

    return _translate(source, dest, o, read, decode, from_latents=True)


def _translate(path, dest, o, read, translate, from_latents):
    """read: item of the source -> array [C,H,W]; translate: (encoder, [N,C,H,W], device) -> N items to write."""
    others = [outputs.Named("--source", path, True), outputs.Named("--model-url", o.model_url, True)]
    check_dest("--dest", dest, others, new=o.dry_run and not o.overwrite)
    source = open_source(path)
    if source.latents != from_latents:
        raise ValueError(
            f"--source={path}: holds images, not latents; run `dataset_tool.py encode` first"
            if from_latents
            else f"--source={path}: holds arrays, not images; encode takes images"
        )
    count = source.count if o.max_images is None else min(source.count, o.max_images)
    summary = {"source": source.name, "dest": os.fspath(dest), "count": count, "num_classes": source.num_classes}
    if o.dry_run:
        return summary
    device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = encoders.StabilityVAEEncoder(vae_name=o.model_url, batch_size=o.batch)
    encoders.use_vae(encoder, o.model_url)
    encoder.init(device)
    labels = source.labels if source.labels is not None else [None] * source.count
    batches = [range(start, min(start + o.batch, count)) for start in range(0, count, o.batch)]
    claim = outputs.claimed("--dest", dest, DATA_SET, others, new=not o.overwrite)
    with claim as lock, dataset_writer(dest, lock, source) as writer:
        for indices in o.progress(batches, os.path.basename(dest)):
            names = [source.describe(i) for i in indices]
            arrays = [read(source.read(i)) for i in indices]
            for array, name in zip(arrays, names, strict=True):
                if array.shape != arrays[0].shape:
                    shapes = f"shape {list(array.shape)} differs from {list(arrays[0].shape)}"
                    raise ValueError(f"{name}: {shapes}; convert first")
            items = translate(encoder, torch.from_numpy(np.stack(arrays)), device)
            for index, item, name in zip(indices, items, names, strict=True):
                writer.add(Item.of(index, item, name), labels[index], name)
    return summary
