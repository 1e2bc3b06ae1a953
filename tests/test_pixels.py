"""What files say about their pixels: orientation, transparency, depth, colour spaces, frames; no image decides for all."""

import io
import json
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from small_runs import one_line, run

import dataset_tool
from training.dataset import ImageFolderDataset
from training.dataset.format import MOST_PIXELS, decode_image, open_image
from training.dataset.pixels import upright_size

R = np.random.RandomState(0)
PHOTO = R.randint(0, 256, (8, 8, 3)).astype(np.uint8)
COVER = np.zeros((8, 8), np.uint8)  # alpha: nothing, half, all
COVER[2:6, 2:6], COVER[3:5, 3:5] = 128, 255
# What a viewer does with the stored rows and columns (EXIF 2.32, tag 0x0112), by NumPy alone.
VIEWED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def encoded(image, format="png", **options):
    file = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def png(bits, colour_type, rows, transparent=b"", size=(8, 8), more=b""):
    """A PNG of any depth, written by hand. rows: bytes of each row."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)) + more
    head += chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 1))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def folder(path, files):
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def converted(tmp_path, files, *more):
    """(images [H,W,C] in the order of their names, what stderr says)."""
    source, dest = folder(tmp_path / "s", files), tmp_path / "o"
    result = run(dataset_tool.main, "convert", f"--source={source}", f"--dest={dest}", "--overwrite", *more)
    images = [np.array(PIL.Image.open(file)) for file in sorted(dest.rglob("*.png"))]
    assert len(images) == json.loads(result.stdout)["count"] == len(files)
    return [image if image.ndim == 3 else image[..., None] for image in images], result.stderr


def refused(tmp_path, files, *more, says):
    source = folder(tmp_path / "s", files)
    one_line(dataset_tool.main, "convert", f"--source={source}", f"--dest={tmp_path}/o.zip", *more, says=says)
    assert not (tmp_path / "o.zip").exists()


# --- Orientation


@pytest.mark.parametrize("format", ["png", "tiff", "webp", "jpeg"])
def test_images_are_turned_as_viewers_show_them(tmp_path, format):
    block = np.zeros((8, 8, 3), np.uint8)
    block[:4, :4], block[4:, :4] = (250, 10, 10), (10, 10, 250)  # three quarters that tell all turns apart
    files = {}
    for turn in VIEWED:
        exif = PIL.Image.Exif()
        exif[0x0112] = turn
        options = {"lossless": True} if format == "webp" else {"quality": 100} if format == "jpeg" else {}
        files[f"{turn}.{format}"] = encoded(block, format, exif=exif, **options)
    images, stderr = converted(tmp_path, files)
    for turn, image in zip(VIEWED, images, strict=True):
        shift = np.abs(image.astype(int) - VIEWED[turn](block)).mean()
        assert shift < (30 if format == "jpeg" else 1e-9), turn
    assert "7 of 8 images turned upright" in stderr
    with pytest.raises(ValueError, match=r"6.*orientation.*convert"):
        decode_image(files[f"6.{format}"], f"6.{format}")
    assert decode_image(files[f"1.{format}"], f"1.{format}").shape == (3, 8, 8)


@pytest.mark.parametrize("format", ["png", "tiff", "webp", "jpeg"])
def test_the_size_is_that_of_the_turned_image(format):
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    data = encoded(np.zeros((4, 10, 3), np.uint8), format, exif=exif)
    assert upright_size(open_image(data, "a", header_only=True)) == (4, 10)


def test_damaged_exif_turns_nothing(tmp_path):
    (image,), _ = converted(tmp_path, {"a.png": encoded(PHOTO, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")})
    assert np.array_equal(image, PHOTO)


# --- Transparency


def _over(colour, alpha, background=255):
    """Alpha compositing in exact arithmetic, of [H,W,C] colours."""
    share = alpha[..., None] / 255
    return colour * share + np.asarray(background) * (1 - share)


def _transparent(kind, hidden):
    """(file, what it looks like on white [H,W,3]); hidden: colours where nothing is seen."""
    colour = np.where(COVER[..., None] > 0, PHOTO, hidden).astype(np.uint8)
    rgba = np.dstack([colour, COVER])
    if kind.startswith("rgba"):
        format = kind[4:]
        return encoded(rgba, format, **({"lossless": True, "exact": True} if format == "webp" else {})), _over(
            colour, COVER
        )
    grey = colour[..., :1]
    if kind == "la":
        return encoded(PIL.Image.fromarray(np.dstack([grey, COVER[..., None]]), "LA")), _over(grey, COVER).repeat(3, 2)
    if kind == "palette":  # colours 0 (seen through), 1, 2
        index = (COVER > 0).astype(np.uint8) + (COVER == 255)
        image = PIL.Image.fromarray(index, "P")
        image.putpalette([*hidden[0, 0].tolist(), 200, 10, 10, 10, 200, 10])
        seen = np.array([[255] * 3, [200, 10, 10], [10, 200, 10]])[index]
        return encoded(image, transparency=0), seen
    key = hidden[0, 0]
    seen = np.where(COVER[..., None] > 0, 100, 255).repeat(3, 2)
    if kind == "rgb-trns":
        colour = np.where(COVER[..., None] > 0, 100, key).astype(np.uint8)
        return png(8, 2, [row.tobytes() for row in colour], struct.pack(">HHH", *map(int, key))), seen
    if kind == "l-trns":
        grey = np.where(COVER > 0, 100, key[0]).astype(np.uint8)
        return png(8, 0, [row.tobytes() for row in grey], struct.pack(">H", int(key[0]))), seen
    if kind == "l4-trns":  # 4 bits: 0..15
        grey = np.where(COVER > 0, 5, key[0] // 17).astype(np.uint8)
        rows = [bytes(row[::2] * 16 + row[1::2]) for row in grey]
        return png(4, 0, rows, struct.pack(">H", int(key[0] // 17))), np.where(COVER[..., None] > 0, 85, 255).repeat(
            3, 2
        )
    raise AssertionError(kind)


KINDS = ["rgbapng", "rgbawebp", "rgbatiff", "la", "palette", "rgb-trns", "l-trns", "l4-trns"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_the_same_becomes_the_same(tmp_path, kind):
    flat = lambda value: np.full((8, 8, 3), value)
    pairs = [_transparent(kind, flat(0)), _transparent(kind, flat(255))]
    ending = kind[4:] if kind.startswith("rgba") else "png"
    files = {f"{i}.{ending}": data for i, (data, _) in enumerate(pairs)}
    files[f"2.{ending}"] = encoded(PHOTO, ending, **({"lossless": True} if ending == "webp" else {}))
    (first, second, plain), stderr = converted(tmp_path, files)
    assert np.array_equal(first, second) and np.array_equal(plain, PHOTO)
    assert np.abs(first - pairs[0][1]).max() <= 1  # rounding of the half-transparent ones
    assert "2 of 3 images transparent: laid over --background=white" in stderr
    if kind not in ("rgbapng", "rgbawebp", "rgbatiff", "la"):
        with pytest.raises(ValueError, match=r"0.*transparent.*convert"):
            decode_image(files["0.png"], "0.png")


def test_background_and_alpha_as_a_channel(tmp_path):
    data, _ = _transparent("rgbapng", np.zeros((8, 8, 3)))
    (image,), stderr = converted(tmp_path, {"a.png": data}, "--background=#ff8000")
    assert np.abs(image - _over(PHOTO, COVER, (255, 128, 0))).max() <= 1 and "--background=#ff8000" in stderr
    files = {"a.png": data, "b.png": _transparent("rgbapng", np.full((8, 8, 3), 77))[0], "c.png": encoded(PHOTO)}
    (tmp_path / "four").mkdir()
    images, stderr = converted(tmp_path / "four", files, "--channels=4")
    seen = COVER[..., None] > 0
    assert np.array_equal(images[0], np.dstack([np.where(seen, PHOTO, 255), COVER]))
    assert np.array_equal(images[1], images[0]) and np.array_equal(images[2], np.dstack([PHOTO, np.full((8, 8), 255)]))
    assert "2 of 3 images transparent: alpha kept" in stderr
    assert ImageFolderDataset(tmp_path / "four" / "o").image_shape == [4, 8, 8]
    for option in ("--background=nocolour", "--depth=eight", "--depth=5:5"):
        one_line(
            dataset_tool.main, "convert", "--source=sklearn:digits", f"--dest={tmp_path}/x.zip", option, says=option
        )


# --- Depth

DEEP = (np.arange(64).reshape(8, 8) * 1040 + 7).astype(np.uint16)


def _deep_files():
    colour = np.stack([DEEP, DEEP[::-1], DEEP.T], -1)
    return {
        "grey.png": encoded(DEEP),
        "grey.tiff": encoded(DEEP, "tiff"),
        "float.tiff": encoded(DEEP.astype(np.float32), "tiff"),
        "int.tiff": encoded(DEEP.astype(np.int32), "tiff"),
        "grey.pgm": b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes(),
        "rgb.png": png(16, 2, [row.astype(">u2").tobytes() for row in colour]),
        "rgba.png": png(16, 6, [np.dstack([colour, 0 * DEEP + 65535])[i].astype(">u2").tobytes() for i in range(8)]),
        "la.png": png(16, 4, [np.dstack([DEEP, 0 * DEEP + 65535])[i].astype(">u2").tobytes() for i in range(8)]),
        "rgb.ppm": b"P6 8 8 65535\n" + colour.astype(">u2").tobytes(),
    }


@pytest.mark.parametrize("name", [*_deep_files()])
def test_more_than_8_bits_are_scaled_by_a_rule_or_refused(tmp_path, name):
    data = _deep_files()[name]
    refused(tmp_path, {name: data}, says=[name, "--depth=scale16"])
    with pytest.raises(ValueError, match=f"{name}.*8 bits.*convert"):
        decode_image(data, name)
    (tmp_path / "d").mkdir()
    (image,), stderr = converted(tmp_path / "d", {name: data}, "--depth=scale16")
    colour = np.stack([DEEP, DEEP[::-1], DEEP.T] if name.startswith("rgb") else [DEEP] * 3, -1)
    want = colour.astype(int) // 256  # 256 equal steps
    assert np.abs(image.astype(int) - want).max() <= (name == "rgb.ppm"), name  # by its own largest number
    assert "1 of 1 images of more than 8 bits per channel: scaled with --depth=scale16" in stderr


def test_depth_rules(tmp_path):
    unit = (np.arange(64).reshape(8, 8) / 63).astype(np.float32)
    files = {"a.tiff": encoded(unit, "tiff"), "b.png": encoded(PHOTO)}
    (image, plain), stderr = converted(tmp_path, files, "--depth=unit")
    assert np.array_equal(image[..., 0], np.minimum(np.floor(unit * 256), 255)) and np.array_equal(plain, PHOTO)
    assert "1 of 2 images are grey among colour" in stderr
    (tmp_path / "m").mkdir()
    (low, high), _ = converted(
        tmp_path / "m", {"a.tiff": encoded(unit, "tiff"), "b.tiff": encoded(unit * 9 - 4, "tiff")}, "--depth=minmax"
    )
    assert low.min() == high.min() == 0 and low.max() == high.max() == 255 and np.abs(low.astype(int) - high).max() <= 1
    (tmp_path / "t").mkdir()
    (image,), _ = converted(tmp_path / "t", {"a.png": encoded((DEEP // 16).astype(np.uint16))}, "--depth=0:4095")
    assert np.array_equal(image[..., 0], DEEP // 16 // 16)
    for i, (value, rule, says) in enumerate(
        [(2.0, "unit", "0..2,"), (np.nan, "minmax", "NaN"), (-1.0, "0:9", "-1..1")]
    ):
        (tmp_path / f"r{i}").mkdir()
        array = unit.copy()
        array[3, 3] = value
        refused(tmp_path / f"r{i}", {"a.tiff": encoded(array, "tiff")}, f"--depth={rule}", says=["a.tiff", says])
    (tmp_path / "c").mkdir()
    refused(
        tmp_path / "c", {"rgb.png": _deep_files()["rgb.png"]}, "--depth=minmax", says=["rgb.png", "--depth=scale16"]
    )


def test_the_transparent_colour_of_16_bits(tmp_path):
    grey = np.where(COVER > 0, 40000, 1234).astype(">u2")
    data = png(16, 0, [row.tobytes() for row in grey], struct.pack(">H", 1234))
    colour = png(
        16, 2, [np.stack([row] * 3, -1).astype(">u2").tobytes() for row in grey], struct.pack(">HHH", *[1234] * 3)
    )
    images, _ = converted(tmp_path, {"a.png": data, "b.png": colour}, "--depth=scale16")
    for image in images:
        assert np.array_equal(image[..., 0], np.where(COVER > 0, 40000 // 256, 255))


# --- Colour spaces, frames, sizes


def test_colour_spaces(tmp_path):
    cmyk = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    lab = PIL.Image.new("LAB", (8, 8), (137, 208, 195))  # CIELAB 53.7, 80, 67 as bytes with a and b + 128
    index = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    palette = R.randint(0, 256, (64, 3))
    index.putpalette(palette.ravel().tolist())
    files = {"0.tiff": encoded(cmyk, "tiff"), "1.tiff": encoded(lab, "tiff"), "2.png": encoded(index)}
    files["3.png"] = encoded(PIL.Image.fromarray(COVER > 0))
    (cmyk, lab, index, one), _ = converted(tmp_path, files)
    assert (cmyk == [255, 0, 0]).all() and np.array_equal(index.reshape(64, 3), palette)
    assert np.abs(lab[0, 0].astype(int) - [255, 0, 0]).max() <= 12  # sRGB red is Lab 54.3, 80.8, 69.9 (D50)
    assert np.array_equal(one, np.where(COVER[..., None] > 0, 255, 0).repeat(3, 2))


@pytest.mark.parametrize("format", ["gif", "tiff", "webp", "png"])
def test_the_first_of_several_frames(tmp_path, format):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if format == "webp" else {}
    files = {
        f"0.{format}": encoded(frames[0], format, save_all=True, append_images=frames[1:], **options),
        f"1.{format}": encoded(frames[1], format, **options),
    }
    (first, single), stderr = converted(tmp_path, files)
    assert (first == [255, 0, 0]).all() and (single == [0, 255, 0]).all()
    assert "1 of 2 images of several frames: only the first" in stderr


def test_large_images_texts_and_profiles_open(tmp_path):
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    files = {"text.png": encoded(PHOTO, pnginfo=text), "profile.png": encoded(PHOTO, icc_profile=bytes(3_000_000))}
    images, _ = converted(tmp_path, files)
    assert all(np.array_equal(image, PHOTO) for image in images)
    assert all(file.stat().st_size < 1000 for file in (tmp_path / "o").rglob("*.png"))  # metadata stay behind
    side = 13_500  # 182 megapixels of one bit
    large = png(1, 0, [bytes((side + 7) // 8)] * side, size=(side, side))
    assert open_image(large, "large.png", header_only=True).size == (side, side)
    more = png(1, 0, [], size=(MOST_PIXELS, 2))
    with pytest.raises(ValueError, match=r"^more.png has more than \d+ x 2\*\*20 pixels"):
        open_image(more, "more.png")
    text.add_text("workflow", "x" * 70_000_000, zip=True)
    with pytest.raises(ValueError, match=r"^a.png is a PNG with more than 64 MiB of text"):
        open_image(encoded(PHOTO, pnginfo=text), "a.png")


# --- No image decides for all


def test_grey_first_does_not_turn_all_grey(tmp_path):
    files = {"a.png": encoded(PHOTO[..., 0]), "b.png": encoded(PHOTO), "c.png": encoded(PHOTO)}
    files["dataset.json"] = json.dumps(
        {"labels": [["a.png", 0], ["b.png", 1], ["c.png", 1]], "num_classes": 2}
    ).encode()
    source = folder(tmp_path / "s", files)

    def channels(*more):
        result = run(dataset_tool.main, "convert", f"--source={source}", f"--dest={tmp_path}/o", "--overwrite", *more)
        first = next(iter(sorted((tmp_path / "o").rglob("*.png"))))
        return json.loads(result.stdout)["channels"], PIL.Image.open(first).mode, result.stderr

    count, mode, stderr = channels()
    assert (count, mode) == (3, "RGB") and "1 of 3 images are grey among colour" in stderr
    assert channels("--channels=1")[:2] == (1, "L") and "among colour" not in channels("--channels=3")[2]
    for name in ("b.png", "c.png"):
        (source / name).write_bytes(files["a.png"])
    assert channels()[:2] == (1, "L")


def test_a_preview_among_latents_is_not_the_data_set(tmp_path):
    array = io.BytesIO()
    np.save(array, R.randn(8, 4, 4).astype(np.float32))
    source = folder(tmp_path / "s", {"preview.png": encoded(PHOTO), **{f"{i}.npy": array.getvalue() for i in range(3)}})
    data = ImageFolderDataset(source)
    assert len(data) == 3 and data.image_shape == [8, 4, 4] and "1 stray file ignored" in data.about


def test_arrays_of_two_types_are_no_data_set(tmp_path):
    arrays = {}
    for i, kind in enumerate([np.uint8, np.float32]):
        file = io.BytesIO()
        np.save(file, np.zeros((3, 4, 4), kind))
        arrays[f"{i}.npy"] = file.getvalue()
    data = ImageFolderDataset(folder(tmp_path / "s", arrays))
    with pytest.raises(ValueError, match=r"1.npy holds float32, but the first image uint8"):
        data[1]
