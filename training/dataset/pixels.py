"""From what a file says about its pixels to 8 bits per channel, by one rule. Needs no torch.

| the file | becomes |
| --- | --- |
| EXIF or TIFF orientation | turned, as viewers show it |
| alpha, transparent colours of palettes, tRNS | laid over `--background`; with `--channels=4` a channel (over it where 0) |
| CMYK, YCbCr, palette, 1 bit | sRGB by Pillow's formula; LAB by its profile; other ICC profiles are not applied |
| more than 8 bits, float | refused without `--depth`: 256 equal steps from LOW (0) to HIGH (255) |
| several frames | the first |
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import PIL.Image
import PIL.ImageColor

DEPTHS = {"scale16": (0.0, 65535.0), "unit": (0.0, 1.0), "minmax": None}  # LOW, HIGH; None: of each image
_TURNS = (  # by orientation 2..8
    PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    PIL.Image.Transpose.ROTATE_180,
    PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    PIL.Image.Transpose.TRANSPOSE,
    PIL.Image.Transpose.ROTATE_270,
    PIL.Image.Transpose.TRANSVERSE,
    PIL.Image.Transpose.ROTATE_90,
)
_ALPHA = {"LA", "PA", "RGBA", "RGBa"}
GREY = {"1", "L", "LA"}


def orientation(image: PIL.Image.Image) -> int:
    """1..8 as in EXIF; 1 (upright) where there is none or it cannot be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # every kind of damage: viewers show such images as they are stored
        return 1
    return value if value in range(2, 9) else 1


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as viewers show it."""
    turn = orientation(image)
    return image if turn == 1 else image.transpose(_TURNS[turn - 2])


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) of `upright(image)`; decodes only TIFF, which Pillow may turn itself."""
    if image.format == "TIFF" and orientation(image) > 4:
        image.load()
    return image.size[::-1] if orientation(image) > 4 else image.size


