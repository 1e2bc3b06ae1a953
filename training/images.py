"""Pictures: uint8 tensors to PNG files, and labelled grids with a row per source."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.PngImagePlugin
import torch

from dnnlib.util import atomic_write


def to_pil(image: torch.Tensor | np.ndarray) -> PIL.Image.Image:
    """uint8 tensor or array [C, H, W] with 1 or 3 channels -> PIL image."""
    array = np.asarray(image)
    return PIL.Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def png_bytes(image: torch.Tensor | np.ndarray, texts: dict[str, str] | None = None) -> bytes:
    """The bytes of `image` [C, H, W] as an uncompressed PNG (as EDM2's tools write them). texts: {keyword: text} beside it."""
    buffer, info = io.BytesIO(), PIL.PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    to_pil(image).save(buffer, format="png", compress_level=0, optimize=False, pnginfo=info)
    return buffer.getvalue()


def save_grid(path: str | Path, rows: Sequence[Sequence[torch.Tensor]], titles: Sequence | None = None) -> None:
    """One PNG with a row of images per entry of `rows`, each row a sequence of [C, H, W]; written atomically.

    uint8 are pixels; of arrays the first three channels (the first of less than three) are shown from their lowest value to
    their highest in the grid. titles: text left of each row. Small images are enlarged to 32 pixels at least.
    """
    rows = [list(row) for row in rows if len(row)]
    if not rows:
        return
    if rows[0][0].dtype != torch.uint8:
        rows = _as_pixels(rows)
    height, width = rows[0][0].shape[-2:]
    zoom = max(1, -(-32 // width))
    margin, left = 2, 8 + 7 * max(len(str(t)) for t in titles) if titles else 0
    across, down = max(map(len, rows)) * (width * zoom + margin), len(rows) * (height * zoom + margin)
    canvas = PIL.Image.new("RGB", (left + across + margin, down + margin), (255,) * 3)
    pen = PIL.ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        top = margin + y * (height * zoom + margin)
        if titles:
            pen.text((4, top + height * zoom // 2 - 6), str(titles[y]), fill=(0, 0, 0))
        for x, image in enumerate(row):
            tile = to_pil(image).resize((width * zoom, height * zoom), PIL.Image.NEAREST)
            canvas.paste(tile, (left + margin + x * (width * zoom + margin), top))
    with atomic_write(path) as file:
        canvas.save(file, format="png")


def _as_pixels(rows):
    shown = [[image[: 3 if len(image) >= 3 else 1].float() for image in row] for row in rows]
    low = min(image.min() for row in shown for image in row)
    scale = 255 / max(max(image.max() for row in shown for image in row) - low, 1e-12)
    return [[((image - low) * scale).round().to(torch.uint8) for image in row] for row in shown]
