"""Published collections as they are downloaded, and their classes by index, id, name and list."""

import io
import json
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
from small_runs import one_line, run

import dataset_tool
from training.dataset import ImageFolderDataset, content_hash
from training.dataset.format import ImageSource
from training.dataset.imagenet import LEVELS, resolve

# The digest's §3.2, typed a second time: WordNet ids of the lists in the order of the published code.
LISTS = {
    "sim3": "n02091032 n02093754 n02097209 n02099712 n02101388 n02106030 n02107142 n02108551 n02108915 n02111889",
    "sim2": "n02091032 n02114367 n02120079 n02123394 n02132136 n02325366 n02391049 n02480855 n02484975 n02504458",
    "sim1": "n02091032 n01443537 n01582220 n01644373 n01693334 n03201208 n03452741 n03594945 n04398044 n09472597",
}
INDICES = {
    "sim3": [171, 182, 198, 208, 215, 231, 236, 244, 245, 258],
    "sim2": [171, 269, 279, 283, 294, 330, 340, 366, 370, 386],
    "sim1": [171, 1, 18, 31, 46, 532, 579, 609, 849, 980],
}
WNIDS = sorted([*LISTS["sim3"].split(), "n01443537", "n09472597"])  # a tree of twelve


def picture(seed, size=(20, 16), kind="JPEG"):
    file = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, [size[1] // 4, size[0] // 4, 3]).astype(np.uint8)
    PIL.Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()


def write(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def convert(source, dest, *more):
    sources = [source] if not isinstance(source, list) else source
    done = run(dataset_tool.main, "convert", *(f"--source={s}" for s in sources), f"--dest={dest}", *more)
    return json.loads(done.stdout), ImageFolderDataset(dest)


def refused(source, tmp_path, *more, says):
    one_line(dataset_tool.main, "convert", f"--source={source}", f"--dest={tmp_path}/no.zip", *more, says=says)
    assert not (tmp_path / "no.zip").exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Twelve class folders of four JPEGs, as ImageNet's train folder."""
    files = {f"{w}/{w}_{i}.JPEG": picture(10 * k + i) for k, w in enumerate(WNIDS) for i in range(4)}
    return write(tmp_path_factory.mktemp("imagenet") / "train", files)


# --- Classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_of_the_paper(name):
    assert [wnid for _, wnid, _ in LEVELS[name]] == LISTS[name].split()
    whole = ImageSource("imagenet", 0, None, num_classes=1000)  # converted elsewhere, without names
    assert resolve([name], whole) == INDICES[name]
    alias = {"sim3": "level1", "sim2": "level2", "sim1": "level3"}[name]
    assert resolve([f"{alias}:5"], whole) == INDICES[name][:5] and resolve([f"{name}:3", 5], whole) == [
        *INDICES[name][:3],
        5,
    ]


@pytest.mark.parametrize("words", ["sim3:3", "level1:3", "0,1,2", "0-2", "Italian greyhound,border terrier,n02097209"])
def test_classes_by_index_id_name_and_list(tree, tmp_path, words):
    """In a tree of twelve classes, ids are ranks in it: the lists go by WordNet id."""
    words = words.replace("0,1,2", "1,2,3").replace("0-2", "1-3")  # the goldfish comes first
    summary, data = convert(tree, tmp_path / "d.zip", f"--sources={words}", "--resolution=8x8", "--per-source=3")
    assert data.sources == [1, 2, 3] and summary["per_source"] == {"1": 3, "2": 3, "3": 3} and data.label_dim == 12
    assert data.class_names[:3] == ["n01443537 goldfish", "n02091032 Italian greyhound", "n02093754 Border terrier"]
    with zipfile.ZipFile(tmp_path / "d.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["num_classes"] == 12  # the label dimension
    if words == "sim3:3":
        again, _ = convert(tmp_path / "d.zip", tmp_path / "e.zip", "--sources=border terrier,sim3:1")
        assert again["per_source"] == {"1": 3, "2": 3}


def test_wrong_classes_are_refused(tree, tmp_path):
    refused(tree, tmp_path, "--sources=sim2", says=["n02114367", "timber wolf"])
    refused(tree, tmp_path, "--sources=sim3:11", says="sim3:3")
    refused(tree, tmp_path, "--sources=Bordor terrier", says=["Border terrier", "do you mean"])
    refused("sklearn:digits", tmp_path, "--sources=sim1", says="ImageNet's folders")
    twice = ImageSource("x", 0, None, num_classes=2, class_names=["n02012849 crane", "n03126707 crane"])
    with pytest.raises(ValueError, match="n02012849 crane and n03126707 crane: give the index"):
        resolve(["crane"], twice)
    assert resolve(["n03126707"], twice) == [1]


def test_names_of_kaggles_mapping(tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train"
    write(root, {f"{w}/a.JPEG": picture(0) for w in ("n01440764", "n01443537")})
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\n")
    summary, data = convert(root, tmp_path / "d.zip", "--resolution=8x8", "--sources=Tench")
    assert data.class_names == ["n01440764 tench", "n01443537 goldfish"] and summary["per_source"] == {"0": 1}


# --- Layouts ----------------------------------------------------------------------------------------------------------


def test_tiny_imagenet_as_zip_and_as_folder(tmp_path):
    """The training part with labels, byte for byte the same from both; validation and test images on request."""
    wnids = ["n01443537", "n01629819", "n02091032"]
    root = "tiny-imagenet-200"
    files = {
        f"{root}/train/{w}/images/{w}_{i}.JPEG": picture(9 * k + i, (8, 8))
        for k, w in enumerate(wnids)
        for i in range(3)
    }
    files |= {f"{root}/train/{w}/{w}_boxes.txt": b"0" for w in wnids}
    files |= {f"{root}/val/images/val_{i}.JPEG": picture(50 + i, (8, 8)) for i in range(2)}
    files |= {f"{root}/test/images/test_0.JPEG": picture(60, (8, 8))}
    files[f"{root}/wnids.txt"] = "\n".join(wnids[::-1]).encode()
    files[f"{root}/words.txt"] = b"n01443537\tgoldfish, Carassius auratus\nn09999999\tother\n"
    files[f"{root}/val/val_annotations.txt"] = f"val_0.JPEG\t{wnids[2]}\t0\t0\nval_1.JPEG\t{wnids[0]}\t1\t1\n".encode()
    write(tmp_path / "there", files)
    shutil.make_archive(str(tmp_path / "tiny-imagenet-200"), "zip", tmp_path / "there")
    found = []
    for source in ("there/tiny-imagenet-200", "there", "tiny-imagenet-200.zip"):
        summary, data = convert(tmp_path / source, tmp_path / "d.zip", "--overwrite")
        assert summary["per_source"] == {"0": 3, "1": 3, "2": 3} and summary["num_classes"] == 3
        assert data.class_names == ["n01443537 goldfish", "n01629819", "n02091032"]
        _, held = convert(tmp_path / source, tmp_path / "v.zip", "--overwrite", "--split-folder=val")
        assert held.raw_labels.tolist() == [2, 0]
        _, test = convert(tmp_path / source, tmp_path / "t.zip", "--overwrite", "--split-folder=test")
        assert len(test) == 1 and not test.has_labels
        found.append([(tmp_path / name).read_bytes() for name in ("d.zip", "v.zip", "t.zip")])
    assert found[0] == found[1] == found[2]
    with PIL.Image.open(io.BytesIO(files[f"{root}/train/{wnids[1]}/images/{wnids[1]}_2.JPEG"])) as image:
        assert np.array_equal(data[5][0], np.asarray(image).transpose(2, 0, 1))
    assert "left out: val, test" in summary["understood"]


AFHQ = [f"{part}/{animal}/{i}.png" for part in ("train", "test") for animal in ("cat", "dog", "wild") for i in range(2)]
FFHQ = [f"{k}000/{k}00{i}.png" for k in ("00", "01", "69") for i in range(2)]
NESTED = ["animals/cat/1.png", "animals/dog/2.png", "things/cup/3.png"]


@pytest.mark.parametrize(
    ("names", "labels", "classes", "count"),
    [
        (AFHQ, None, ["cat", "dog", "wild"], 6),
        (AFHQ, "leaf", ["cat", "dog", "wild"], 6),
        (AFHQ, "none", None, 6),
        (FFHQ, None, None, 6),
        (FFHQ, "top", ["00000", "01000", "69000"], 6),
        (NESTED, None, ["animals", "things"], 3),
        (NESTED, "top", ["animals", "things"], 3),
        (NESTED, "leaf", ["cat", "cup", "dog"], 3),
        (["a/1.png", "b/2.png", "3.png"], "leaf", ["a", "b"], 2),
    ],
)
def test_labels_of_published_layouts(tmp_path, names, labels, classes, count):
    root = write(tmp_path / "root", {name: picture(i, (8, 8), "PNG") for i, name in enumerate(names)})
    _, data = convert(root, tmp_path / "d.zip", *([f"--labels={labels}"] if labels else []))
    assert data.class_names == classes and len(data) == count and data.has_labels == (classes is not None)
    if classes:
        kept = [name for name in sorted(names) if "test" not in name and "/" in name]
        where = {"leaf": lambda n: n.split("/")[-2], "top": lambda n: n.split("/")[-3 if "train" in n else 0]}
        name_of = where["leaf" if "train" in kept[-1] or labels == "leaf" else "top"]
        assert [classes[k] for k in data.raw_labels] == [name_of(name) for name in kept]


def test_labels_that_cannot_be(tmp_path):
    write(tmp_path / "flat", {"a.png": picture(0, (8, 8), "PNG")})
    refused(tmp_path / "flat", tmp_path, "--labels=top", says="no folders")
    refused("sklearn:digits", tmp_path, "--labels=leaf", says="folders and zips")
    _, data = convert("sklearn:digits", tmp_path / "d.zip", "--labels=none", "--max-images=3")
    assert not data.has_labels and len(data) == 3


# --- Several sources, dry runs, workers -------------------------------------------------------------------------------


def test_sources_are_joined_with_their_labels(tree, tmp_path):
    """Single classes, converted apart and joined, are the images of the multi-class conversion."""
    common = ["--per-source=3", "--resolution=8x8"]
    _, multi = convert(tree, tmp_path / "multi.zip", "--sources=sim3:3", *common)
    parts = [tmp_path / f"{k}.zip" for k in (1, 2, 3)]
    for k, part in enumerate(parts, 1):
        convert(tree, part, f"--sources={k}", *common)
    summary, joined = convert(parts, tmp_path / "joined.zip")
    assert content_hash(joined) == content_hash(multi) and joined.label_dim == 12
    assert joined.raw_labels.tolist() == [1] * 3 + [2] * 3 + [3] * 3 and joined.class_names == multi.class_names
    assert summary["per_source"] == {"1": 3, "2": 3, "3": 3}
    write(tmp_path / "other", {f"{c}/a.png": picture(3, (8, 8), "PNG") for c in "ab"})
    more = f"--source={parts[0]}"
    refused(tmp_path / "other", tmp_path, more, says="class 0 is a in one and n01443537 goldfish in another")
    write(tmp_path / "flat", {"a.png": picture(3, (8, 8), "PNG")})
    refused(tmp_path / "flat", tmp_path, more, says=["flat has no labels", "--labels=none"])
    _, plain = convert([tmp_path / "flat", parts[0]], tmp_path / "plain.zip", "--labels=none")
    assert len(plain) == 4 and not plain.has_labels


def test_a_dry_run_refuses_what_a_real_one_does(tree, tmp_path):
    where = shutil.copytree(tree, tmp_path / "t")
    (tmp_path / "out").mkdir()
    options = ["--per-source=3", f"--holdout={tmp_path}/out/h.zip", "--resolution=8x8"]
    command = ["convert", f"--source={where}", f"--dest={tmp_path}/out/d.zip"]
    planned = json.loads(run(dataset_tool.main, *command, *options, "--dry-run").stdout)
    assert not [*(tmp_path / "out").iterdir()]
    assert json.loads(run(dataset_tool.main, *command, *options).stdout) == planned
    sizes = 0
    for name in ("d.zip", "h.zip"):
        with zipfile.ZipFile(tmp_path / "out" / name) as archive:
            sizes += sum(info.file_size for info in archive.infolist() if info.filename != "dataset.json")
        (tmp_path / "out" / name).unlink()
    assert planned["bytes"] == sizes > 0
    one_line(dataset_tool.main, *command, "--dry-run", says="is not square")
    (where / WNIDS[5] / f"{WNIDS[5]}_2.JPEG").write_bytes(b"no picture")
    for more in ([], ["--dry-run"]):
        one_line(dataset_tool.main, *command, *options, *more, says=f"{WNIDS[5]}_2.JPEG")
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("more", [[], ["--per-source=3", "--holdout=h.zip"]])
def test_bad_images_are_left_out_alike_by_any_number_of_workers(tree, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    where = shutil.copytree(tree, tmp_path / "t")
    for k in (2, 7):
        (where / WNIDS[k] / f"{WNIDS[k]}_1.JPEG").write_bytes(picture(k)[:300])
    found = []
    for workers in (1, 2, 4):
        fixed = ["--skip-bad", "--resolution=8x8", "--overwrite", f"--workers={workers}"]
        summary, _ = convert(where, "d.zip", *fixed, *more)
        found.append([summary, *(path.read_bytes() for path in sorted(tmp_path.glob("*.zip")))])
    assert found[0] == found[1] == found[2] and len(found[0]) == 2 + bool(more)
    assert [name.rpartition("/")[2] for name in found[0][0]["bad"]] == [f"{WNIDS[k]}_1.JPEG" for k in (2, 7)]
    assert found[0][0]["count"] == (36 if more else 46)
