"""Data sets: EDM2's format read and written by independent code, labels, subsets, orders, errors in one line."""

import io
import itertools
import json
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from training import dataset as ds
from training.dataset.format import png_bytes, to_array


def png(array):
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, format="png")
    return file.getvalue()


def write(path, files):
    """Files {name: bytes} as a folder or a zip, by the standard library alone."""
    if str(path).endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return str(path)


@pytest.fixture
def pixels():
    return np.random.RandomState(0).randint(0, 256, size=[6, 4, 4, 3]).astype(np.uint8)


def collection(pixels, labels=None, **extra):
    files = {f"0000{i // 3}/img{i:08d}.png": png(image) for i, image in enumerate(pixels)}
    pairs = None if labels is None else [[name, label] for name, label in zip(files, labels, strict=True)]
    files["dataset.json"] = json.dumps({"labels": pairs, **extra}).encode()
    return files


@pytest.mark.parametrize("container", ["data", "data.zip"])
def test_reads_edm2_files(tmp_path, pixels, container):
    dataset = ds.ImageFolderDataset(write(tmp_path / container, collection(pixels, [0, 1, 2, 0, 1, 2])))
    assert (len(dataset), dataset.name, dataset.image_shape, dataset.num_channels) == (6, "data", [3, 4, 4], 3)
    assert (dataset.resolution, dataset.label_shape, dataset.label_dim) == (4, [3], 3)
    assert dataset.has_labels and dataset.has_onehot_labels and dataset.num_classes == 3
    assert dataset.raw_labels.dtype == np.int64 and dataset.raw_labels.tolist() == [0, 1, 2, 0, 1, 2]
    for i in range(6):
        image, label = dataset[i]
        assert image.dtype == np.uint8 and np.array_equal(image, pixels[i].transpose(2, 0, 1))
        assert label.dtype == np.float32 and label.tolist() == np.eye(3)[i % 3].tolist()
    details = dataset.details(4)
    assert (details.raw_idx, details.xflip, details.raw_label) == (4, False, 1)
    images, labels = ds.load_arrays(dataset)
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2)) and labels.shape == (6, 3)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[5][0], dataset[5][0])


def test_explicit_number_of_sources_keeps_global_ids(tmp_path, pixels):
    """A single-source file agrees with the multi-source file on label length and position."""
    files = collection(pixels, [1] * 6, num_classes=5, class_names=list("abcde"))
    dataset = ds.ImageFolderDataset(write(tmp_path / "d.zip", files))
    assert (dataset.label_dim, dataset.num_classes, dataset.class_names) == (5, 5, list("abcde"))
    assert dataset[0][1].tolist() == [0, 1, 0, 0, 0]
    unconditional = ds.ImageFolderDataset(str(tmp_path / "d.zip"), use_labels=False)
    assert (unconditional.label_dim, unconditional[0][1].shape, unconditional.has_labels) == (0, (0,), False)
    assert unconditional.num_classes == 5 and unconditional.indices_of(1).size == 6
    assert unconditional.content_hash() == dataset.content_hash()


def test_label_vectors_and_no_labels(tmp_path, pixels):
    vectors = [[0.5, i] for i in range(6)]
    dataset = ds.ImageFolderDataset(write(tmp_path / "v.zip", collection(pixels, vectors)))
    assert dataset.label_dim == 2 and not dataset.has_onehot_labels and dataset[3][1].tolist() == [0.5, 3.0]
    assert dataset.num_classes == 0
    with pytest.raises(ValueError, match="no class indices"):
        dataset.indices_of(0)
    for name, files in {"null": collection(pixels), "none": {"a.png": png(pixels[0])}}.items():
        dataset = ds.ImageFolderDataset(write(tmp_path / f"{name}.zip", files))
        assert (dataset.label_dim, dataset.has_labels, dataset[0][1].shape) == (0, False, (0,))
        assert ds.load_arrays(dataset)[1].shape == (len(dataset), 0)


