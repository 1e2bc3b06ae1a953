"""What is inside a data set, and the noise levels it suggests."""

from __future__ import annotations

import math

import numpy as np
import torch

from training import encoders, presets
from training.dataset import ImageFolderDataset

_SAMPLE_VALUES = 2**26  # Largest sample for pairwise distances, in numbers (float32).


def inspect_dataset(
    path: str, sample: int = 2000, seed: int = 0, max_images: int | None = None, with_hash: bool = False
) -> dict:
    """Plain dict about a data set. Decodes every image, so a corrupt one raises ValueError naming it.

    `mean` and `std` are per channel in stored units (0..255 for pixels); `latents` holds them as the network sees them.
    `sigma_data` is the standard deviation of all latent values; `sigma_max` the largest Euclidean distance between two
    images of a sample (Song and Ermon 2020, "Improved techniques", technique 1): at this noise level no pair is
    told apart. Both are in latent units.
    """
    dataset = ImageFolderDataset(path, max_size=max_images)
    first = dataset[0][0]
    known = first.dtype == np.uint8 or dataset.num_channels == 8
    encoder = encoders.for_channels(dataset.num_channels) if known else encoders.IdentityEncoder()
    generator = torch.Generator().manual_seed(seed)
    stored = latents = 0.0  # sums, see _sums
    count = len(dataset)
    keep_count = max(min(sample, count, _SAMPLE_VALUES // first.size), min(2, count))
    keep = set(np.random.RandomState(seed).permutation(count)[:keep_count].tolist())
    kept = []
    for start in range(0, count, 64):
        indices = range(start, min(start + 64, count))
        images = torch.from_numpy(np.stack([dataset[i][0] for i in indices]))  # [B,C,H,W]
        z = encoder.encode_latents(images, generator)  # [B,C',H',W']
        stored, latents = stored + _sums(images), latents + _sums(z)
        kept += [z[row].flatten() for row, i in enumerate(indices) if i in keep]
    distance = largest_distance(torch.stack(kept))
    means, stds = _mean_and_std(stored, count * images[0, 0].numel())
    mean, std = _mean_and_std(latents.mean(dim=1), count * z[0, 0].numel())
    counts = None
    if dataset.has_onehot_labels:
        counts = {str(k): int(n) for k, n in enumerate(np.bincount(dataset.raw_labels)) if n}
    result = {
        "name": dataset.name,
        "understood": dataset.about,
        "count": count,
        "image_shape": dataset.image_shape,
        "resolution": dataset.image_shape[-1],
        "channels": dataset.num_channels,
        "dtype": first.dtype.name,
        "label_dim": dataset.label_dim,
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names,
        "images_per_source": counts,
        "hint": _label_hint(dataset),
        "mean": means,
        "std": stds,
        "latents": {"encoder": type(encoder).__name__, "mean": mean, "std": std},
        "max_distance": distance,
        "distance_sample": len(kept),
        "suggested": {"sigma_data": round(std, 3), "sigma_max": float(np.ceil(round(distance * 10, 4)) / 10)},
    }
    if with_hash:
        result["content_hash"] = dataset.content_hash()
    return result


def _label_hint(dataset):
    """A word where labels look as if they were counted from 1, or None."""
    found, num = dataset.sources or [0], dataset.num_classes
    if found[0] == 0 or (dataset.declared_classes and found != [*range(1, num)]):
        return None
    return (
        f"source 0 has no images: labels count from 0; if yours count from 1, subtract 1 (sources {num - 1}, not {num})"
    )


def _sums(x):  # [B,C,H,W] -> [2,C]
    """Sums of all values and of their squares per channel, in float64."""
    return torch.stack([x.double().sum(dim=(0, 2, 3)), x.double().square().sum(dim=(0, 2, 3))])


def _mean_and_std(sums, count):  # [2,...] of so many values each
    mean, square = sums / count
    return mean.tolist(), (square - mean**2).clamp(min=0).sqrt().tolist()


def largest_distance(x: torch.Tensor) -> float:
    """Largest Euclidean distance between two rows of x [N,d]; 0 for a single row."""
    centred = x - x.mean(dim=0)  # Smaller numbers, fewer digits lost below.
    norms = centred.square().sum(1)
    best, pair = -1.0, (0, 0)
    for start in range(0, len(x), 256):
        squares = norms[start : start + 256, None] + norms - 2 * centred[start : start + 256] @ centred.T  # [256,N]
        value, index = squares.flatten().max(dim=0)
        if value > best:
            best, pair = value.item(), (start + index.item() // len(x), index.item() % len(x))
    return (x[pair[0]].double() - x[pair[1]].double()).norm().item()


def _preset(info):
    """The preset for so few images of that size with its noise on their scale, or where to look."""
    sizes = {presets.interface(name)["img_resolution"]: name for name in ("digits8", "digits28", "small32", "small64")}
    name = sizes.get(info["image_shape"][1]) if info["count"] <= 5000 else None
    sigma_data = info["suggested"]["sigma_data"]
    if not (name and sigma_data):
        return ", for the preset see --list-presets"
    row = presets.get(name)
    P_mean = row["P_mean"] + math.log(sigma_data / row["sigma_data"])
    return f" --preset={name} --P_mean={P_mean:.2f}"


def format_report(info: dict) -> list[str]:
    """Lines for people."""
    numbers = lambda values: " ".join(f"{v:.4g}" for v in values)
    lines = [
        f"{info['name']}: {info['count']} images, {info['channels']} x {info['image_shape'][1]} x {info['image_shape'][2]}, "
        f"{info['dtype']}",
        f"understood  {info['understood']}",
        f"labels      label_dim={info['label_dim']}" + ("" if info["label_dim"] else " (no labels)"),
    ]
    for label, n in (info["images_per_source"] or {}).items():
        name = info["class_names"][int(label)] if info["class_names"] else ""
        lines.append(f"  source {label:>4}  {n:>8}  {name if name != label else ''}".rstrip())
    if info["hint"]:
        lines.append(f"hint        {info['hint']}")
    lines += [
        f"stored      mean {numbers(info['mean'])}   std {numbers(info['std'])}",
        f"latents     mean {info['latents']['mean']:.4f}   std {info['latents']['std']:.4f}   "
        f"({info['latents']['encoder']})",
        f"distance    largest of {info['distance_sample']} images: {info['max_distance']:.4f}",
        f"suggested   train_edm2.py --sigma-data={info['suggested']['sigma_data']:g}{_preset(info)}",
        f"            generate_images.py --sigma_max={info['suggested']['sigma_max']:g}  (default: 80)",
    ]
    if "content_hash" in info:
        lines.append(f"hash        {info['content_hash']}")
    return lines
