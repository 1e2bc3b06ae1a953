"""One loader on many damaged files, in a process of its own where nothing may be run, imported or asked for, and no more
than 4 GiB be taken: each file works, or is a ValueError or OSError that a command turns into one line and exit code 2."""

import codecs
import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch
import yaml

SECONDS, DECODED = 2.0, 10.0  # of this process, for one file; an image of nearly as many pixels as are allowed takes 6
ROOM = 4 * 2**30
FORBIDDEN = ("exec", "compile", "import", "subprocess.", "socket.", "ctypes.", "os.system", "os.exec", "os.fork")
FORBIDDEN += (
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
    "urllib.",
    "code.",
    "marshal.",
    "pickle.find_class",
)


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(data, rng):
    """Bytes with one to three kinds of damage."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        size = len(data)
        at, length = rng.randrange(size + 1), min(rng.choice([1, 4, 16, 64, 512]), size)
        other, kind = rng.randrange(size - length + 1), rng.randrange(8)
        if kind == 0:
            for _ in range(rng.randint(1, 8) if size else 0):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:  # a piece over another
            data[at : at + length] = data[other : other + length]
        elif kind == 3:  # a piece twice
            data[at:at] = data[other : other + length] * rng.choice([1, 1, 100])
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = rng.randbytes(length)
        else:  # a length, count or offset at its extreme
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice([0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1, 255, 65536])
            place = min(rng.choice([at, at - at % width, rng.randrange(min(size, 256) + 1)]), size)
            data[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, rng.choice(["little", "big"]))
    return bytes(data)


EXTREMES = [None, True, [], {}, "", "x" * 5000, "\n\0", -1, 0, 1, 255, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308]
EXTREMES += [-1e308, 5e-324, 0.5, float("nan"), float("inf"), "inf", "nan", "1", [[[0]]], [0] * 1000, {"a": {"b": [1]}}]
EXTREMES += ["\ud800", "../../x", "/dev/zero", "{a}", "~", "os.system"]


def altered(value, rng):
    """Plain data with one or two places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        places, waiting = [], [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, (list, dict)):
                keys = list(part) if isinstance(part, dict) else list(range(len(part)))
                places += [(part, key) for key in keys]
                waiting += [part[key] for key in keys]
        if not places:
            return rng.choice(EXTREMES)
        part, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del part[key]
        elif kind == 1 and isinstance(part, dict):
            part[rng.choice(["", "x", "class", "kwargs", "a" * 300])] = part.pop(key)
        elif kind == 2:
            other, name = rng.choice(places)
            with contextlib.suppress(LookupError):
                part[key] = copy.deepcopy(other[name])
        elif kind == 3 and isinstance(part[key], (int, float)):
            part[key] = part[key] * rng.choice([-1, 0, 2, 1000, 10**9, 2**40])
        else:
            part[key] = copy.deepcopy(rng.choice(EXTREMES))
        if len(str(value)) > 10**6:
            break
    return value


def json_altered(data, rng):
    text = json.dumps(altered(json.loads(data), rng))
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text) + 1)] + rng.choice(["[" * 10**5, '{"a":' * 10**4, "9" * 10**5, "1e999"])
    return text.encode()


# Damage inside, under checksums that are right again.


def in_zip(inner):
    def damage(data, rng):
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            files = [(info, old.read(info)) for info in old.infolist()]
        buffer, chosen = io.BytesIO(), rng.randrange(len(files))
        with zipfile.ZipFile(
            buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        ) as new:
            for i, (info, content) in enumerate(files):
                new.writestr(info.filename, inner(content, rng) if i == chosen else content)
        return buffer.getvalue()

    return damage


def in_png(data, rng):
    parts, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    chosen, result = rng.randrange(len(parts)), data[:8]
    for i, (kind, content) in enumerate(parts):
        if i == chosen:
            if kind == b"IDAT" and rng.random() < 0.5:
                content = zlib.compress(damaged(zlib.decompress(content), rng))
            else:
                content = damaged(content, rng)
        result += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return result


def in_records(data, rng):
    from training.dataset.archives import masked_crc32c

    record, at = [], 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        record.append(data[at + 12 : at + 12 + length])
        at += length + 16
    chosen, result = rng.randrange(len(record)), b""
    for i, content in enumerate(record):
        content = damaged(content, rng) if i == chosen else content
        head = struct.pack("<Q", len(content))
        result += head + struct.pack("<I", masked_crc32c(head)) + content + bytes(4)
    return result