def test_npy_grey_and_palette(tmp_path):
    latents = np.random.RandomState(1).randn(2, 8, 4, 4).astype(np.float32)
    files = {}
    for i, array in enumerate(latents):
        file = io.BytesIO()
        np.save(file, array)
        files[f"img-mean-std-{i:08d}.npy"] = file.getvalue()
    dataset = ds.ImageFolderDataset(write(tmp_path / "npy.zip", files))
    assert dataset.image_shape == [8, 4, 4] and np.array_equal(dataset[1][0], latents[1])
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    dataset = ds.ImageFolderDataset(write(tmp_path / "grey", {"a.png": png(grey)}))
    assert np.array_equal(dataset[0][0], grey[None])
    colour = PIL.Image.fromarray(np.stack([grey] * 3, -1)).convert("P")
    file = io.BytesIO()
    colour.save(file, format="png")
    dataset = ds.ImageFolderDataset(write(tmp_path / "palette", {"a.png": file.getvalue()}))
    assert np.array_equal(dataset[0][0], np.array(colour.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (200, 333)])  # the last in several stored blocks
def test_pngs_as_pillow_reads_them(channels, size):
    pixels = np.random.RandomState(channels).randint(0, 256, [channels, *size], np.uint8)
    data = png_bytes(pixels, {"about": '{"a": 1}'})
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.verify()  # checksums
    image = PIL.Image.open(io.BytesIO(data))
    assert image.text == {"about": '{"a": 1}'} and np.array_equal(to_array(image), pixels)


def test_max_size_and_xflip(tmp_path, pixels):
    path = write(tmp_path / "d.zip", collection(pixels, [0, 1, 2, 0, 1, 2]))
    expected = np.arange(6)
    np.random.RandomState(7).shuffle(expected)  # EDM2: shuffled, cut, sorted
    dataset = ds.ImageFolderDataset(path, max_size=4, xflip=True, random_seed=7, cache=True)
    kept = sorted(expected[:4].tolist())
    assert len(dataset) == 8 and [dataset.details(i).raw_idx for i in range(8)] == kept * 2
    assert [dataset.details(i).xflip for i in range(8)] == [False] * 4 + [True] * 4
    for _ in range(2):  # The second pass comes from the cache.
        assert np.array_equal(dataset[5][0], pixels[kept[1]].transpose(2, 0, 1)[:, :, ::-1])
        assert np.array_equal(dataset[1][0], pixels[kept[1]].transpose(2, 0, 1))
    dataset[1][0][:] = 0  # Items are copies.
    assert np.array_equal(dataset[1][0], pixels[kept[1]].transpose(2, 0, 1))


