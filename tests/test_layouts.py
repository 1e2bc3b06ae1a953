"""What folders, zips and label files are understood as: random trees against a little oracle, then every kind by itself."""

import csv
import io
import json
import os
import random
import unicodedata
import zipfile

import numpy as np
import PIL.Image
import pytest
from small_runs import one_line, run

import dataset_tool
from training.dataset import ImageFolderDataset
from training.dataset.listing import Container

JUNK = ["._{}", ".DS_Store", "Thumbs.db", ".thumbnails/{}", "__MACOSX/._{}", "@eaDir/{}", ".ipynb_checkpoints/{}"]
JUNK += ["desktop.ini", "#recycle/{}", "~$notes.docx", "$RECYCLE.BIN/{}"]
STRAYS = ["notes.txt", "README", "model.pt", "clip.mp4", "list.json"]


def picture(colour, mode="RGB", format="png"):
    file = io.BytesIO()
    image = PIL.Image.new("RGB", (4, 4), colour)
    (image.quantize(2) if mode == "P" else image).save(file, format=format)
    return file.getvalue()


P = picture((7, 7, 7))


def write(path, files):
    """Files {name: bytes, or None: a folder} as a folder or zip, by the standard library alone."""
    if str(path).endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name if data is not None else name + "/", data or b"")
        return path
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        file = path / name
        (file if data is None else file.parent).mkdir(parents=True, exist_ok=True)
        if data is not None:
            file.write_bytes(data)
    return path


def convert(source, dest, *more):
    """(summary, what stderr says but for progress) of a conversion."""
    result = run(dataset_tool.main, "convert", f"--source={source}", f"--dest={dest}", *more)
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip() and "img/s" not in line]
    return json.loads(result.stdout), "\n".join(lines)


def refused(source, tmp_path, *more, says):
    line = one_line(dataset_tool.main, "convert", f"--source={source}", f"--dest={tmp_path}/x.zip", *more, says=says)
    assert not (tmp_path / "x.zip").exists()
    return line


def meta(pairs, **more):
    return json.dumps({"labels": pairs, **more}).encode()


# --- Random trees -----------------------------------------------------------------------------------------------------

CLASSES = [
    "cat",
    "Dog",
    "a b",
    "class 2",
    "class 10",
    "x-1",
    "x-10",
    "x-9",
    "été",
    unicodedata.normalize("NFD", "ñu"),
    "Ω",
]


def respelled(draw, name):
    """A name in dataset.json as people write it."""
    stem, dot, ext = name.rpartition(".")
    ways = [name, "./" + name, "/data/set/" + name, name.replace("/", "\\"), name.upper(), stem, stem + ".jpg"]
    return draw.choice([*ways, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)])


