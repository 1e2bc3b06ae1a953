"""The folder that generated images are written into: a file per seed, and labels beside them, a data set.

Every image says in its PNG text, an array after its numbers in the .npy, which network and options made it. So a folder
holds the images of one network and one set of options, each seed once, however often and wherever it is continued.
"""

import functools
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib import EasyDict, atomic_write
from dnnlib.options import declared, flag
from torch_utils import distributed as dist
from torch_utils.persistence import content_digest, describe
from training.dataset.format import LABELS_FILE, extension, item_extensions, png_bytes
from training.dataset.listing import Container
from training.sampling import Sampling

KEY = "generated"  # of the PNG text
WRITERS = 2  # threads that encode and write images
SEED_BITS = 32  # that tell seeds apart, see StackedRandomGenerator
_NAME = re.compile(r"(?:\d{6,}/)?(\d{6,})\.(?:png|npy)")


def file_name(seed: int, subdirs: bool, ending: str = ".png") -> str:
    """SSSSSS.png, or with a folder for every 1000 seeds (EDM2)."""
    return f"{seed - seed % 1000:06d}/{seed:06d}{ending}" if subdirs else f"{seed:06d}{ending}"


def distinct(seeds: Sequence[int]) -> Sequence[int]:
    """The seeds, each once, with a word where some are repeated. Raises ValueError where two seeds mean the same image."""
    if isinstance(seeds, range) and len(seeds) <= 2**SEED_BITS and abs(seeds.step) == 1:
        return seeds
    once = list(dict.fromkeys(int(seed) for seed in seeds))
    if len(once) < len(seeds):
        seed, times = Counter(seeds).most_common(1)[0]
        warnings.warn(
            f"--seeds names seed {seed} {times} times: every seed is one image, {len(once)} in all", stacklevel=3
        )
    _, first, counts = np.unique(np.array(once) % 2**SEED_BITS, return_index=True, return_counts=True)
    if len(first) < len(once):
        _refuse_twins(once[first[counts.argmax()]], once)
    return once


def _refuse_twins(seed, seeds):
    twin = next(s for s in seeds if s != seed and (s - seed) % 2**SEED_BITS == 0)
    raise ValueError(
        f"--seeds: {seed} and {twin} are the same modulo 2^{SEED_BITS}, hence the same image: leave one out"
    )