def test_subsets_and_sources(tmp_path, pixels):
    path = write(tmp_path / "d.zip", collection(pixels, [0, 2, 2, 0, 2, 0], num_classes=4))
    dataset = ds.ImageFolderDataset(path, xflip=True)
    assert dataset.indices_of(2).tolist() == [1, 2, 4, 7, 8, 10] and dataset.indices_of(1).size == 0
    view = dataset.subset(dataset.indices_of(2))
    assert len(view) == 6 and view.label_dim == 4 and view.raw_labels.tolist() == [2] * 6
    assert np.array_equal(view[3][0], pixels[1].transpose(2, 0, 1)[..., ::-1])
    assert np.array_equal(view.subset([2])[0][0], pixels[4].transpose(2, 0, 1)) and len(dataset) == 12
    for call, text in [
        (lambda: dataset.subset(dataset.indices_of(1)), "empty"),
        (lambda: dataset.indices_of(9), "no source"),
        (lambda: dataset.subset([]), "empty"),
        (lambda: dataset.subset([12]), "outside 0..11"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


def test_content_hash_proves_equal_images(tmp_path, pixels):
    labels = [0, 1, 2, 0, 1, 2]
    dataset = ds.ImageFolderDataset(write(tmp_path / "d.zip", collection(pixels, labels)))
    shuffled = [3, 1, 0, 5, 4, 2]
    other = ds.ImageFolderDataset(write(tmp_path / "o", collection(pixels[shuffled], [labels[i] for i in shuffled])))
    sources = [dataset.subset(dataset.indices_of(k)) for k in range(3)]
    assert dataset.content_hash() == other.content_hash() == ds.content_hash(*sources)
    changed = pixels.copy()
    changed[2, 1, 1, 0] ^= 1
    assert ds.ArrayDataset(changed.transpose(0, 3, 1, 2), labels).content_hash() != dataset.content_hash()
    assert ds.ArrayDataset(pixels.transpose(0, 3, 1, 2), labels).content_hash() == dataset.content_hash()
    assert ds.ArrayDataset(pixels.transpose(0, 3, 1, 2), labels[::-1]).content_hash() != dataset.content_hash()


def broken_files(pixels):
    good = collection(pixels, [0] * 6)
    first, last = "00000/img00000000.png", "00001/img00000005.png"
    labels = json.loads(good["dataset.json"])["labels"]
    with_json = lambda value: {
        **good,
        "dataset.json": value if isinstance(value, bytes) else json.dumps(value).encode(),
    }
    deep = io.BytesIO()
    PIL.Image.fromarray(np.zeros([4, 4], np.uint16)).save(deep, format="png")
    return {
        "missing entry": (with_json({"labels": labels[:5]}), f"no label for {last}"),
        "out of range": (with_json({"labels": labels[:5] + [[last, 3]], "num_classes": 3}), "label 3 out of range"),
        "negative": (with_json({"labels": labels[:5] + [[last, -1]]}), "label -1 out of range"),
        "mixed kinds": (with_json({"labels": labels[:5] + [[last, [1.0]]]}), "same length"),
        "text label": (with_json({"labels": labels[:5] + [[last, "cat"]]}), f"label of {last}"),
        "float index": (with_json({"labels": labels[:5] + [[last, 1.5]]}), f"label of {last}"),
        "huge": (with_json({"labels": labels[:5] + [[last, 10**30]]}), "64 bits"),
        "not finite": (with_json(json.dumps({"labels": [[n, [float("nan")]] for n, _ in labels]}).encode()), "finite"),
        "no pairs": (with_json({"labels": {"a": 1}}), "pairs"),
        "no object": (with_json([1]), "object"),
        "no json": (with_json(b'{"labels": '), "not valid JSON"),
        "no utf-8": (with_json(b"\xff\xfe\x00"), "not valid JSON"),
        "bad num_classes": (with_json({"labels": labels, "num_classes": 0}), "num_classes=0"),
        "bad class_names": (with_json({"labels": labels, "num_classes": 2, "class_names": ["a"]}), "1 class_names"),
        "mixed resolutions": ({**good, last: png(pixels[0][:2, :2])}, f"{last} has shape"),
        "corrupt png": ({**good, last: good[last][:40]}, f"{last} is corrupt"),
        "corrupt first": ({**good, first: b"nothing"}, f"{first} is corrupt"),
        "16 bits": ({first: deep.getvalue()}, "pixel mode"),
        "object array": ({"a.npy": b"\x93NUMPY broken"}, "no readable NPY"),
        "no images": ({"readme.txt": b""}, "no images"),
    }


@pytest.mark.parametrize("container", ["data", "data.zip"])
@pytest.mark.parametrize("case", broken_files(np.zeros([6, 4, 4, 3], np.uint8)))
def test_errors_are_one_line_with_the_file(tmp_path, pixels, case, container):
    files, message = broken_files(pixels)[case]
    path = write(tmp_path / container, files)

    def use():
        dataset = ds.ImageFolderDataset(path)
        return dataset.label_dim, [dataset[i] for i in range(len(dataset))]

    with pytest.raises(ValueError, match=message) as err:
        use()
    assert "\n" not in str(err.value) and "data" in str(err.value)


def test_errors_of_the_container(tmp_path, pixels):
    path = write(tmp_path / "d.zip", collection(pixels, [0] * 6))
    data = (tmp_path / "d.zip").read_bytes()
    with pytest.raises(ValueError, match="resolution=8"):
        ds.ImageFolderDataset(path, resolution=8)
    assert ds.ImageFolderDataset(path, resolution=4).resolution == 4
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.zip: no readable zip, perhaps truncated"):
        ds.ImageFolderDataset(tmp_path / "cut.zip")
    flipped = bytearray(data)
    flipped[data.index(b"IDAT") + 6] ^= 255  # Stored entry: the checksum of the zip notices.
    (tmp_path / "bit.zip").write_bytes(flipped)
    with pytest.raises(ValueError, match="cannot read 00000/img00000000.png"):
        ds.ImageFolderDataset(tmp_path / "bit.zip")
    for bad in ["nowhere.zip", "nowhere", "d.tar"]:
        with pytest.raises(ValueError, match="convert"):
            ds.ImageFolderDataset(tmp_path / bad)
    with pytest.raises(ValueError, match="max_size=0"):
        ds.ImageFolderDataset(path, max_size=0)
    wide = ds.ImageFolderDataset(write(tmp_path / "wide", {"a.png": png(pixels[0][:2])}))
    with pytest.raises(ValueError, match="not square"):
        _ = wide.resolution


def test_damaged_zips_raise_nothing_but_value_errors(tmp_path, pixels):
    write(tmp_path / "d.zip", collection(pixels, [0] * 6))
    data = (tmp_path / "d.zip").read_bytes()
    random, refused = np.random.RandomState(0), 0
    for _ in range(200):
        damaged = bytearray(data)
        for at in random.randint(len(data) * random.randint(2) // 2, len(data), size=random.choice([1, 3, 10])):
            damaged[at] = random.randint(256)
        (tmp_path / "x.zip").write_bytes(damaged)
        try:
            dataset = ds.ImageFolderDataset(tmp_path / "x.zip")
            assert dataset.label_dim <= 10**7 and [dataset[i] for i in range(len(dataset))]
        except ValueError as err:
            assert "x.zip" in str(err) and "\n" not in str(err)
            refused += 1
    assert refused > 100


def test_forked_workers_read_the_same(tmp_path, pixels):
    dataset = ds.ImageFolderDataset(write(tmp_path / "d.zip", collection(pixels, [0, 1, 2, 0, 1, 2])))
    expected, _ = ds.load_arrays(dataset)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([images for images, _ in loader]), expected)


def test_array_dataset_of_points():
    points = np.random.RandomState(0).randn(5, 2, 1, 1)
    dataset = ds.ArrayDataset(points, [0, 1, 0, 1, 1], num_classes=3)
    assert dataset.label_dim == 3 and dataset[1][0].dtype == np.float32 and dataset.resolution == 1
    for arguments, text in [
        ((points, [0, 1]), "one for each of 5"),
        ((points, [0, 1, 0, 1, 3], 3), "label 3 out of range"),
        ((points[:0],), "no images"),
        ((points[0],), r"\[N,C,H,W\]"),
    ]:
        with pytest.raises(ValueError, match=text):
            ds.ArrayDataset(*arguments)


# --- Orders -----------------------------------------------------------------------------------------------------------

PUBLISHED = [6, 8, 9, 7, 2, 3, 0, 1, 5, 4, 8, 1, 7, 0, 9, 5, 4, 3, 2, 6]  # EDM2's sampler: n = 10, seed 0, one rank


def test_infinite_sampler_published_order():
    take = lambda count, **kwargs: list(itertools.islice(ds.InfiniteSampler(range(10), **kwargs), count))
    assert take(20) == PUBLISHED
    assert take(10, start_idx=5) == PUBLISHED[5:15]
    assert take(5, rank=1, num_replicas=3, start_idx=3) == PUBLISHED[4:19:3]
    assert take(12, shuffle=False) == [*range(10), 0, 1]
    assert take(20, seed=1) != PUBLISHED
    assert isinstance(ds.InfiniteSampler(range(10)), torch.utils.data.Sampler)


def test_order_of_positions():
    assert ds.order(np.arange(20), 10).tolist() == PUBLISHED
    assert ds.order([[19, 0], [7, 12]], 10).tolist() == [[6, 6], [1, 7]]
    assert ds.order([3, 13], 10, shuffle=False).tolist() == [3, 3]
    far = ds.order(np.arange(7 * 10**6, 7 * 10**6 + 20), 10, seed=4)
    assert far.tolist() == list(itertools.islice(ds.InfiniteSampler(range(10), seed=4, start_idx=7 * 10**6), 20))
    indices = ds.order(np.arange(10), 10)
    indices[:] = 0  # the caller's own copy
    assert ds.order(np.arange(10), 10).tolist() == PUBLISHED[:10]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ds.InfiniteSampler([]),
        lambda: ds.InfiniteSampler(range(3), rank=2, num_replicas=2),
        lambda: ds.InfiniteSampler(range(3), start_idx=-1),
        lambda: ds.order([-1], 10),
        lambda: ds.order([0], 0),
    ],
)
def test_order_errors(call):
    with pytest.raises(ValueError):
        call()
