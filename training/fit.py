"""Whether data, networks, encoders and noise belong together; where not, one line that names both sides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_utils.persistence import Snapshot
from training.dataset import Dataset
from training.encoders import Encoder, StandardRGBEncoder
from training.processes import noise_law


@dataclass(frozen=True)
class Side:
    """What one side of a comparison says of itself; None: nothing, so that anything goes."""

    name: str  # as users know it: --data=digits.zip
    img_resolution: int | str | None = None
    img_channels: int | None = None
    label_dim: int | None = None
    class_names: list[str] | None = None
    encoder: Encoder | None = None
    sigma_data: float | None = None
    noise: str | None = None


REMEDIES = {
    "img_resolution": "images of another shape; convert them with dataset_tool.py --resolution, or take another network",
    "img_channels": "images of another shape; convert them with dataset_tool.py --channels, or take another network",
    "label_dim": "labels of another numbering; write num_classes and labels into dataset.json, or take another network",
    "class_names": "labels of another order; give every source the same id as in training, or take another network",
    "encoder": "latents of another kind; take a network with the same --encoder",
    "sigma_data": "networks for other data; take one with the same --sigma-data",
    "noise": "networks for other noise; take one with the same --process",
}


def check(given: Side, taker: Side) -> None:
    """Raises ValueError for the first fact that both sides know and do not share. A taker with label_dim 0 ignores labels."""
    for fact, remedy in REMEDIES.items():
        a, b = getattr(given, fact), getattr(taker, fact)
        if None not in (a, b) and a != b and not (fact in ("label_dim", "class_names") and taker.label_dim == 0):
            raise ValueError(f"{given.name} has {fact}={a}, {taker.name} has {fact}={b}: {remedy}")


def of_network(name: str, net: Any) -> Side:
    """A denoiser of which nothing but its attributes is known: its images and labels."""
    return Side(name, **{fact: getattr(net, fact, None) for fact in ("img_resolution", "img_channels", "label_dim")})


def of_snapshot(option: str, snapshot: Snapshot) -> Side:
    """A network from a file: without an encoder it takes pixels, without a kernel Gaussian noise. option: that named it."""
    side = of_network(f"{option}={snapshot.path}" if snapshot.path else option, snapshot.net)
    side = replace(side, class_names=class_names_of(snapshot))
    if not snapshot.path:
        return side
    encoder, sigma_data = snapshot.encoder or StandardRGBEncoder(), getattr(snapshot.net, "sigma_data", None)
    return replace(side, encoder=encoder, sigma_data=sigma_data, noise=noise_law(snapshot.kernel))


def class_names_of(snapshot: Snapshot) -> list[str] | None:
    """Of the sources that a network was trained on, where its file says."""
    about = snapshot.header.get("dataset")
    return (about.get("class_names") or None) if isinstance(about, dict) else None


def title(source: int | str, class_names: Sequence[str] | None) -> str:
    """What a source is called in tables and figures: its class name, without a WordNet id and further names, or its id."""
    known = class_names is not None and str(source).isdigit() and int(source) < len(class_names)
    name = re.sub(r"^n\d{8} ", "", class_names[int(source)]).split(",")[0] if known else ""
    return name.strip() or str(source)


def of_images(
    name: str, image_shape: Sequence[int], num_classes: int | None = None, class_names: list[str] | None = None
) -> Side:
    """Pixels [C, H, W] of so many sources (0 or None: not known), and their names."""
    channels, height, width = image_shape
    return Side(name, width if width == height else f"{width}x{height}", channels, num_classes or None, class_names)


def of_samples(option: str, snapshot: Snapshot) -> Side:
    """The images that a network makes, decoded. option: that named it."""
    net, encoder = snapshot.net, snapshot.encoder or StandardRGBEncoder()
    shape = encoder.decoded_shape([net.img_channels, net.img_resolution, net.img_resolution])
    return of_images(f"{option}={snapshot.path}", shape, net.label_dim, class_names_of(snapshot))


def check_data(name: str, dataset: Dataset, net: Side, unlabelled: bool = False) -> None:
    """Raises ValueError unless a network takes images and labels of `dataset`, called `name`.

    unlabelled: whether a network with labels may do without (it was trained with label dropout).
    """
    image, _ = dataset[0]
    resolution, encoder = dataset.resolution, net.encoder or StandardRGBEncoder()
    if encoder.stored not in (None, image.dtype.name):
        raise ValueError(
            f"{name} holds {image.dtype} arrays, {net.name} takes {encoder.stored} ({encoder!r}): give data of that kind"
        )
    try:
        _, channels, resolution, _ = encoder.encode_latents(torch.as_tensor(image)[None]).shape
    except ValueError as err:
        raise ValueError(f"{name} does not fit {net.name} ({err})") from err
    labels = None if unlabelled and not dataset.has_labels else dataset.label_dim
    check(Side(name, resolution, channels, labels, dataset.class_names), net)