def random_tree(draw):
    """(files, arguments of convert, {colour: label or class name}, whether labels are names, stray files)."""
    files, expected, strays = {}, {}, 0
    kind = draw.choice(["flat", "classes", "json", "vectors", "csv", "jsonl", "null"])
    part = draw.choice([None, None, "train", "val"])
    base = draw.choice(["", "", "my photos/"]) + (f"{part}/" if part else "")
    names = draw.sample(CLASSES, draw.randint(2, 4))
    colours = iter(draw.sample(range(1, 2**24 - 1), 200))
    pairs, taken = [], set()
    for index in range(draw.randint(3, 9)):
        own = names[index] if index < len(names) else draw.choice(names)
        folder = f"{own}/" if kind != "flat" and (kind == "classes" or draw.random() < 0.5) else ""
        folder += draw.choice(["", "deep/"]) if folder else ""
        stem = draw.choice(["", "img ", "ä"]) + str(index)
        value = next(colours)
        colour, mode = (value >> 16, value >> 8 & 255, value & 255), draw.choice(["RGB", "P"])
        if (folder + stem).casefold() in taken:
            continue
        taken.add((folder + stem).casefold())
        name = folder + stem + draw.choice([".png", ".PNG", ".bmp"])
        files[base + name] = picture(colour, "RGB", name[-3:].lower())
        if mode == "P" and name.endswith("png"):
            files[base + name] = picture(colour, "P")
            colour = PIL.Image.open(io.BytesIO(files[base + name])).convert("RGB").getpixel((0, 0))
        if colour in expected:
            del files[base + name]
            continue
        label = {"flat": None, "null": None, "classes": own, "csv": own, "jsonl": index % 3}.get(kind, index % 4)
        label = [index / 8, -0.5 * index] if kind == "vectors" else label
        expected[colour] = label
        pairs.append([name, label])
    if kind in ("json", "vectors", "null"):
        written = [[respelled(draw, n), k] for n, k in pairs] if kind != "null" else None
        files[base + "dataset.json"] = json.dumps({"labels": written}, ensure_ascii=draw.random() < 0.5).encode()
    if kind == "csv":
        table = io.StringIO()
        csv.writer(table).writerows([["file_name", "label"], *pairs])
        files[base + "metadata.csv"] = table.getvalue().encode()
    if kind == "jsonl":
        files[base + "metadata.jsonl"] = "\n".join(json.dumps({"file_name": n, "label": k}) for n, k in pairs).encode()
    places = sorted({name.rpartition("/")[0] for name in files if name.startswith(base) and "json" not in name})
    for _ in range(draw.randint(0, 4)):
        place = draw.choice(places)
        name = draw.choice(JUNK).format("0.png") if draw.random() < 0.6 else draw.choice(STRAYS)
        name = f"{place}/{name}" if place else name
        strays += name not in files
        files[name] = b"no picture"
    if kind == "classes" and draw.random() < 0.3:
        files[base + "preview.png"] = P
        strays += 1
    if part and draw.random() < 0.7:
        top = base[: -len(part) - 1]
        files[f"{top}test/cat/other.png"] = files[f"{top}test/dog/other.png"] = picture((1, 2, 3))
    arguments = ["--channels=3"] + ([f"--split-folder={part}"] if part else [])
    return files, arguments, expected, kind in ("classes", "csv"), strays


@pytest.mark.parametrize("seed", range(60))
def test_random_trees(tmp_path, seed):
    draw = random.Random(seed)
    files, arguments, expected, named, strays = random_tree(draw)
    items = [*files.items()]
    draw.shuffle(items)
    tree = write(tmp_path / draw.choice(["tree", "tree.zip"]), dict(items))
    summary, stderr = convert(tree, tmp_path / "d.zip", *arguments)
    assert summary["count"] == len(expected), stderr
    assert (f"{strays} stray file" in stderr) == (strays > 0) and ("stray" in stderr) == (strays > 0), stderr
    info = json.loads(run(dataset_tool.main, "inspect", tmp_path / "d.zip", "--json").stdout)
    assert info["count"] == len(expected) and info["class_names"] == summary_classes(expected, named)
    read = [ImageFolderDataset(tmp_path / "d.zip")]
    if not any("test/" in name for name in files):
        read.append(ImageFolderDataset(tree))
    for dataset in read:
        found = {}
        for i in range(len(dataset)):
            image, label = dataset[i]
            assert (image == image[:, :1, :1]).all()
            label = None if not len(label) else label.tolist() if not dataset.num_classes else int(label.argmax())
            found[tuple(image[:, 0, 0].tolist())] = dataset.class_names[label] if named else label
        assert found == expected
    counts = {}
    for label in expected.values():
        counts[str(label)] = counts.get(str(label), 0) + 1
    if not named and info["num_classes"]:
        assert info["images_per_source"] == counts


def summary_classes(expected, named):
    """Class names as they are numbered: by hand, numbers by value."""
    key = {
        name: i for i, name in enumerate(["a b", "cat", "class 2", "class 10", "Dog", CLASSES[9], "x-1", "x-9", "x-10"])
    }
    key |= {"été": 100, "Ω": 101}
    return sorted(set(expected.values()), key=lambda name: key[name]) if named else None


# --- Folders ----------------------------------------------------------------------------------------------------------


def classes_of(path):
    dataset = ImageFolderDataset(path)
    return dataset.class_names, dataset.raw_labels.tolist()


