"""A small convolutional classifier trained on the reference data in seconds: feature detector and judge of labels.

Stands in for Inception where the data is not photographs, or where no downloaded weights are wanted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from torch_utils.devices import send
from torch_utils.persistence import load_snapshot, persistent, save_snapshot
from torch_utils.precision import full

FORMAT = "classifier-detector-2"
MEASURED = ("epochs", "seed", "num_train", "num_holdout", "accuracy", "source_accuracy")  # what a file says of itself
MOST_SIDE = 2048  # of an image
LEARNING_RATE = 4e-3
SHIFT = 1  # augmentation: pixels by which an image may move


def _block(c_in, c_out, stride):
    conv = torch.nn.Conv2d(c_in, c_out, 3, padding=1, stride=stride, bias=False)
    return [conv, torch.nn.BatchNorm2d(c_out), torch.nn.SiLU()]


@persistent
class ConvNet(torch.nn.Module):
    """Two convolutions per resolution, halving down to 4x4, then a linear layer of `features` units and the logits."""

    def __init__(self, image_shape: Sequence[int], num_classes: int, width: int = 32, features: int = 64):
        super().__init__()
        self.image_shape = tuple(image_shape)  # C, H, W
        if len(self.image_shape) != 3 or not all(type(n) is int and 0 < n <= MOST_SIDE for n in self.image_shape):
            raise ValueError(f"image_shape={list(image_shape)} must be channels, rows, columns from 1 to {MOST_SIDE}")
        c, h, w = image_shape
        layers = _block(c, width, 1)
        while min(h, w) > 4:
            c_out = min(2 * width, 128)
            layers += _block(width, c_out, 2) + _block(c_out, c_out, 1)
            width, h, w = c_out, -(-h // 2), -(-w // 2)
        layers += [torch.nn.AdaptiveAvgPool2d((min(h, 4), min(w, 4))), torch.nn.Flatten(), torch.nn.Dropout(0.3)]
        self.trunk = torch.nn.Sequential(*layers)
        self.penultimate = torch.nn.Linear(width * min(h, 4) * min(w, 4), features)
        self.head = torch.nn.Linear(features, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] in [-1, 1] -> activations [N, features]."""
        return torch.nn.functional.silu(self.penultimate(self.trunk(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, num_classes]."""
        return self.head(self.features(x))


class Classifier:
    """A detector that also names the source: `.features`, `.classify(features)`, `.predict(images)`.

    header: what was MEASURED when it was trained; `accuracy` is on held-out images. `identity` names the exact weights, so
    statistics made with another training run are told apart.
    """

    name = "classifier"

    def __init__(self, net: ConvNet, header: dict, device: str | torch.device = "cpu"):
        self.net = net.eval().requires_grad_(False)
        self.to(device)
        self.header = {name: header[name] for name in MEASURED if name in header}
        digest = hashlib.sha256()
        for name, tensor in sorted(self.net.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.sha256 = digest.hexdigest()  # of the weights, wherever they lie
        self.identity = f"{self.name}:{self.sha256[:16]}"
        self.channels, self.width = net.image_shape[0], net.head.in_features

    def to(self, device: str | torch.device) -> Classifier:
        """Move the network; returns itself."""
        self.net.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    @full()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images uint8 [N, C, H, W] of the trained shape -> penultimate activations [N, F] float32."""
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.net.image_shape:
            raise ValueError(
                f"classifier was trained on uint8 images {list(self.net.image_shape)} [C, H, W], "
                f"got {str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}"
            )
        return self.net.features(_normalize(send(images, self.device)))

    @torch.no_grad()
    def logits(self, features: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Features [N, F] -> [N, number of sources] float32, on the CPU."""
        return self.net.head(torch.as_tensor(features).to(self.device, torch.float32)).cpu()

    def classify(self, features: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Features [N, F] -> predicted sources [N] int64, on the CPU."""
        return self.logits(features).argmax(1)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """images uint8 [N, C, H, W] -> predicted sources [N] int64."""
        return self.classify(self.features(images))

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file that `load_classifier` reads; atomic."""
        save_snapshot(path, self.net, kind=FORMAT, **self.header)


def source_agreement(predicted: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray) -> dict:
    """Share of predictions equal to the label, {"overall": float, source: float}; labels -1 do not count."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    right = (predicted == labels)[labels >= 0]
    known = labels[labels >= 0]
    result = {"overall": float(right.mean()) if len(known) else None}
    return result | {int(s): float(right[known == s].mean()) for s in np.unique(known)}


def load_classifier(path: str | os.PathLike, device: str | torch.device = "cpu") -> Classifier:
    """Read a file of `Classifier.save`; nothing in it is executed. ValueError names the file and the remedy."""
    remedy = "make one with: calculate_metrics.py detector --data=ZIP --dest=FILE.safetensors"
    if not os.path.isfile(path):
        raise ValueError(f"classifier file '{path}' does not exist; {remedy}")
    try:
        snapshot = load_snapshot(path, kind=FORMAT)
        if not isinstance(snapshot.net, ConvNet):
            raise ValueError(f"holds a {type(snapshot.net).__name__}")
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"'{path}' is not a classifier file ({reason}); {remedy}") from None
    return Classifier(snapshot.net, snapshot.header, device)


def _normalize(images):
    return images.float() / 127.5 - 1


def _shift(x, generator):
    """Move every image by its own whole number of pixels, up to SHIFT, edges repeated."""
    n, _, h, w = x.shape
    x = torch.nn.functional.pad(x, [SHIFT] * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=generator).to(x.device)
    rows = dy[:, None] + torch.arange(h, device=x.device)
    cols = dx[:, None] + torch.arange(w, device=x.device)
    index = torch.arange(n, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _check(images, labels, what):
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"{what}: images must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
    if labels.ndim == 2:
        labels = labels.argmax(1)  # one-hot
    if labels.shape != images.shape[:1] or len(labels) == 0 or int(labels.min()) < 0:
        raise ValueError(f"{what}: every image needs a label >= 0, got {len(images)} images, {len(labels)} labels")
    return images, labels.long()


def stratified_split(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held-out) index arrays: `fraction` of every source is held out, at least one of two images."""
    rng, held = np.random.default_rng(seed), []
    labels = np.asarray(labels)
    for source in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == source))
        held.append(index[: max(round(fraction * len(index)), 1 if len(index) > 1 else 0)])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held), held


def train_classifier(
    images: np.ndarray | torch.Tensor,  # uint8 [N, C, H, W]
    labels: np.ndarray | torch.Tensor,  # [N] integers from 0, or [N, K] one-hot
    *,
    holdout: tuple | None = None,  # (images, labels) to measure accuracy on; None: a seeded share, not trained on
    holdout_fraction: float = 0.2,
    num_classes: int | None = None,  # None: largest label + 1
    epochs: int = 20,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable = iter,  # wraps the range of epochs, e.g. tqdm
    **sizes: int,  # of ConvNet: width, features
) -> Classifier:
    """Train the detector; AdamW, one-cycle learning rate, seconds on a CPU for small images.

    Its `accuracy` and header["source_accuracy"] are measured on images that it never saw.
    Raises ValueError on other dtypes, missing labels or fewer than two classes.
    """
    images, labels = _check(images, labels, "training data")
    if holdout is None:
        kept, held = stratified_split(labels, holdout_fraction, seed)
        if len(held) == 0 or len(kept) == 0:
            raise ValueError("too few images to hold some out; give separate held-out images")
        holdout, images, labels = (images[held], labels[held]), images[kept], labels[kept]
    holdout_images, holdout_labels = _check(*holdout, "held-out data")
    num_classes = num_classes or int(max(labels.max(), holdout_labels.max())) + 1
    if num_classes < 2:
        raise ValueError("a classifier needs images of at least two sources")
    header = {"epochs": epochs, "seed": seed, "num_train": len(images), "num_holdout": len(holdout_images)}
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # initialisation and dropout draw from the global generator
        torch.manual_seed(seed)
        net = ConvNet(images.shape[1:], num_classes, **sizes).to(device).train()
        generator = torch.Generator().manual_seed(seed)
        batch_size = min(batch_size, len(images))
        steps = max(len(images) // batch_size, 1)  # the incomplete last batch waits for the next shuffle
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps * epochs)
        images, labels = images.to(device), labels.to(device)
        for _ in progress(range(epochs)):
            for index in torch.randperm(len(images), generator=generator)[: steps * batch_size].split(batch_size):
                index = index.to(device)
                logits = net(_shift(_normalize(images[index]), generator))
                loss = torch.nn.functional.cross_entropy(logits, labels[index], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    judge = Classifier(net, header, device)
    predicted = torch.cat([judge.predict(part) for part in holdout_images.split(512)])
    scores = source_agreement(predicted, holdout_labels)
    judge.header["accuracy"] = scores.pop("overall")
    judge.header["source_accuracy"] = {str(source): score for source, score in scores.items()}
    return judge