def note_depth(image: PIL.Image.Image, data: bytes) -> None:
    """`info["deep"]`: whether a file, opened but not loaded, holds more than 8 bits per channel, which Pillow may cut.

    A transparent colour in `info`, which Pillow keeps in the file's units, is brought to those of the 8 bits.
    """
    args = image.tile[0][3] if image.tile else ()
    args = args if isinstance(args, tuple) else (args,)
    deep = image.mode.startswith(("I", "F"))
    if image.format in ("PNG", "TIFF"):
        deep = deep or any(isinstance(arg, str) and ";16" in arg for arg in args)
    elif image.format == "SGI":
        deep = data[3:4] == b"\2"  # bytes per channel
    elif image.format == "PPM":
        deep = deep or (len(args) > 1 and isinstance(args[-1], int) and args[-1] > 255)
    elif image.format == "JPEG2000":  # SIZ: length, capabilities, eight sizes, components, bits - 1 of the first
        start = data.find(b"\xff\x4f\xff\x51")
        deep = deep or (start >= 0 and (data[start + 42 : start + 43] or b"\0")[0] & 0x7F > 7)
    elif image.format == "AVIF":
        start = data.find(b"av1C")
        deep = start >= 0 and bool((data[start + 6 : start + 7] or b"\0")[0] & 0x40)
    hidden = image.info.get("transparency")
    if image.format == "PNG" and isinstance(hidden, int) and image.mode in ("1", "L"):
        image.info["transparency"] = hidden * {"1": 255, "L;2": 85, "L;4": 17}.get(args[0] if args else "", 1)
    elif deep and isinstance(hidden, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    image.info["deep"] = deep


def see_through(image: PIL.Image.Image) -> bool:
    """Whether the file can hide colours: alpha, or a transparent colour."""
    palette_alpha = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return image.mode in _ALPHA or "transparency" in image.info or palette_alpha


class Pixels:
    """The rule: image as decoded -> L, RGB or RGBA; counts what it did. ValueError for colour or depth it does not know.

    channels: 1, 3 or 4; background: any colour of Pillow (white, #ff8800, rgb(0,0,0)); depth: a name of DEPTHS or LOW:HIGH.
    """

    def __init__(self, channels: int, background: str = "white", depth: str | None = None):
        self.mode, self.counts, self.total = {1: "L", 3: "RGB", 4: "RGBA"}[channels], Counter(), 0
        self.counting = threading.Lock()
        self.background, self.depth = background, depth
        try:
            self.colour = PIL.ImageColor.getrgb(background)[:3]
        except ValueError as err:
            raise ValueError(f"--background={background}: no colour; give a name such as white, or #rrggbb") from err
        if depth is not None and depth not in DEPTHS:
            try:
                low, high = (float(number) for number in depth.split(":"))
            except ValueError:
                low = high = 0.0
            if not -np.inf < low < high < np.inf:
                raise ValueError(f"--depth={depth}: give {', '.join(DEPTHS)} or LOW:HIGH with LOW < HIGH, e.g. 0:4095")
            self.range = (low, high)
        else:
            self.range = DEPTHS.get(depth)

    def __call__(self, image: PIL.Image.Image, name: str) -> PIL.Image.Image:
        """The image in `mode`, without metadata. name: for messages."""
        found = Counter(frames=bool(image.info.get("frames")))
        found["turned"] = orientation(image) != 1 or bool(image.info.get("turned"))
        image = upright(image)
        if image.info.get("deep") or image.mode.startswith(("I", "F")):
            image, found["deep"] = self._eight_bits(image, name), 1
        found["grey"] = image.mode in GREY
        if image.mode == "LAB":
            image = image.convert("RGB")
        if see_through(image):
            image, found["alpha"] = self._composited(image)
        image = image if image.mode == self.mode else image.convert("RGB").convert(self.mode)
        image.info = {}  # a profile or text would be copied into every file
        with self.counting:
            self.total += 1
            self.counts.update(found)
        return image

    def _eight_bits(self, image, name):
        if self.depth is None:
            raise ValueError(
                f"{name} has more than 8 bits per channel (pixel mode {image.mode}); say how they become 8: "
                f"--depth=scale16 (0..65535), unit (0..1), minmax (of each image) or LOW:HIGH"
            )
        if not image.mode.startswith(("I", "F")):  # Pillow has kept the upper 8 bits: 256 equal steps
            if self.range != DEPTHS["scale16"]:
                raise ValueError(f"{name} has colours of 16 bits, of which the upper 8 are read: use --depth=scale16")
            return image
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity; leave it out")
        least, most = values.min(), values.max()
        low, high = self.range or (least, most)
        if least < low or most > high:
            raise ValueError(
                f"{name} holds {least:g}..{most:g}, outside --depth={self.depth} ({low:g}..{high:g}); "
                f"give --depth=LOW:HIGH that holds all images"
            )
        steps = np.floor((values - low) * (256 / ((high - low) or 1))).clip(0, 255).astype(np.uint8)
        hidden = image.info.get("transparency")
        grey = PIL.Image.fromarray(steps)
        if isinstance(hidden, (int, float)):
            grey.putalpha(PIL.Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
        return grey

    def _composited(self, image):
        """(image in `mode` or RGBA, whether anything could be seen through)."""
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        least, most = alpha.getextrema()
        if least == 255:
            return image, False
        plain = PIL.Image.new("RGBA", image.size, (*self.colour, 255))
        if self.mode != "RGBA":
            return PIL.Image.alpha_composite(plain, image), True
        plain.putalpha(0)
        return PIL.Image.composite(image, plain, alpha.point(lambda a: 255 * (a > 0))), True

    def notes(self, automatic: bool) -> list[str]:
        """What was done, in lines with counts. automatic: nobody chose the channels."""
        kept = "alpha kept as a channel" if self.mode == "RGBA" else f"laid over --background={self.background}"
        said = {
            "turned": "turned upright, as their orientation tag says",
            "alpha": f"transparent: {kept}",
            "deep": f"of more than 8 bits per channel: scaled with --depth={self.depth}",
            "frames": "of several frames: only the first is taken",
        }
        lines = [f"{n} of {self.total} images {text}" for key, text in said.items() if (n := self.counts[key])]
        if automatic and 0 < self.counts["grey"] < self.total and self.mode == "RGB":
            lines.append(
                f"{self.counts['grey']} of {self.total} images are grey among colour, all become RGB: --channels=1|3"
            )
        return lines