@pytest.mark.parametrize(
    ("files", "names", "says"),
    [
        (["2/a.png", "10/a.png", "1/a.png", "0/a.png"], ["0", "1", "2", "10"], "folder 10 is source 3"),
        (["b/a.png", "B/a.png", "a/a.png", "C/a.png"], ["a", "B", "b", "C"], "4 sources: a 1, B 1, b 1, C 1"),
        (["train/x/a.png", "train/y/a.png", "test/x/b.png"], ["x", "y"], "in train; left out: test"),
        (["Training Set/x/a.png", "Training Set/y/a.png", "valid/x/b.png"], ["x", "y"], "left out: valid"),
        (["box/in/x/a.png", "box/in/y/a.png", "box/notes.txt"], ["x", "y"], "(1 stray file ignored)"),
        (["box/train/x/a.png", "box/train/y/a.png"], ["x", "y"], "in box/train"),
        (["x/a.png", "x/deep/b.png", "y/c.png", "top.png"], ["x", "y"], "x 2, y 1 (1 stray file ignored)"),
        (["x/a.png", "y/a.png", "z/read.me"], ["x", "y"], "get no id: z"),
        (["train/a.png", "plane/a.png"], ["plane", "train"], "2 sources"),
        (["x/a.png", "x/._a.png", "x/b.png"], None, "2 images, no labels (1 stray file ignored)"),
        (["00000/img00000000.png", "00001/img00001000.png"], None, "2 images, no labels"),
        (["000000/000007.png", "001000/001003.png"], None, "2 images, no labels"),
        (["a.png", "sub/b.png"], None, "2 images, no labels"),
    ],
)
@pytest.mark.parametrize("container", ["d", "d.zip"])
def test_folders(tmp_path, files, names, says, container):
    source = write(tmp_path / container, dict.fromkeys(files, P))
    stderr = convert(source, tmp_path / "o.zip")[1]
    assert classes_of(tmp_path / "o.zip")[0] == names and says in stderr
    assert stderr.count("\n") == stderr.count("Warning")  # one sentence, and what deserves a word


def test_numbered_folders_keep_their_numbers(tmp_path):
    source = write(tmp_path / "d", {f"{c}/a.png": picture((c, 0, 0)) for c in range(12)})
    convert(source, tmp_path / "o.zip", "--sources=2")
    dataset = ImageFolderDataset(tmp_path / "o.zip")
    assert dataset.raw_labels.tolist() == [2] and dataset[0][0][0, 0, 0] == 2


def test_parts_are_chosen_and_never_mixed(tmp_path):
    files = {
        f"{part}/{c}/a.png": picture((i, j, 0)) for i, part in enumerate(["train", "val"]) for j, c in enumerate("xy")
    }
    source = write(tmp_path / "d", files)
    for part, number in [("train", 0), ("VAL", 1)]:
        convert(source, tmp_path / f"{part}.zip", f"--split-folder={part}")
        dataset = ImageFolderDataset(tmp_path / f"{part}.zip")
        assert [dataset[i][0][0, 0, 0] for i in range(len(dataset))] == [number, number]
    with pytest.warns(UserWarning, match="left out: val"):
        assert len(ImageFolderDataset(source)) == 2
    refused(source, tmp_path, "--split-folder=test", says=["--split-folder=test", "train, val"])
    refused("sklearn:digits", tmp_path, "--split-folder=test", says="--split-folder=test")
    (tmp_path / "d" / "train").rename(tmp_path / "d" / "test")
    refused(source, tmp_path, says=["test, val", "--split-folder"])
    write(source, {"train/x/a.png": P, "extra/a.png": P})
    refused(source, tmp_path, says=["extra", "--split-folder"])


def test_class_lists_keep_empty_folders(tmp_path):
    source = write(tmp_path / "d", {"dog/a.png": P, "cat/a.png": P, "ant": None})
    assert "get no id: ant" in convert(source, tmp_path / "a.zip")[1]
    assert classes_of(tmp_path / "a.zip") == (["cat", "dog"], [0, 1])
    write(source, {"dataset.json": json.dumps({"class_names": ["Ant", "Cat", "Dog"]}).encode()})
    assert "Ant 0, Cat 1, Dog 1" in convert(source, tmp_path / "b.zip")[1]
    assert classes_of(tmp_path / "b.zip") == (["Ant", "Cat", "Dog"], [1, 2])
    write(source, {"eel/a.png": P})
    refused(source, tmp_path, says=["eel", "class_names"])


def test_more_strays_than_images_are_no_strays(tmp_path):
    source = write(tmp_path / "d", {"x/a.png": P, "y/a.png": P, "1.png": P, "2.png": P, "3.png": P})
    refused(source, tmp_path, says=["3 images lie beside", "x, y"])


