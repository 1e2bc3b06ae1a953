"""Published image classifiers as detectors and judges of labels: Swin-L of AJEST, any folder of Hugging Face's transformers.

Their features are the logits. Which of them stands for which label of one's data is fitted from labelled images
(`fit_class_order`): published networks number classes in an order of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.reading import read_json
from dnnlib.util import file_sum, reason, write_json
from metrics.detectors import weights
from metrics.detectors.base import Detector
from metrics.detectors.resize import bicubic, normalise
from torch_utils.devices import send

ORDER = "class-order-1"
SWIN = weights.Weights(
    "swin_l",
    "Swin-L of 384 px, 200 classes of Tiny-ImageNet",
    ("swin_large_384.pth",),
    url="https://github.com/ehuynh1106/TinyImageNet-Transformers/releases/download/weights/swin_large_384.pth",
    licence="Apache-2.0",
)


class ImageClassifier(Detector):
    """`features` are logits [N, K] in the order of the network; `logits` and `classify` speak of the labels of one's data.

    order: the network's class of every label, -1 for a label that has none; None: they are the same.
    """

    channels = 3
    order: list[int] | None = None

    def logits(self, features: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Features [N, K] -> logits [N, labels] float32, on the CPU, -inf for labels without a class."""
        f = torch.as_tensor(features).float().cpu()
        if self.order is None:
            return f
        order = torch.tensor(self.order)
        return torch.where(order >= 0, f[:, order.clamp(min=0)], -math.inf)

    def classify(self, features: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Features [N, K] -> predicted labels [N] int64, on the CPU."""
        return self.logits(features).argmax(1)


def fit_class_order(
    predicted: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int, num_labels: int
) -> list[int]:
    """The class of every label, from classes [N] that a network says and labels [N] that are true; -1: label without images.

    The assignment of classes to labels with the most images on it; AJEST took the largest entry of every row of the
    confusion matrix, which is the same where no two labels claim one class. Raises ValueError for more labels than classes.
    """
    from scipy.optimize import linear_sum_assignment

    known = np.unique(labels := np.asarray(labels))
    if len(known) > num_classes or (known < 0).any():
        raise ValueError(f"{len(known)} labels cannot be told apart by a network of {num_classes} classes")
    confusion = np.zeros((num_labels, num_classes), np.int64)
    np.add.at(confusion, (labels, np.asarray(predicted)), 1)
    order = np.full(num_labels, -1)
    order[known] = linear_sum_assignment(confusion[known], maximize=True)[1]
    return order.tolist()


def save_order(path: str | os.PathLike, spec: str, judge: ImageClassifier, **measured: object) -> None:
    """Write the order of a classifier with the spec that opens it: a file for `classifier:FILE.json`."""
    write_json(path, {"format": ORDER, "detector": spec, "identity": judge.identity, "order": judge.order} | measured)


def load_order(path: str | os.PathLike, open_detector: Callable[[str], object]) -> ImageClassifier:
    """The classifier of a file of `save_order`, whose weights must be those it was fitted to.

    open_detector: makes a detector of its spec. Raises ValueError that names the file.
    """
    remedy = "make one with: calculate_metrics.py detector --of=SPEC --data=ZIP --dest=FILE.json"
    try:
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != ORDER or not isinstance(found.get("detector"), str):
            raise ValueError(f"it does not say format {ORDER}")
        if found["detector"].startswith("classifier"):
            raise ValueError("a class order of a class order")
        judge, order = open_detector(found["detector"]), found.get("order")
        if judge.identity != found.get("identity") or not isinstance(judge, ImageClassifier):
            raise ValueError(
                f"it was fitted to {found.get('identity')!r:.80}, and {found['detector']} is {judge.identity}"
            )
        classes = range(-1, judge.width)
        if not isinstance(order, list) or not order or not all(type(k) is int and k in classes for k in order):
            raise ValueError(f"'order' must list a class below {judge.width}, or -1, for every label")
    except (ValueError, OSError) as err:
        raise ValueError(f"'{path}' is no class order that can be used ({reason(err)}); {remedy}") from None
    judge.order = order
    return judge


@contextlib.contextmanager
def _transformers(name: str) -> Iterator:
    """The package, silent: its advice is not about what users of ours asked for. Its errors become a ValueError."""
    try:
        import transformers
    except ImportError as err:
        raise ValueError(
            f"detector '{name}' needs the package transformers ({reason(err)}): pip install transformers"
        ) from err
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error(), log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(level)
        _ = bars and log.enable_progress_bar()


# Names of timm before 0.9, which is how the file was written, and since -> those of transformers' files.
_NEW_TIMM = [(r"^head\.fc\.", "head.")]
_OF_TIMM = [
    (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^layers\.", "swin.encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.(query|key|value|relative_position_bias_table)\b", r".attention.self.\1"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "swin.layernorm."),
    (r"^head\.", "classifier."),
]
_BUFFERS = (".attn_mask", ".relative_position_index")  # pure functions of the sizes


def swin_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A timm state of a Swin classifier, of before or since 0.9, under the names of transformers' files."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}
    if "head.fc.weight" in state:  # since 0.9; down-sampling stands at the start of the next stage there
        earlier = lambda match: f"layers.{int(match[1]) - 1}.downsample."
        state = {re.sub(r"^layers\.(\d+)\.downsample\.", earlier, n): t for n, t in state.items()}
        state = weights.renamed(state, _NEW_TIMM)
    for name in [name for name in state if ".attn.qkv." in name]:
        thirds = state.pop(name).chunk(3)
        state |= {
            name.replace("qkv", part): third for part, third in zip(("query", "key", "value"), thirds, strict=True)
        }
    return weights.renamed(state, _OF_TIMM)


def swin_sizes(state: Mapping[str, torch.Tensor]) -> dict:
    """SwinConfig's arguments of a state under transformers' names."""
    blocks = [
        re.match(r"swin\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.layernorm_before\.weight", name) for name in state
    ]
    stages = [int(match[1]) for match in blocks if match]
    depths = [stages.count(stage) for stage in range(max(stages, default=0) + 1)]
    table = "swin.encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
    tables = [state[table.format(stage)].shape for stage in range(len(depths))]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    return dict(
        image_size=32 * window,  # as in every published size: 224 px with windows of 7, 384 px with 12
        patch_size=state["swin.embeddings.patch_embeddings.projection.weight"].shape[-1],
        embed_dim=state["swin.embeddings.norm.weight"].shape[0],
        depths=depths,
        num_heads=[int(shape[1]) for shape in tables],
        window_size=window,
        num_labels=state["classifier.weight"].shape[0],
    )


class Swin(ImageClassifier):
    """A Swin classifier of a timm file. By default it looks as AJEST's evaluation does: antialiased, nothing rounded."""

    name = "swin_l"

    def __init__(self, file: weights.WeightFile, antialias: bool = True, rounded: bool = False):
        """antialias; rounded: to grey levels of 0 to 255. The network's authors evaluated it with False and True.

        Raises ValueError where the file holds another network.
        """
        state = swin_names(weights.read(file.path))
        weights.require_finite(state, file.path)
        try:
            sizes = swin_sizes(state)
        except (KeyError, IndexError) as err:
            raise ValueError(f"{file.path}: lacks tensor {reason(err)} of a Swin classifier: another network") from None
        with _transformers(self.name) as transformers:
            try:
                given = dict(config=transformers.SwinConfig(**sizes), state_dict=state, ignore_mismatched_sizes=True)
                made = transformers.SwinForImageClassification.from_pretrained(None, output_loading_info=True, **given)
            except Exception as err:  # the library's constructors fail in many ways
                raise ValueError(f"{file.path}: {reason(err):.300}") from None
        self.net, found = _Logits(made[0]), made[1]
        for what in ("missing", "unexpected", "mismatched"):
            if names := found[f"{what}_keys"]:
                raise ValueError(f"{file.path}: {what} tensor {min(map(str, names)):.120}: weights of another network")
        self.side, self.antialias, self.rounded = sizes["image_size"], antialias, rounded
        self.width, self.file, self.sha256 = sizes["num_labels"], file, file.sha256
        kernel = f"bicubic {'with' if antialias else 'without'} antialias to {self.side} px"
        self.resize = f"{kernel}, {'' if rounded else 'not '}rounded"

    @property
    def identity(self) -> str:
        return self.file.identity(self.name)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, H] -> [n, 3, side, side], normalised as ImageNet is. Raises ValueError for other proportions."""
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"detector '{self.name}' looks at square images, got {list(images.shape[2:])}")
        x = bicubic(send(images, self.device).float(), self.side, self.antialias)
        return normalise(x.clamp(0, 255).round() if self.rounded else x)


class _Logits(torch.nn.Module):
    """A network of transformers, by its logits alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net.float().eval().requires_grad_(False)

    def forward(self, x):
        return self.net(pixel_values=x).logits


