"""Data sets of VAE latents: pixels -> posterior mean and standard deviation, and back to pictures; on any number of ranks.

Every rank translates whole batches, the first one writes them in order: batches, and so the bytes on one kind of device, do
not depend on the number of ranks. Called again, an interrupted command goes on after its last whole batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from dnnlib import outputs
from dnnlib.util import traits, usable_cores
from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator, hash_seed
from training import encoders
from training.dataset.convert import LatentOptions, in_order
from training.dataset.sources import join, open_source
from training.dataset.writing import DATA_SET, Item, check_dest, dataset_writer, work_key


def encode_dataset(source: str | Sequence[str], dest: str, **options: object) -> dict:
    """Write a data set of latents, `IIIII/img-mean-std-IIIIIIII.npy`, float32 [8,H/8,W/8]; labels and sources are kept.

    source: a data set, or several that are joined. options: those of LatentOptions. Returns a summary. ValueError.
    """

    read = lambda image: np.array(image.convert("RGB")).transpose(2, 0, 1)
    encode = lambda encoder, pixels, indices, device: encoder.encode_pixels(pixels.to(device)).cpu().numpy()
    return _translate(source, dest, LatentOptions(**options), read, encode, from_latents=False)


def decode_dataset(source: str | Sequence[str], dest: str, **options: object) -> dict:
    """Write the pictures behind a data set of latents written by `encode_dataset`. Otherwise the same."""
    o = LatentOptions(**options)
    read = lambda array: np.asarray(array, dtype=np.float32)

    def decode(encoder, raw, indices, device):
        generator = None
        if o.sample_seed is not None:
            generator = StackedRandomGenerator("cpu", [hash_seed(o.sample_seed, i) for i in indices])
        elif raw.shape[1] == 2 * encoder.scale.numel():
            raw[:, raw.shape[1] // 2 :] = 0  # no spread: the posterior mean
        images = encoder.decode(encoder.encode_latents(raw, generator).to(device)).cpu()
        return [PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]

    return _translate(source, dest, o, read, decode, from_latents=True)


def _translate(source, dest, o, read, translate, from_latents):
    """read: item of the source -> array [C,H,W]; translate: (encoder, [N,C,H,W], indices, device) -> N items to write."""
    paths = [source] if isinstance(source, (str, os.PathLike)) else [*source]
    others = [outputs.Named("--source", os.fspath(path), True) for path in paths]
    others.append(outputs.Named("--vae", o.model_url, True))
    check_dest("--dest", dest, others, new=o.dry_run and not o.overwrite)
    source = join([open_source(path) for path in paths])
    if source.latents != from_latents:
        where = f"--source={'+'.join(map(os.fspath, paths))}"
        raise ValueError(
            f"{where}: holds images, not latents; run `dataset_tool.py encode` first"
            if from_latents
            else f"{where}: holds arrays, not images; encode takes images"
        )
    count = source.count if o.max_images is None else min(source.count, o.max_images)
    summary = {"source": source.name, "dest": os.fspath(dest), "count": count, "num_classes": source.num_classes}
    summary["resumed"] = 0  # images that the same command, interrupted, had done
    device, first = dist.init(o.device), dist.get_rank() == 0
    encoder = encoders.StabilityVAEEncoder(vae_name=o.model_url, batch_size=o.batch)
    encoders.use_vae(encoder, o.model_url)
    _first_one_first(lambda: encoder.init(device))  # a VAE of the hub is loaded once
    labels = source.labels if source.labels is not None else [None] * source.count
    batches = [range(start, min(start + o.batch, count)) for start in range(0, count, o.batch)]
    look = lambda index, stored: read(source.decode(stored, source.describe(index), False))
    workers = max(usable_cores() // dist.get_world_size(), 1)

    def translated(batch, shape):
        """(items of a batch as Item.of takes them, its shape)."""
        found = [next(arrays) for _ in batch]
        for index, array in zip(batch, found, strict=True):
            shape = shape or array.shape
            if array.shape != shape:
                shapes = f"shape {list(array.shape)} differs from {list(shape)}"
                raise ValueError(f"{source.describe(index)}: {shapes}; convert first")
        if o.dry_run and batch is not mine[0]:  # whether the VAE takes them shows with the first
            return [], shape
        items = translate(encoder, torch.from_numpy(np.stack(found)), batch, device)
        return [Item.of(i, item, source.describe(i)) for i, item in zip(batch, items, strict=True)], shape

    def add(writer, items):
        for item in items:
            index = len(writer.labels)
            writer.add(item, labels[index], source.describe(index))

    def step(start, shape):
        """The items of a round in order, on the first rank, and the shape; the first error of a round is everybody's."""
        at, done = start + dist.get_rank(), ([], shape)
        batch = batches[at] if at < len(batches) else None
        try:
            done = translated(batch, shape) if batch else done
        except ValueError as err:
            done = str(err), shape
        parts = dist.gather_objects(done)
        error = dist.broadcast_object(next((text for text, _ in parts or [] if isinstance(text, str)), None))
        if error is not None:
            raise ValueError(error)
        return [item for items, _ in parts or [] for item in items], dist.broadcast_object(parts and parts[0][1])

    with contextlib.ExitStack() as stack:
        writer, begun, shape = None, 0, None
        if first and not o.dry_run:
            vae = traits(o.model_url) if os.path.exists(o.model_url) else o.model_url
            kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            made_so = (from_latents, vae, o.batch, o.sample_seed, kind, torch.__version__)
            key = work_key(source, paths, range(count), *made_so)
            lock = stack.enter_context(outputs.claimed("--dest", dest, DATA_SET, others, not o.overwrite, key))
            writer = stack.enter_context(dataset_writer(dest, lock, source, key))
            for batch in batches:
                items = [writer.kept(index, not from_latents) for index in batch]
                if None in items:
                    break
                add(writer, items)
                begun += 1
            summary["resumed"] = len(writer.labels)
        rounds = range(dist.broadcast_object(begun), len(batches), dist.get_world_size())
        mine = [batches[start + dist.get_rank()] for start in rounds if start + dist.get_rank() < len(batches)]
        arrays = in_order(look, source.fetch, (index for batch in mine for index in batch), workers)
        for start in o.progress(rounds, os.path.basename(dest) if writer else "checking") if first else rounds:
            items, shape = step(start, shape)
            if writer:
                add(writer, items)
    return summary


def _first_one_first(function):
    """Run on the first rank, then on the others; its ValueError is everybody's."""
    error = None
    if dist.get_rank() == 0:
        try:
            function()
        except ValueError as err:
            error = str(err)
    error = dist.broadcast_object(error)
    if error is not None:
        raise ValueError(error)
    if dist.get_rank() != 0:
        function()