def in_gzip(data, rng):
    return gzip.compress(damaged(gzip.decompress(data), rng), 1)


def in_tar(data, rng):
    with tarfile.open(fileobj=io.BytesIO(data)) as old:
        files = [(member.name, old.extractfile(member).read()) for member in old]
    chosen, buffer = rng.randrange(len(files)), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as new:
        for i, (name, content) in enumerate(files):
            content = damaged(content, rng) if i == chosen else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def in_header(data, rng):
    """The JSON of a snapshot, under a safetensors header that is right."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    if rng.random() < 0.8:
        outer["__metadata__"]["header"] = json_altered(outer["__metadata__"]["header"], rng).decode(errors="replace")
    else:
        outer = altered(outer, rng)
    text = json.dumps(outer).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def yaml_altered(data, rng):
    return yaml.safe_dump(altered(yaml.safe_load(data), rng), allow_unicode=True).encode(errors="replace")


# --- loaders: name of the file, its sound content, kinds of damage, function that reads it ---------------------------


def _image(value=0, size=8, kind="png", mode="RGB"):
    buffer = io.BytesIO()
    pixels = np.random.RandomState(value).randint(0, 256, [size, size, 3]).astype(np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _saved(write):
    """The bytes that a function (path) writes."""
    path = Path("made")
    write(path)
    found = next(p for p in (path, Path("made.npz"), Path("made.safetensors")) if p.exists())
    data = found.read_bytes()
    found.unlink()
    return data


def _net():
    from training.networks_edm2 import Precond

    return Precond(
        8, 1, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8
    )


def _snapshot():
    from torch_utils.persistence import save_snapshot
    from training import encoders, processes

    parts = dict(encoder=encoders.LogitEncoder(), process=processes.get("cld"))
    about = dict(
        nimg=1024, ema="0.100", options={"lr": 0.5, "betas": [0.9, 0.99]}, dataset={"path": "x", "num_images": 3}
    )
    return _saved(lambda path: save_snapshot(path, _net(), **parts, **about))


def _load_snapshot(path):
    from torch_utils.persistence import load_snapshot

    snapshot = load_snapshot(path)
    net = snapshot.net
    with torch.no_grad():
        net(torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution), torch.ones(1))


def _foreign(layout):
    """A file as EDM2, PFGM++ or the 2-D toys write it."""
    import foreign_files as theirs

    if layout == "pfgmpp":
        net, args, kwargs = theirs.edm_net("edm")
        return _saved(lambda path: theirs.save(theirs.pfgmpp_content(net, net, args, kwargs), path))
    content = theirs.edm2_content(*theirs.edm2_net()) if layout == "edm2" else theirs.toy_content(hidden_dim=8)[1]
    return _saved(lambda path: theirs.dump(content, path, 2 if layout == "toy" else 4))


def _checkpoint():
    state = {"cur_nimg": 1024, "options": {"lr": 0.5}, "net": _net().state_dict(), "names": [("a", 1), ("b", 2.5)]}
    return _saved(lambda path: torch.save(state, path))


def _load_checkpoint(path):
    from torch_utils import checkpoint

    for mmap in (True, False):
        checkpoint.load(path, mmap=mmap)


def _reference(kind):
    from metrics.features import FeatureSet
    from metrics.references import save_references
    from metrics.statistics import FeatureStatistics

    features, labels = np.random.RandomState(0).randn(12, 4).astype(np.float32), np.arange(12) % 3
    statistics = FeatureStatistics(3)
    statistics.update(torch.from_numpy(features), torch.from_numpy(labels))
    if kind == "npz":
        sets = {"pixel": FeatureSet("pixel", statistics, features, labels, {"dataset": "x"})}
        return _saved(lambda path: save_references(path, sets))
    mu, sigma = statistics.moments()
    return pickle.dumps({"fid": {"mu": mu, "sigma": sigma}, "num_images": 12}, protocol=4)


def _load_reference(path):
    from metrics.references import load_references

    for reference in load_references(path).values():
        reference.statistics.moments()
        reference.count(), reference.rows(0)


def _detector():
    from metrics.classifier import Classifier, ConvNet

    about = {"epochs": 1, "seed": 0, "num_train": 3, "num_holdout": 3, "accuracy": 0.5, "source_accuracy": {"0": 0.5}}
    return _saved(lambda path: Classifier(ConvNet([1, 8, 8], 3, width=4, features=4), about).save(path))


def _load_detector(path):
    from metrics.detectors import get_detector

    detector = get_detector(f"classifier:{path}")
    detector.predict(torch.zeros(2, *detector.net.image_shape, dtype=torch.uint8))


def _labels():
    for i in range(3):
        Path(f"{i}.png").write_bytes(_image(i))
    labels = [[f"{i}.png", i] for i in range(3)]
    return json.dumps({"labels": labels, "num_classes": 3, "class_names": ["a", "b", "c"]}).encode()


def _read_dataset(path):
    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path)
    assert len(dataset) < 100
    for i in range(len(dataset)):
        image, label = dataset[i]
        assert np.isfinite(image).all() and np.isfinite(label).all() and image.nbytes < 2**30


def _load_labels(path):
    _read_dataset(os.path.dirname(os.path.abspath(path)))
    _read_source(os.path.dirname(os.path.abspath(path)))


def _zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", _image(i))
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i] for i in range(3)]}))
    return buffer.getvalue()


def _read_source(path):
    from training.dataset.convert import select_images
    from training.dataset.sources import open_source

    source = open_source(str(path))
    if source.labels is not None and all(isinstance(label, int) for label in source.labels):
        select_images(source.labels, source.count, per_source=1)
    for i in range(min(source.count, 50)):
        np.asarray(source.read(i))


def _load_zip(path):
    _read_dataset(path)
    _read_source(path)


def _npy():
    buffer = io.BytesIO()
    np.save(buffer, np.random.RandomState(0).randn(8, 4, 4))
    return buffer.getvalue()


def _decode(path):
    from training.dataset.format import decode_image

    decode_image(Path(path).read_bytes(), str(path))


def _records():
    from test_dataset_archives import example, record

    pixels = np.arange(48, dtype=np.uint8)
    raw = [record(example(data=pixels.tobytes(), shape=[3, 4, 4], label=[k])) for k in range(3)]
    return b"".join(raw) + record(example(**{"image/encoded": _image(), "label": [1]}))


def _idx():
    Path("x-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 0, 1, 2]))
    Path("x-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 0, 1, 2])))
    return bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(48))


def _cifar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        batch = {b"data": np.zeros([2, 3072], np.uint8), b"labels": [3, 1], b"filenames": [b"a", b"b"]}
        meta = {b"label_names": [str(i).encode() for i in range(10)]}
        for name, content in (("c/data_batch_1", batch), ("c/batches.meta", meta)):
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _lmdb():
    import lmdb

    base = lmdb.open("data.mdb", subdir=False, map_size=2**20)
    with base.begin(write=True) as transaction:
        for i in range(60):
            transaction.put(f"{i:04d}".encode() * 20, _image())
        transaction.put(b"big", _image() + bytes(5000))
        transaction.put(b"image", _image())
    base.close()
    return Path("data.mdb").read_bytes()


def _experiment():
    return (Path(__file__).parents[1] / "experiments" / "quickstart.yaml").read_bytes()


def _load_experiment(path):
    from dnnlib import experiment

    settings, steps = experiment.load(path)
    for step in steps[:20]:
        experiment.is_done(settings["out"], step)


def _load_config(path):
    import train_edm2
    from training import dry_run

    dry_run.of_training = lambda *rest: ""  # options are looked at here, not data

    arguments = [f"--config={path}", "--outdir=out", "-n"]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            train_edm2.main.main(arguments, standalone_mode=False)
        except click.ClickException as err:
            raise ValueError(err.format_message()) from err


CONFIG = b"""data: x.zip\npreset: digits8\nlr: 0.01\nbatch: 64\nduration: 64Ki\nbetas: [0.9, 0.99]\nprocess: cld
process_options: {M: 0.25, beta: [4, 4]}\nema_std: 0.05,0.1\ncond: true\nseed: 3\n"""

LOADERS = {
    "snapshot": ("x.safetensors", _snapshot, [damaged, in_header, in_header], _load_snapshot),
    "edm2-pkl": ("x-0000001-0.050.pkl", lambda: _foreign("edm2"), [damaged], _load_snapshot),
    "toy-pkl": ("x.pkl", lambda: _foreign("toy"), [damaged], _load_snapshot),
    "pfgmpp-pt": ("x.pt", lambda: _foreign("pfgmpp"), [damaged, in_zip(damaged)], _load_snapshot),
    "checkpoint": ("x.pt", _checkpoint, [damaged, in_zip(damaged)], _load_checkpoint),
    "reference-npz": ("x.npz", lambda: _reference("npz"), [damaged, in_zip(damaged)], _load_reference),
    "reference-pkl": ("x.pkl", lambda: _reference("pkl"), [damaged], _load_reference),
    "detector": ("x.safetensors", _detector, [damaged, in_header, in_header], _load_detector),
    "labels": ("dataset.json", _labels, [damaged, json_altered, json_altered], _load_labels),
    "zip": ("x.zip", _zip, [damaged, in_zip(damaged)], _load_zip),
    "npy": ("x.npy", _npy, [damaged], _decode),
    "png": ("x.png", _image, [damaged, in_png], _decode),
    "gif": ("x.gif", lambda: _image(kind="gif", mode="P"), [damaged], _decode),
    "jpeg": ("x.jpg", lambda: _image(kind="jpeg"), [damaged], _decode),
    "tiff": ("x.tif", lambda: _image(kind="tiff"), [damaged], _decode),
    "webp": ("x.webp", lambda: _image(kind="webp"), [damaged], _decode),
    "bmp": ("x.bmp", lambda: _image(kind="bmp"), [damaged], _decode),
    "tfrecord": ("x.tfrecord", _records, [damaged, in_records, in_records], _read_source),
    "idx": ("x-images-idx3-ubyte", _idx, [damaged], _read_source),
    "idx-gz": ("x-images-idx3-ubyte.gz", lambda: gzip.compress(_idx()), [damaged, in_gzip], _read_source),
    "cifar": ("x.tar", _cifar, [damaged, in_tar, in_tar], _read_source),
    "npz-shard": (
        "x.npz",
        lambda: _saved(lambda p: np.savez(p, data=np.zeros([2, 48], np.uint8), labels=np.array([1, 2]))),
        [damaged, in_zip(damaged)],
        _read_source,
    ),
    "lmdb": ("x.mdb", _lmdb, [damaged], _read_source),
    "experiment": ("x.yaml", _experiment, [damaged, yaml_altered], _load_experiment),
    "config": ("x.yaml", lambda: CONFIG, [damaged, yaml_altered, yaml_altered], _load_config),
}


# --- the child --------------------------------------------------------------------------------------------------------


def watch():
    """From here on, whatever runs code is an error: what is loaded is loaded."""

    def hook(event, arguments):
        if not event.startswith(FORBIDDEN):
            return
        if event == "import" and arguments[0] in sys.modules:
            return
        frame, files = sys._getframe(1), []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if event == "compile" and any(name.endswith("numpy/lib/_format_impl.py") for name in files):
            return  # ast.literal_eval of the header of an array
        if any(name == traceback.__file__ for name in files):
            return  # our own report
        raise AssertionError(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)


def limit():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def fuzz(loader, seeds, folder):
    """Runs in the child. Leaves `current` (what is being read) and `failures.json` in the folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, make, kinds, load = LOADERS[loader]
    torch.manual_seed(0)
    sound, failures = make(), []
    path = Path(name)
    path.write_bytes(sound)
    load(path)
    PIL.Image.init()
    for codec in ("cp437", "latin1", "utf_8_sig", "idna", "unicode_escape", "raw_unicode_escape"):
        codecs.lookup(codec)
    for codec in (f"utf_{bits}{order}" for bits in (16, 32) for order in ("", "_le", "_be")):
        codecs.lookup(codec)  # what a text file may begin like
    for data in (sound[: len(sound) // 2], b"", sound[1:], bytes(len(sound))):  # what errors import
        path.write_bytes(data)
        with contextlib.suppress(ValueError, OSError):
            load(path)
    watch()
    limit()
    for seed in seeds:
        rng = random.Random(f"{loader} {seed}")
        data = rng.choice(kinds)(sound, rng)
        Path("current").write_text(str(seed))
        path.write_bytes(data)
        before = time.process_time()
        try:
            load(path)
        except (ValueError, OSError) as err:
            if not str(err).strip() or isinstance(err.__cause__, (AssertionError, MemoryError)):
                failures.append((seed, f"{type(err)} {str(err)[:300]} {err.__cause__!r}"))
        except BaseException:
            failures.append((seed, traceback.format_exc()[-1500:]))
        if time.process_time() - before > (DECODED if load is _decode else SECONDS):
            failures.append((seed, f"{time.process_time() - before:.1f} seconds"))
        if len(failures) >= 20:
            break
    Path("failures.json").write_text(json.dumps(failures))
