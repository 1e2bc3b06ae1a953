"""Published classifiers as detectors: timm's Swin file by transformers, folders of transformers, whose class is which label."""

import json
import re
import sys

import numpy as np
import published
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small_runs import one_line, run

import calculate_metrics
from metrics.detectors import DETECTORS, about, get_detector
from metrics.detectors.classifiers import ImageClassifier, Swin, fit_class_order
from metrics.detectors.weights import WeightFile
from training.dataset import ImageFolderDataset

HEADS, DEPTHS, WIDTH, WINDOW = [2, 4, 8, 16], [2, 2, 4, 2], 24, 6


def swin_state():
    """Golden weights of a small Swin under the names of timm before 0.9."""
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, 4, 4), "head.weight": (10, 8 * WIDTH), "head.bias": (10,)}
    norms = {"patch_embed.norm": WIDTH, "norm": 8 * WIDTH}
    linear = {}
    for s, depth in enumerate(DEPTHS):
        c = WIDTH * 2**s
        for b in range(depth):
            block = f"layers.{s}.blocks.{b}"
            norms |= {f"{block}.norm1": c, f"{block}.norm2": c}
            linear |= {f"{block}.attn.qkv": (3 * c, c), f"{block}.attn.proj": (c, c)}
            linear |= {f"{block}.mlp.fc1": (4 * c, c), f"{block}.mlp.fc2": (c, 4 * c)}
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, HEADS[s])
        if s < 3:
            norms[f"layers.{s}.downsample.norm"] = 4 * c
            shapes[f"layers.{s}.downsample.reduction.weight"] = (2 * c, 4 * c)
    shapes |= {f"{name}.{kind}": (c,) for name, c in norms.items() for kind in ("weight", "bias")}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()} | {"patch_embed.proj.bias": (WIDTH,)}
    return published.weights(shapes)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """The file as its authors wrote it: a checkpoint around the weights, with buffers among them."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("swin") / "swin_large_384.pth"
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 36, 36)}
    buffers["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(36, 36, dtype=torch.int64)
    rest = {"optimizer_state_dict": {"state": {0: torch.zeros(2)}, "lr": 1e-3}, "start_epoch": 7}
    torch.save({"model_state_dict": swin_state() | buffers, **rest}, path)
    return path


def test_golden_numbers_of_swin(swin):
    """Of timm 0.6.13 with the same weights and images; a folder is as good as the file."""
    detector = get_detector("swin_l", weights={"swin_l": str(swin.parent)})
    assert about(detector)["resize"] == "bicubic with antialias to 192 px, not rounded"
    assert (detector.width, detector.identity) == (10, f"swin_l:{detector.sha256[:16]}")
    first, last = [0.219817, 0.136381, 0.739225, -0.530530], [-0.672747, -1.305569]
    published.assert_golden(detector.features(published.images(64, 64)), first, last, -0.069184, 0.633704)
    with pytest.raises(ValueError, match=r"square images, got \[64, 48\]"):
        detector.features(published.images(64, 48))
    with pytest.raises(ValueError, match="RGB"):
        detector.features(published.images(64, 64)[:, :2])


def test_pixels_as_the_authors_of_swin_resized_them(swin):
    """Without antialias, then rounded: bicubic with A = -0.75 at half-pixel centres, whole grey levels."""
    detector = Swin(WeightFile(swin, "0" * 64, False), antialias=False, rounded=True)
    x = published.images(64, 64, count=1)
    levels = detector.prepare(x)[0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    levels = (levels + torch.tensor([0.485, 0.456, 0.406])[:, None, None]) * 255
    assert abs(levels - levels.round()).max() < 1e-3 and levels.min() >= -1e-3 and levels.max() <= 255.001

    def taps(i, a=-0.75):
        at = (i + 0.5) / 3 - 0.5
        near = np.arange(4) + int(np.floor(at)) - 1
        d = abs(at - near)
        inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.clip(near, 0, 63), np.where(d <= 1, inner, outer)

    for i, j in ((0, 0), (5, 100), (191, 77), (96, 191)):
        (rows, wy), (columns, wx) = taps(i), taps(j)
        expected = np.clip(wy @ x[0, 0].double().numpy()[np.ix_(rows, columns)] @ wx, 0, 255)
        assert abs(float(levels[0, i, j]) - expected) < 0.51


def test_newer_names_of_timm(swin, tmp_path):
    """Since 0.9 down-sampling stands at the start of the next stage, and the head has a part of its own."""
    state = {name.replace("head.", "head.fc."): value for name, value in swin_state().items()}
    later = lambda match: f"layers.{int(match[1]) + 1}.downsample"
    state = {re.sub(r"layers\.(\d)\.downsample", later, name): value for name, value in state.items()}
    safetensors.torch.save_file(state, tmp_path / "new.safetensors")
    images = published.images(32, 32)
    found = [get_detector(f"swin_l:{file}").features(images) for file in (swin, tmp_path / "new.safetensors")]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "says, changes",
    [
        ("lacks tensor .*patch_embeddings.projection.weight", {"patch_embed.proj.weight": None}),
        ("missing tensor swin.layernorm.bias", {"norm.bias": None}),
        ("unexpected tensor extra", {"extra": torch.zeros(2)}),
        ("mismatched tensor .*swin.layernorm.weight", {"norm.weight": torch.zeros(7)}),
        ("tensor 'classifier.bias' holds what are no finite numbers", {"head.bias": torch.full([10], torch.nan)}),
    ],
)
def test_files_of_another_network(swin, tmp_path, says, changes):
    state = {name: value for name, value in (swin_state() | changes).items() if value is not None}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: {says}"):
        get_detector(f"swin_l:{tmp_path}/x.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small image classifier of transformers, as it saves itself, with its preprocessor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=5)).eval()
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    said = dict(do_resize=True, size=dict(height=32, width=32), resample=2, do_rescale=True, rescale_factor=1 / 255)
    said |= dict(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_processor_type="ViTImageProcessor")
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    return path, model


def test_folders_of_transformers(folder):
    path, model = folder
    detector = get_detector(f"hf:{path}")
    images = published.images(40, 56)
    resize = lambda image: np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR))
    x = torch.tensor(np.stack([resize(image) for image in images.permute(0, 2, 3, 1).numpy()])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(x / 127.5 - 1).logits
    torch.testing.assert_close(detector.features(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(detector.classify(expected.numpy()), expected.argmax(1))
    assert detector.width == 5 and re.fullmatch("hf:[0-9a-f]{16}", detector.identity)


def test_folders_that_hold_no_classifier(folder, tmp_path, capfd, monkeypatch):
    """One line each; a folder's own code is not run, and only safetensors are read."""
    path, model = folder

    def refused(says, **files):
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_bytes((path / name).read_bytes())
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_bytes(content)
        with pytest.raises(ValueError, match=says) as error:
            get_detector(f"hf:{tmp_path}")
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    with pytest.raises(ValueError, match=f"{tmp_path}: holds no config.json"):
        get_detector(f"hf:{tmp_path}")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused("no image classifier that can be read")
    own = json.loads((path / "config.json").read_text())
    own |= {"auto_map": {"AutoModelForImageClassification": "mine.Net", "AutoConfig": "mine.Net"}, "model_type": "mine"}
    code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    (tmp_path / "mine.py").write_bytes(code)
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    refused("no image classifier that can be read", config__json=json.dumps(own).encode())
    assert not (tmp_path / "ran").exists()
    state = safetensors.torch.load_file(path / "model.safetensors")
    state.pop("classifier.bias")
    refused("missing tensor classifier.bias", model__safetensors=safetensors.torch.save(state, {"format": "pt"}))
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the package transformers .*pip install transformers"):
        get_detector(f"hf:{path}")


