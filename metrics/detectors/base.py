"""What a detector is, and what it says of itself: statistics of detectors that say different things are not compared."""

from __future__ import annotations

import torch

from torch_utils.precision import REDUCED, full

CHUNK = {"cpu": 16}  # images that a network sees at once, whatever the batch: bounds memory
CHUNK_OTHERS = 64
ABOUT = ("name", "width", "channels", "resize", "sha256", "precision")


class Detector:
    """Images uint8 [N, C, H, W] -> features [N, F] float32.

    Of itself it says `name`; `width` F (None: by the image); `channels` that it looks at (None: any); `resize`, in words;
    `sha256` of the file that its weights are from (None: of no file). `identity` tells apart what shares a name. One with a
    network has it as `net`, and says in `prepare` what becomes of the pixels; its `precision` may be bf16 or fp16, and
    `precision_error` is how far the features of the first images are then from those of fp32, relative, root mean square.
    """

    name: str
    width: int | None = None
    channels: int | None = None
    resize: str = "none"
    sha256: str | None = None
    precision: str = "fp32"
    precision_error: float | None = None
    net: torch.nn.Module | None = None
    device = torch.device("cpu")

    @property
    def identity(self) -> str:
        """The name of exactly this detector."""
        return self.name

    def to(self, device: str | torch.device) -> Detector:
        """Move the network; returns itself."""
        self.device = torch.device(device)
        if self.net is not None:
            self.net.to(self.device)
        return self

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """RGB images uint8 [n, 3, H, W] -> the input of the network, on its device."""
        raise NotImplementedError

    @torch.no_grad()
    @full()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images uint8 [N, 3, H, W], or grey [N, 1, H, W] for three equal channels -> [N, F] float32, on the device.

        In `precision`, float32 being full also where TF32 is the default. Raises ValueError for other images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ValueError(f"detector '{self.name}' looks at RGB or grey images, uint8 [N, C, H, W], got {got}")
        parts = images.expand(-1, 3, -1, -1).split(CHUNK.get(self.device.type, CHUNK_OTHERS))
        found = torch.cat([self._seen(part, self.precision) for part in parts])
        if self.precision in REDUCED and self.precision_error is None:
            exact = self._seen(parts[0], "fp32")
            self.precision_error = float((found[: len(exact)] - exact).norm() / exact.norm())
        return found

    def _seen(self, images, precision):
        x, kind = self.prepare(images), getattr(torch, REDUCED.get(precision, "float32"))
        with torch.autocast(self.device.type, kind, enabled=precision in REDUCED):
            return self.net(x).float()


class OfFunction(Detector):
    """A plain function images -> features as a detector."""

    def __init__(self, function: object, name: str):
        self.features, self.name = function, name


def about(detector: object) -> dict:
    """What a detector says of itself: {name, width, channels, resize, sha256, precision}; plain data for files."""
    said = {name: getattr(detector, name, getattr(Detector, name, None)) for name in ABOUT}
    return {name: value if isinstance(value, (str, int)) else None for name, value in said.items()}