def test_a_few_pictures_among_arrays_are_strays(tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros([8, 4, 4], np.float32))
    source = write(tmp_path / "d", {"a.npy": file.getvalue(), "b.npy": file.getvalue(), "preview.png": P})
    assert "2 images, no labels (1 stray file ignored)" in convert(source, tmp_path / "o.zip")[1]
    assert len(ImageFolderDataset(source)) == len(ImageFolderDataset(tmp_path / "o.zip")) == 2


# --- Links ------------------------------------------------------------------------------------------------------------


def test_links_are_followed_once(tmp_path):
    real = write(tmp_path / "real", {"cat/0.png": P, "cat/1.png": P, "dog/0.png": P, "own/2.png": P})
    source = write(tmp_path / "d", {"own/0.png": P})
    os.symlink(real / "cat", source / "cat")
    os.symlink(real / "own" / "2.png", source / "own" / "linked.png")
    os.symlink(source, source / "own" / "loop")
    os.symlink("itself", source / "own" / "itself")
    os.symlink(source / "own", source / "alias")
    os.symlink(tmp_path / "nothing", source / "broken")
    files = Container(str(source))
    assert files.names == ["cat/0.png", "cat/1.png", "own/0.png", "own/linked.png"]
    assert sorted(files.left_out) == ["alias", "broken", "own/itself", "own/loop"]
    stderr = convert(source, tmp_path / "o.zip")[1]
    assert "4 links left out" in stderr and "2 sources: cat 2, own 2" in stderr
    with pytest.warns(UserWarning, match="4 links left out"):
        assert classes_of(source) == (["cat", "own"], [0, 0, 1, 1])


# --- What is no image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(f"cat/{j}".format("0.png") for j in JUNK), *STRAYS, "cat/notes.pdf", "cat/x.psd"])
@pytest.mark.parametrize("container", ["d", "d.zip"])
def test_strays_are_counted(tmp_path, name, container):
    source = write(tmp_path / container, {"cat/0.png": P, "dog/0.png": P, name: b"no picture"})
    assert convert(source, tmp_path / "o.zip")[1] == "2 sources: cat 1, dog 1 (1 stray file ignored)"
    assert classes_of(source) == (["cat", "dog"], [0, 1])


def test_corrupt_images(tmp_path):
    files = {f"{c}/{i}.png": P for c in ("cat", "dog") for i in range(4)}
    source = write(tmp_path / "d", files | {"cat/1.png": P[:50], "dog/3.png": b""})
    refused(source, tmp_path, says="cat/1.png")
    summary, stderr = convert(source, tmp_path / "o.zip", "--skip-bad")
    assert summary["bad"] == ["cat/1.png", "dog/3.png"] and summary["count"] == 6
    assert "2 corrupt images left out: cat/1.png, dog/3.png" in stderr
    with zipfile.ZipFile(tmp_path / "o.zip") as archive:  # names are places in the listing, as in every subset
        assert [int(n[-12:-4]) for n in archive.namelist()[:-1]] == [0, 2, 3, 4, 5, 6]
    summary, _ = convert(source, tmp_path / "p.zip", "--skip-bad", "--per-source=2", f"--holdout={tmp_path}/h.zip")
    assert (summary["count"], summary["holdout"]) == (4, 2)
    refused(source, tmp_path, "--skip-bad", "--per-source=4", says="3 usable images")
    lone = write(tmp_path / "lone", {"a.png": P[:50]})
    refused(lone, tmp_path, "--skip-bad", says=["--skip-bad", "a.png"])


