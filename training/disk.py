"""What the steps of an experiment write besides their runs: data sets, generated images, references; where it is known."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dnnlib.reading import read_json
from training.dataset import ImageFolderDataset

FRAME = 230  # bytes around a stored image: chunks of the PNG, entries of the zip, label
WIDTHS = {"fid": 2048, "fd_dinov2": 1024}  # features of the published detectors
LATENT_FACTOR = 8  # sides of Stable Diffusion's autoencoder


@dataclass(frozen=True)
class Images:
    """A data set that is there, or will be."""

    shape: tuple[int, ...]  # [C,H,W]; 8 channels: latents
    counts: Mapping[int | None, int]  # {source: images}
    pixels: tuple[int, ...] | None = None  # shape of what latents stand for

    @property
    def number(self) -> int:
        return sum(self.counts.values())

    @property
    def size(self) -> int:
        """Bytes: of pixels, or float32 of latents."""
        return self.number * (math.prod(self.shape) * (4 if self.shape[0] == 8 else 1) + FRAME)

    @property
    def shown(self) -> tuple[int, ...]:
        """The shape of its pictures, decoded if need be."""
        scaled = (3, *(LATENT_FACTOR * side for side in self.shape[1:]))
        return self.pixels or (scaled if self.shape[0] == 8 else self.shape)

    def spread(self, number: int) -> Images:
        """Another one of so many images of the same sources."""
        return replace(self, counts={k: number * n // self.number for k, n in self.counts.items()})

    def part(self, sources: list[str] | None, per_source: int | None, most: int | None) -> Images | None:
        """What `convert` takes of it; None where the sources are not given by their ids."""
        if sources is not None and not all(source.isdigit() for source in sources):
            return None
        kept = {k: n for k, n in self.counts.items() if sources is None or str(k) in sources}
        part = replace(self, counts={k: min(n, per_source or n) for k, n in kept.items()})
        return part if most is None or most > part.number else part.spread(most)


class Writes:
    """The data sets and models that steps make, one after the other, and what these take."""

    def __init__(self) -> None:
        self.images: dict[str, Images | None] = {}
        self.models: dict[str, Images] = {}  # outdir: what it is trained on

    def trains(self, outdir: str, data: str, interface: Mapping[str, int]) -> None:
        """A step trains a model; interface: of the network, for data of which nothing is known."""
        side = interface["img_resolution"]
        channels = 8 if interface["img_channels"] == 4 else interface["img_channels"]
        self.models[os.path.normpath(outdir)] = self._known(data) or Images((channels, side, side), {})

    def of(self, command: str, params: Mapping[str, Any], said: str) -> tuple[str, dict[str, int]]:
        """(what for, {path: bytes}) of a step; command: the sub-command, or the script; said: by its dry run, if any."""
        if command in ("convert", "encode", "decode"):
            made = self._convert(params, said) if command == "convert" else self._vae(command, params)
            self.images |= {os.path.normpath(path): images for path, images in made.items()}
            return "data sets", {path: images.size for path, images in made.items() if images}
        if command == "ref":
            return "references", self._references(params)
        return "generated images", self._generated(params) if command == "generate_images.py" else {}

    def _known(self, path):
        """The data set at a path that a step makes, or that is there; None where that says nothing."""
        path = os.path.normpath(path)
        if path not in self.images:
            self.images[path] = None
            with contextlib.suppress(ValueError, OSError):
                data = ImageFolderDataset(path)
                labels = data.raw_labels if data.sources else [None] * len(data)
                counts = collections.Counter(None if label is None else int(label) for label in labels)
                self.images[path] = Images(tuple(data.image_shape), counts)
        return self.images[path]

    def _joined(self, paths):
        found = [self._known(path) for path in paths]
        if None in found:
            return None
        counts = sum((collections.Counter(images.counts) for images in found), collections.Counter())
        return replace(found[0], counts=counts)

    def _convert(self, params, said):
        more = [name for name in ("holdout", "val") if params[name]]
        summary = json.loads(said.splitlines()[-1]) if said else None
        source = self._joined(params["source"]) if not said or summary["channels"] is None else None
        if summary:
            channels = summary["channels"] or 8
            file = summary["bytes"] / sum(summary[name] for name in ("count", "holdout", "val"))
            values = (
                file - 68 if summary["channels"] else (file - 128) / 4
            ) / channels  # less what frames a PNG, an NPY
            sides = params["resolution"] or (math.isqrt(int(values)),) * 2
            counts = {int(k): n for k, n in summary["per_source"].items()} or {None: summary["count"]}
            images = Images((channels, sides[1], sides[0]), counts, source.pixels if source else None)
            return {params["dest"]: images} | {params[name]: images.spread(summary[name]) for name in more}
        part = source.part(params["sources"], params["per_source"], params["max_images"]) if source else None
        if part is None:
            return dict.fromkeys([params["dest"], *(params[name] for name in more)])
        if params["resolution"]:
            part = replace(part, shape=(part.shape[0], *params["resolution"][::-1]))
        val = (params["val_per_source"] or 0) * len(part.counts)
        whole = source.part(params["sources"], None, params["max_images"])
        rest = {"holdout": whole.number - part.number - val, "val": val}
        return {params["dest"]: part} | {params[name]: part.spread(rest[name]) for name in more}

    def _vae(self, command, params):
        source, factor = self._joined(params["source"]), LATENT_FACTOR
        if source is None:
            return {params["dest"]: None}
        source = source.part(None, None, params["max_images"])
        if command == "decode":
            return {params["dest"]: Images(source.shown, source.counts)}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            factor = 2 ** (len(read_json(os.path.join(params["model_url"], "config.json"))["block_out_channels"]) - 1)
        shape = (8, *(side // factor for side in source.shape[1:]))
        return {params["dest"]: Images(shape, source.counts, source.shape)}

    def _generated(self, params):
        net = os.path.normpath(params["net"] or ".")
        inside = lambda outdir: f"{net}{os.sep}".startswith(f"{outdir}{os.sep}")
        data = next((found for outdir, found in self.models.items() if inside(outdir)), None)
        return {params["outdir"]: Images(data.shown, {None: len(params["seeds"])}).size} if data else {}

    def _references(self, params):
        data, total = self._known(params["data"]), 0
        for name in (params["metrics"] or "").split(",") if data else ():
            if width := WIDTHS.get(name.partition(":")[0]):
                sources = [*data.counts.values()] if params["per_source"] and len(data.counts) > 1 else []
                many = sum(n > width for n in [data.number, *sources])  # others are kept by their features
                total += 8 * width * (width + 1) * (1 + many) + (
                    0 if params["no_features"] else 4 * width * data.number
                )
        return {params["dest"]: total} if total else {}