def test_class_orders():
    """Any permutation is found again, from labels of which a third are wrong; of AJEST's rule, where that is one."""
    rng = np.random.default_rng(0)
    for labels, classes in ((10, 10), (7, 12)):
        order = rng.permutation(classes)[:labels]
        truth = rng.integers(labels, size=2000)
        said = np.where(rng.random(2000) < 1 / 3, rng.integers(classes, size=2000), order[truth])
        found = fit_class_order(said, truth, classes, labels + 2)
        assert found == [*order.tolist(), -1, -1]
        assert found[:labels] == [int(np.bincount(said[truth == k], minlength=classes).argmax()) for k in range(labels)]
    assert fit_class_order([0, 0, 0, 0, 1], [0, 0, 1, 1, 1], 2, 2) == [0, 1]  # two labels claim one class
    with pytest.raises(ValueError, match="3 labels cannot be told apart by a network of 2 classes"):
        fit_class_order([0, 1, 1], [0, 1, 2], 2, 3)


class Nearest(ImageClassifier):
    """Knows the digits by their mean images, in an order of its own, and three classes besides."""

    name, channels, width = "nearest", 1, 13
    order_of_its_own = np.random.default_rng(1).permutation(13)[:10]

    def __init__(self, argument=None):
        data = load_digits()
        self.means = torch.full([13, 64], -9.0)
        for k, place in enumerate(self.order_of_its_own):
            self.means[place] = torch.from_numpy(data.data[data.target == k].mean(0)).float()

    def features(self, images):
        return -torch.cdist(images.flatten(1).float() * 16 / 255, self.means)