# --- Names in label files ---------------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("entries", "files"),
    [
        (["./a.png", "./b.png"], ["a.png", "b.png"]),
        (["/data/a.png", "/data/b.png"], ["a.png", "b.png"]),
        (["C:\\set\\x\\a.png", "C:\\set\\y\\a.png"], ["x/a.png", "y/a.png"]),
        (["set/x/a.png", "set/y/a.png"], ["x/a.png", "y/a.png"]),
        (["a.png", "b.png"], ["x/a.png", "y/b.png"]),
        (["x\\a.png", "x\\b.png"], ["x/a.png", "x/b.png"]),
        (["A.PNG", "B.Png"], ["a.png", "b.png"]),
        (["a", "b"], ["a.png", "b.png"]),
        (["a.v2", "b.v2"], ["a.v2.png", "b.v2.png"]),
        (["a.jpg", "b.jpeg"], ["a.png", "b.png"]),
        ([NFC, "b.png"], [NFD, "b.png"]),
        ([NFD, "b.png"], [NFC, "b.png"]),
        (["a.png", "A.png"], ["a.png", "A.png"]),
    ],
)
def test_names_are_matched(tmp_path, entries, files):
    for container in ("d", "d.zip"):
        images = {name: picture((i, 0, 0)) for i, name in enumerate(files)}
        source = write(tmp_path / container, images | {"dataset.json": meta([[n, i] for i, n in enumerate(entries)])})
        convert(source, tmp_path / f"{container}-o.zip")
        for path in (source, tmp_path / f"{container}-o.zip"):
            dataset = ImageFolderDataset(path)
            assert all(dataset[i][0][0, 0, 0] == dataset.raw_labels[i] for i in range(2)), path


def test_windows_zip(tmp_path):
    source = write(tmp_path / "d.zip", {"x\\a.png": P, "y\\a.png": P})
    convert(source, tmp_path / "o.zip")
    assert classes_of(tmp_path / "o.zip") == classes_of(source) == (["x", "y"], [0, 1])


@pytest.mark.parametrize(
    ("pairs", "files", "says"),
    [
        ([["a.png", 0], ["a.png", 1]], ["a.png"], "two labels for a.png"),
        ([["a.png", 0], ["./a.png", 1]], ["a.png"], "two labels for a.png"),
        ([["/x/a.png", 0], ["/y/a.png", 1]], ["a.png"], "two labels for a.png"),
        ([["A.png", 0], ["a.PNG", 1]], ["a.png"], "two labels for a.png"),
        ([["a", 0]], ["a.png", "a.bmp"], "a may be a.bmp or a.png"),
        ([["a.png", 0]], ["x/a.png", "y/a.png"], "a.png may be x/a.png or y/a.png"),
        ([["a.png", -1]], ["a.png"], "label -1 out of range (a.png)"),
        ([["a.png", 10**7]], ["a.png"], "label 10000000 out of range (a.png)"),
        ([["a.png", 10**30]], ["a.png"], "64 bits"),
        ([["a.png", 1.5]], ["a.png"], "label of a.png"),
        ([["a.png", "one"]], ["a.png"], "label of a.png"),
        ([["a.png", None]], ["a.png"], "label of a.png"),
        ([["a.png", {"k": 1}]], ["a.png"], "label of a.png"),
        ([["a.png", ["x"]]], ["a.png"], "label of a.png"),
        ([["a.png", [1.0, 2.0]], ["b.png", [1.0]]], ["a.png", "b.png"], "a.png has 2 numbers, b.png 1 numbers"),
        ([["a.png", 1], ["b.png", [1.0]]], ["a.png", "b.png"], "a.png has an index, b.png 1 numbers"),
        ([["a.png", [float("nan")]]], ["a.png"], "NaN"),
        ([["a.png", [1e39]]], ["a.png"], "finite, that of a.png is not"),
    ],
)
def test_labels_that_are_refused(tmp_path, pairs, files, says):
    source = write(tmp_path / "d", {**dict.fromkeys(files, P), "dataset.json": meta(pairs)})
    line = refused(source, tmp_path, says=says)
    assert "d/dataset.json" in line
    with pytest.raises(ValueError) as err:
        ImageFolderDataset(source)
    assert f"Error: --source={err.value}" == line


@pytest.mark.parametrize(("label", "read"), [(3.0, 3), ("3", 3), ("3.0", 3), (True, 1), (False, 0), ("dog", 1)])
def test_labels_that_are_read(tmp_path, label, read):
    names = {"class_names": ["cat", "dog", "eel", "fox"]} if label == "dog" else {}
    source = write(tmp_path / "d", {"a.png": P, "dataset.json": meta([["a.png", label]], **names)})
    convert(source, tmp_path / "o.zip")
    assert ImageFolderDataset(tmp_path / "o.zip").raw_labels.tolist() == [read]