def plain(value: Any) -> Any:
    """What an option of sampling is, as plain data: descriptions of objects, names of functions with what they bind."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.dtype):
        return str(value)
    if hasattr(value, "init_kwargs"):
        return describe(value)
    if isinstance(value, functools.partial):
        return [plain(value.func), *map(plain, value.args), plain(list(value.keywords.items()))]
    name = getattr(value, "__qualname__", type(value).__name__)
    own = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    bound = {k: plain(v) for k, v in own.items() if not k.startswith("_")}
    return {"name": name, **bound} if bound else name


def provenance(net: Any, gnet: Any, **options: Any) -> dict[str, Any]:
    """What makes the image of a seed and class: content of the networks, and options as plain data."""
    networks = {"network": content_digest(net), "guide": None if gnet is None else content_digest(gnet)}
    return {name: plain(value) for name, value in {**networks, **options}.items() if value is not None}


class SampleFolder:
    """A folder for the images of `seeds`, each made as `made` (see `provenance`), of classes chosen as `classes`.

    Raises ValueError, before anything is written, where it holds images of another network, of other options, images of
    the same seeds with other classes or under another name, or images that this class did not write.
    """

    def __init__(
        self, path: str | Path, made: dict[str, Any], classes: Any, seeds: Sequence[int], subdirs: bool
    ) -> None:
        self.path, self.made, self.classes, self.subdirs = Path(path), made, classes, subdirs
        self.records = []  # (name, class id, label vector or None)
        self.pool = ThreadPoolExecutor(max_workers=WRITERS)
        held = self._held()
        wanted = {seed % 2**SEED_BITS: seed for seed in seeds} if held else {}
        for number, (seed, name) in enumerate(held.items()):
            twin = wanted.get(seed % 2**SEED_BITS)
            if twin is None and number:
                continue  # one image speaks for those that stay as they are
            found = self._read(name)
            if changed := _differences(found["made"], made):
                raise ValueError(f"--outdir={path} holds images made otherwise ({changed}): give another folder")
            if twin is None:
                continue
            if twin != seed:
                _refuse_twins(seed, [twin])
            if name != file_name(seed, subdirs, extension(name)):
                remedy = "leave --subdirs out" if subdirs else "give --subdirs"
                raise ValueError(
                    f"--outdir={path} holds the image of seed {seed} as {name}: {remedy}, or another folder"
                )
            if found["classes"] != plain(classes):
                old = "--class: " + json.dumps(found["classes"]) + " -> " + json.dumps(plain(classes))
                raise ValueError(f"--outdir={path} holds seed {seed} with another class ({old}): give another folder")

    def _held(self):
        """{seed: name} of the images in the folder."""
        names = Container(str(self.path)).names if self.path.is_dir() else []
        images = [name for name in names if extension(name) in item_extensions()]
        held = {}
        for name in images:
            match = _NAME.fullmatch(name)
            if match is None or name not in (file_name(int(match[1]), s, extension(name)) for s in (False, True)):
                raise ValueError(f"--outdir={self.path} holds {name}, which no seed is called: give another folder")
            if held.setdefault(int(match[1]), name) != name:
                raise ValueError(f"--outdir={self.path} holds seed {int(match[1])} twice ({name}): remove one")
        return held

    def _read(self, name):
        """What an image says about itself."""
        try:
            if extension(name) == ".npy":
                with open(self.path / name, "rb") as file:
                    np.load(file, allow_pickle=False)  # up to where its numbers end
                    found = json.loads(file.read())[KEY]
            else:
                with PIL.Image.open(self.path / name, formats=["PNG"]) as image:
                    found = json.loads(image.text[KEY])
            return {"made": dict(found["made"]), "classes": found["classes"], "label": found["label"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError) as err:
            why = "does not say which network made it"
            raise ValueError(f"--outdir={self.path} holds {name}, which {why}: give another folder") from err

    def write(self, batch: EasyDict) -> None:
        """Write the images of a batch of generate_images, by threads; returns when all are there."""
        labels = batch.labels if batch.class_ids is None else batch.class_ids
        labels = [None] * len(batch.seeds) if labels is None else labels.tolist()
        images = batch.images.cpu()  # one transfer
        writing = [self.pool.submit(self._write, *one) for one in zip(batch.seeds, images, labels, strict=True)]
        for waiting in wait(writing, return_when=FIRST_EXCEPTION).not_done:
            waiting.cancel()
        wait(writing)  # nobody writes any more when an error is reported, and the folder tidied up
        self.records += [one.result() for one in writing]

    def _write(self, seed, image, label):
        name = file_name(seed, self.subdirs, ".png" if image.dtype == torch.uint8 else ".npy")
        about = {"made": self.made, "classes": plain(self.classes), "label": label}
        with atomic_write(self.path / name) as file:
            if image.dtype == torch.uint8:
                file.write(png_bytes(image, {KEY: json.dumps(about)}))
            else:
                np.save(file, image.numpy(), allow_pickle=False)
                file.write(json.dumps({KEY: about}).encode())
        return name, label

    def finish(self, label_dim: int, class_names: Any = None) -> None:
        """dataset.json for the images of all processes, and for those that were there before.

        class_names: of the sources, as the snapshot says; what are no names of `label_dim` sources is left out.
        """
        gathered = [self.records] * dist.get_world_size()
        if dist.get_world_size() > 1:
            torch.distributed.all_gather_object(gathered, self.records)
        if dist.get_rank() != 0:
            return
        labels = {name: label for part in gathered for name, label in part}
        if label_dim:
            labels |= {name: self._read(name)["label"] for name in self._held().values() if name not in labels}
        content = {"labels": sorted(labels.items()) if label_dim else None}
        if label_dim and all(isinstance(label, int) for label in labels.values()):  # no vectors
            content["num_classes"] = label_dim
            names = class_names if isinstance(class_names, list) and len(class_names) == label_dim else [None]
            if all(isinstance(name, str) for name in names):
                content["class_names"] = names
        with atomic_write(self.path / LABELS_FILE, "w") as file:
            json.dump(content, file)


def _differences(old, new):
    """'--steps: 32 -> 18' for what two records do not share; a network by the beginning of its hash."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    known = declared(Sampling)
    words = {"network": "--net", "guide": "--gnet", "sampler": "--solver", "grid": "--time-grid"}
    shown = lambda name: words.get(name) or (flag(Sampling, name) if name in known else name)
    return "; ".join(f"{shown(name)}: {_short(old.get(name))} -> {_short(new.get(name))}" for name in names)


def _short(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