class HuggingFace(ImageClassifier):
    """An image classifier of a local folder, as save_pretrained writes one; it resizes as its own configuration says.

    Weights are read from safetensors alone, code in the folder is not run.
    """

    name = "hf"

    def __init__(self, folder: str | os.PathLike):
        """Raises ValueError for a folder that holds no image classifier, or where transformers is missing."""
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{folder}: holds no config.json; give a local folder of an image classifier, as hf:FOLDER"
            )
        with _transformers(self.name) as transformers:
            local = dict(local_files_only=True, trust_remote_code=False)
            try:
                self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
                load = transformers.AutoModelForImageClassification.from_pretrained
                made = load(folder, use_safetensors=True, output_loading_info=True, **local)
            except Exception as err:  # the library fails in many ways
                raise ValueError(f"{folder}: no image classifier that can be read ({reason(err):.300})") from None
        for what in ("missing", "mismatched"):
            if names := made[1][f"{what}_keys"]:
                raise ValueError(f"{folder}: {what} tensor {min(map(str, names)):.120}: no weights of its config.json")
        self.net = _Logits(made[0])
        self.width = made[0].config.num_labels
        kept = ("size", "resample", "do_center_crop", "crop_size", "crop_pct")
        said = {key: value for key, value in self.processor.to_dict().items() if key in kept and value is not None}
        self.resize = f"Pillow, {json.dumps(said, sort_keys=True, default=dict)}"
        digest = hashlib.sha256()
        for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*config.json")]):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {file_sum(file)}\n".encode())
        self.sha256 = digest.hexdigest()

    @property
    def identity(self) -> str:
        return f"{self.name}:{self.sha256[:16]}"

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] -> what the folder's preprocessor makes of them."""
        made = self.processor(images=list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        return send(made["pixel_values"], self.device)
