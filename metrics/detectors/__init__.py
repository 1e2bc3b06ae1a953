"""Feature detectors: images in, features out.

A detector has `.name` and `.features(images uint8 [N, C, H, W] tensor) -> [N, F] float tensor`; what else it may say of
itself is in `base.Detector`. Any plain callable images -> features is one too. `identity` (default: the name) says which
exact detector it was; statistics of different identities are never compared. A detector that also has
`.classify(features) -> sources [N]` judges labels.

Add your own in one line, a function of what follows the colon of the spec (None without a colon), in a file of yours for
--plugin:

    DETECTORS["brightness"] = lambda argument: lambda images: images.float().mean(dim=(2, 3))
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence

import torch

from dnnlib.download import is_url
from dnnlib.util import one_of
from metrics.classifier import load_classifier
from metrics.detectors.base import Detector, OfFunction, about
from metrics.detectors.weights import cached, find, without_pin

__all__ = ["DETECTORS", "Detector", "about", "at_hand", "get_detector", "get_detectors", "identity_of"]
__all__ += ["require_weights", "split_specs"]


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] uint8 -> [N, C H W] float32 in [-1, 1], the units in which networks are trained."""
    return images.flatten(1).float() / 127.5 - 1


def _pixel(argument):
    """The pixels themselves, for images of 32x32 and less."""
    if argument:
        raise ValueError(f"detector 'pixel:{argument}': pixel takes no argument; use 'pixel'")
    return OfFunction(pixel_features, "pixel")


def _classifier(argument):
    """classifier:FILE, a small network trained by calculate_metrics.py detector, which also judges labels."""
    if not argument:
        raise ValueError("detector 'classifier' needs a file: classifier:FILE.safetensors")
    if argument.endswith(".json"):
        from metrics.detectors.classifiers import load_order

        return load_order(argument, get_detector)
    return load_classifier(argument)


def _fid(argument):
    """Inception v3 as in the published FID; needs its weights."""
    from metrics.detectors.inception import WEIGHTS, Inception

    return Inception(find(WEIGHTS, argument))


def _fd_dinov2(argument):
    """DINOv2 ViT-L/14 as in the published FD-DINOv2; needs its weights."""
    from metrics.detectors.dinov2 import WEIGHTS, Dino

    return Dino(find(WEIGHTS, argument))


def _swin_l(argument):
    """Swin-L, an ImageNet classifier; needs its weights and transformers."""
    from metrics.detectors.classifiers import SWIN, Swin

    return Swin(find(SWIN, argument))


def _hf(argument):
    """hf:FOLDER, an image classifier of transformers."""
    from metrics.detectors.classifiers import HuggingFace

    if not argument:
        raise ValueError("detector 'hf' needs a local folder of an image classifier of transformers: hf:FOLDER")
    return HuggingFace(argument)


DETECTORS = {
    "pixel": _pixel,
    "classifier": _classifier,
    "fid": _fid,
    "fd_dinov2": _fd_dinov2,
    "swin_l": _swin_l,
    "hf": _hf,
}


def at_hand() -> list[str]:
    """Names of the published feature detectors whose weight files lie in one of the caches; unread."""
    from metrics.detectors import dinov2, inception

    return [weights.detector for weights in (inception.WEIGHTS, dinov2.WEIGHTS) if cached(weights)]


def split_specs(text: str) -> list[str]:
    """The specs of a comma-separated list. A comma ends one only where the name of a known detector follows.

    Where a path looks like that too, the longest argument that is a file is meant: no path breaks a list.
    """
    names = "|".join(map(re.escape, DETECTORS))
    parts, specs = re.split(rf",(?=\s*(?:{names})\s*(?:[:,]|$))", text), []
    while parts:
        name, colon, _ = parts[0].partition(":")
        longest = range(len(parts) if colon else 1, 1, -1)
        paths = ((n, without_pin(",".join(parts[:n])[len(name) + 1 :])) for n in longest)
        count = next((n for n, path in paths if os.path.exists(path)), 1)
        specs.append(",".join(parts[:count]).lstrip())
        parts = parts[count:]
    return specs


def get_detector(
    spec: str | object, device: str | torch.device = "cpu", weights: Mapping[str, str] | None = None
) -> object:
    """A detector from a spec string `NAME` or `NAME:ARGUMENT`, a callable, or a detector.

    weights: {name: argument} of specs that have none. A detector with a network has `.to(device)`; images reach every
    detector on the CPU. Raises ValueError for an unknown name (listing the known ones) and for what is no detector.
    """
    if isinstance(spec, str):
        name, _, argument = spec.partition(":")
        name = name.strip()
        if name not in DETECTORS:
            raise ValueError(f"detector '{name}' {one_of(name, DETECTORS)}")
        detector = DETECTORS[name](argument or (weights or {}).get(name))
    else:
        detector, name = spec, getattr(spec, "__name__", type(spec).__name__)
    if not (hasattr(detector, "features") or callable(detector)):
        kind = type(detector).__name__
        raise ValueError(f"detector '{name}' must be callable or have .features(images), got {kind}")
    if not hasattr(detector, "features"):
        detector = OfFunction(detector, name)
    elif not hasattr(detector, "name"):
        detector.name = name
    return detector.to(device) if hasattr(detector, "to") else detector


def get_detectors(
    specs: str | Sequence, device: str | torch.device = "cpu", weights: Mapping[str, str] | None = None
) -> dict[str, object]:
    """{identity: detector} of a comma-separated string or a list of specs; the same detector twice is an error.

    weights: as for `get_detector`.
    """
    result = {}
    for spec in split_specs(specs) if isinstance(specs, str) else specs:
        detector = get_detector(spec, device, weights)
        key = identity_of(detector)
        if key in result:
            raise ValueError(f"detector '{key}' is named twice")
        result[key] = detector
    return result


@functools.lru_cache(maxsize=64)
def _require(name, argument):
    from metrics.detectors import classifiers, dinov2, inception

    known = {"fid": inception.WEIGHTS, "fd_dinov2": dinov2.WEIGHTS, "swin_l": classifiers.SWIN}
    if name in known and not (argument == "download" or is_url(argument or "")):
        find(known[name], argument)


def require_weights(command: str | None, options: Mapping[str, object]) -> None:
    """Before any work: the weight files of the published detectors that a command line of calculate_metrics.py names.

    Raises ValueError as `weights.find` does. command: the sub-command.
    """
    for spec in split_specs(str(options["metrics"])) if options.get("metrics") else ():
        name, _, argument = spec.partition(":")
        if name not in DETECTORS:
            raise ValueError(
                f"--metrics={options['metrics']}: unknown detector '{name}'; known: {', '.join(sorted(DETECTORS))}"
            )
        _require(name, argument or (options.get("weights") or {}).get(name))


def identity_of(detector: object) -> str:
    """The name of exactly this detector."""
    return getattr(detector, "identity", None) or detector.name
