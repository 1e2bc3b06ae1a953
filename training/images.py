"""Pictures: uint8 tensors to PNG files, and labelled grids with a row per source."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from dnnlib.util import atomic_write


def to_pil(image: torch.Tensor | np.ndarray) -> PIL.Image.Image:
    """uint8 tensor or array [C, H, W] with 1 or 3 channels -> PIL image."""
    array = np.asarray(image)
    return PIL.Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


SHOWN_WIDTH = 64  # pixels of an image in a grid, at least
LONGEST_TITLE = 24


def grid(rows: Sequence[Sequence[torch.Tensor]], titles: Sequence | None = None) -> PIL.Image.Image:
    """One picture with a row of images per entry of `rows`, each row a sequence of [C, H, W].

    uint8 are pixels; of arrays the first three channels (the first of less than three) are shown from their lowest value to
    their highest in the grid. titles: text left of each row. Small images are enlarged (nearest) to SHOWN_WIDTH.
    """
    rows = [list(row) for row in rows]
    first = next(image for row in rows for image in row)
    if first.dtype != torch.uint8:
        rows = _as_pixels(rows)
    height, width = first.shape[-2:]
    zoom, font = max(1, -(-SHOWN_WIDTH // width)), PIL.ImageFont.load_default(size=14)
    short = lambda text: text if len(text) <= LONGEST_TITLE else f"{text[: LONGEST_TITLE - 1]}…"
    titles = [short(str(title)) for title in titles or ()]
    margin, left = 2, 10 + int(max(map(font.getlength, titles))) if titles else 0
    across, down = max(map(len, rows)) * (width * zoom + margin), len(rows) * (height * zoom + margin)
    canvas = PIL.Image.new("RGB", (left + across + margin, down + margin), (255,) * 3)
    pen = PIL.ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        top = margin + y * (height * zoom + margin)
        if titles:
            pen.text((4, top + height * zoom // 2), titles[y], fill=(0, 0, 0), font=font, anchor="lm")
        for x, image in enumerate(row):
            tile = to_pil(image).resize((width * zoom, height * zoom), PIL.Image.NEAREST)
            canvas.paste(tile, (left + margin + x * (width * zoom + margin), top))
    return canvas


def save_grid(path: str | Path, rows: Sequence[Sequence[torch.Tensor]], titles: Sequence | None = None) -> None:
    """`grid` as a PNG, written atomically; nothing where no row has an image."""
    if any(len(row) for row in rows):
        with atomic_write(path) as file:
            grid(rows, titles).save(file, format="png")


def _as_pixels(rows):
    shown = [[image[: 3 if len(image) >= 3 else 1].float() for image in row] for row in rows]
    low = min(image.min() for row in shown for image in row)
    scale = 255 / max(max(image.max() for row in shown for image in row) - low, 1e-12)
    return [[((image - low) * scale).round().to(torch.uint8) for image in row] for row in shown]