def test_the_class_order_is_fitted_from_labelled_images(digits, tmp_path, monkeypatch):
    """The command, its file as the detector `classifier:FILE.json`, agreement by labels; files that are something else."""
    monkeypatch.setitem(DETECTORS, "nearest", Nearest)
    command = ["detector", "--of=nearest", f"--data={digits}"]
    file = tmp_path / "order.json"
    made = json.loads(run(calculate_metrics.cmdline, *command, f"--dest={file}").stdout)
    assert made["detector"] == "nearest" and made["num_train"] + made["num_holdout"] == 48
    assert made["accuracy"] > 0.9 and set(made["source_accuracy"]) == {"0", "1", "2"}
    order = json.loads(file.read_text())["order"]
    assert order[:3] == Nearest.order_of_its_own[:3].tolist() and order[3:] == [-1] * 7

    score = ["calc", f"--images={digits}", f"--data={digits}", f"--metrics=classifier:{file}", "--splits=0"]
    found = json.loads(run(calculate_metrics.cmdline, *score, "--distances=fd").stdout)["metrics"]["nearest"]
    dataset = ImageFolderDataset(digits)
    judge = get_detector(f"classifier:{file}")
    images, labels = (torch.tensor(np.stack(part)) for part in zip(*dataset, strict=True))
    logits = judge.logits(judge.features(images))
    assert logits.shape == (48, 10) and logits[:, 3:].isneginf().all()
    right = (logits.argmax(1) == labels.argmax(1)).double().mean()
    assert found["overall"]["agreement"] == pytest.approx(float(right)) and right > 0.9

    held = ["--holdout=" + str(digits), f"--dest={file}"]
    assert json.loads(run(calculate_metrics.cmdline, *command, *held).stdout)["num_train"] == 48
    one_line(calculate_metrics.cmdline, "detector", "--of=pixel", *command[2:], held[1], says="no published classifier")
    one_line(calculate_metrics.cmdline, *command, f"--dest={digits}", says="is what --data names")
    content = json.loads(file.read_text())
    for says, change in (
        ("'order' must list a class below 13", {"order": [13]}),
        ("'order' must list", {"order": None}),
        ("was fitted to 'other'", {"identity": "other"}),
        ("detector 'nothing' is unknown", {"detector": "nothing"}),
        ("a class order of a class order", {"detector": f"classifier:{file}"}),
        ("format class-order-1", {"format": "x"}),
    ):
        (tmp_path / "x.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=f"x.json' is no class order that can be used.*{says}"):
            get_detector(f"classifier:{tmp_path}/x.json")