def test_missing_labels_name_the_nearest(tmp_path):
    pairs = [["a/one.png", 0], ["a/tow.png", 1]]
    source = write(tmp_path / "d", {"a/one.png": P, "a/two.png": P, "dataset.json": meta(pairs)})
    summary, stderr = convert(source, tmp_path / "o.zip")
    assert summary["unlabelled"] == 1 and "no label for a/two.png (1 of 2 images have none; the nearest" in stderr
    assert "a/tow.png" in stderr and not ImageFolderDataset(tmp_path / "o.zip").has_labels
    with pytest.raises(ValueError, match=r"no label for a/two.png .* a/tow.png"):
        ImageFolderDataset(source)
    refused(source, tmp_path, "--sources=0", says="class index for every image")
    assert "null" not in convert(source, tmp_path / "p.zip", "--max-images=1")[1]


def test_null_labels_win_over_folders(tmp_path):
    source = write(tmp_path / "d", {"x/a.png": P, "y/a.png": P, "dataset.json": meta(None)})
    assert "2 images, no labels" in convert(source, tmp_path / "o.zip")[1]
    assert not ImageFolderDataset(source).has_labels


# --- metadata.csv and metadata.jsonl ----------------------------------------------------------------------------------


def csv_bytes(rows):
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    return table.getvalue().encode()


def jsonl(rows):
    return "\n".join(json.dumps({"file_name": name, "label": label}) for name, label in rows).encode()


HEAD = ["file_name", "label"]


@pytest.mark.parametrize(
    ("name", "data", "names", "labels"),
    [
        ("metadata.csv", csv_bytes([HEAD, ["a.png", "dog"], ["b.png", "cat"]]), ["cat", "dog"], [1, 0]),
        ("metadata.csv", b"\xef\xbb\xbf" + csv_bytes([HEAD, ["a.png", 2], ["b.png", 0]]), None, [2, 0]),
        ("metadata.csv", csv_bytes([HEAD, ["a.png", 0.5], ["b.png", 2]]), None, [[0.5], [2.0]]),
        ("metadata.csv", csv_bytes([HEAD, ["a.png", "[1, 0]"], ["b.png", "[0, 1]"]]), None, [[1, 0], [0, 1]]),
        ("metadata.jsonl", jsonl([("a.png", 1), ("b.png", 0)]), None, [1, 0]),
        ("metadata.jsonl", jsonl([("a.png", "k10"), ("b.png", "k9")]), ["k9", "k10"], [1, 0]),
        ("metadata.jsonl", jsonl([("a.png", [0.5, 1]), ("b.png", [0, 2])]), None, [[0.5, 1], [0, 2]]),
        ("metadata.csv", csv_bytes([["file_name", "text"], ["a.png", "a dog"], ["b.png", "a cat"]]), None, None),
    ],
)
@pytest.mark.parametrize("inside", ["", "train/"])
def test_metadata(tmp_path, name, data, names, labels, inside):
    source = write(tmp_path / "d", {f"{inside}a.png": P, f"{inside}b.png": P, f"{inside}{name}": data})
    convert(source, tmp_path / "o.zip")
    for path in (source, tmp_path / "o.zip"):
        dataset = ImageFolderDataset(path)
        assert dataset.class_names == names and dataset.raw_labels.tolist() == (labels or [[], []])


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("metadata.csv", csv_bytes([["name", "label"], ["a.png", 1]]), "row 1 has no file_name"),
        ("metadata.csv", csv_bytes([HEAD, ["a.png", ""]]), "a.png has no label"),
        ("metadata.csv", csv_bytes([HEAD, ["a.png", 1], ["a.png", 2]]), "two labels for a.png"),
        ("metadata.csv", csv_bytes([HEAD, ["a.png", "NaN"]]), "a.png"),
        ("metadata.csv", csv_bytes([HEAD, ["a.png", -1]]), "label -1 out of range (a.png)"),
        ("metadata.csv", b"\xff\xfe", "not readable"),
        ("metadata.jsonl", b'{"file_name": ', "not readable"),
        ("metadata.jsonl", b"[1]", "row 1 has no file_name"),
        ("metadata.jsonl", jsonl([("a.png", None), ("b.png", 1)]), "a.png has no label"),
        ("metadata.jsonl", jsonl([("a.png", {"x": 1})]), "label of a.png"),
    ],
)
def test_metadata_that_is_refused(tmp_path, name, data, says):
    source = write(tmp_path / "d", {"a.png": P, name: data})
    assert name in refused(source, tmp_path, says=says)
