"""Detectors: the registry, pixel features, the classifier and its file."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from sklearn.datasets import load_digits

from metrics.classifier import load_classifier, source_agreement, stratified_split, train_classifier
from metrics.detectors import DETECTORS, about, get_detector, get_detectors, identity_of, split_specs


def digits():
    data = load_digits()
    return np.round(data.images * 255 / 16).astype(np.uint8)[:, None], data.target


@pytest.fixture(scope="module")
def judge():
    return train_classifier(*digits())


def test_pixel_features_are_in_training_units():
    images = torch.tensor([[[[0, 255]]], [[[51, 204]]]], dtype=torch.uint8)
    features = get_detector("pixel").features(images)
    np.testing.assert_allclose(features, [[-1, 1], [-0.6, 0.6]], rtol=1e-6)


def test_own_detectors(monkeypatch):
    monkeypatch.setitem(DETECTORS, "brightness", lambda argument: lambda images: images.float().mean(dim=(2, 3)))
    images = torch.full((4, 3, 2, 2), 7, dtype=torch.uint8)
    detector = get_detector("brightness")
    assert detector.name == identity_of(detector) == "brightness"
    assert detector.features(images).tolist() == [[7.0] * 3] * 4

    def first_pixel(images):
        return images[:, 0, 0, :1].float()

    assert list(get_detectors(["pixel", first_pixel])) == ["pixel", "first_pixel"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nothing", "known: .*pixel"),
        ("classifier", "needs a file"),
        ("classifier:missing.safetensors", "missing.safetensors.*does not exist"),
        ("pixel:3", "no argument"),
        ("fid", "needs weights-inception.*or pt_inception"),
        ("fd_dinov2", "needs dinov2_vitl14_pretrain.pth"),
        ("swin_l", "needs swin_large_384.pth"),
        ("hf", "hf:FOLDER"),
        ("pixel,pixel", "twice"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        get_detectors(spec)


PATHS = [
    "a,b.safetensors",
    "x=0,1-n=25/d",
    "sources: 0, 1/d e",
    " d ",
    "a,pixel/d",
    "a, pixel:x/d",
    "a,pixel,b/d",
    "a,pixel:1,classifier:d",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_breaks_a_list(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    for specs in ([f"classifier:{path}"], ["pixel", f"classifier:{path}"], [f"classifier:{path}", "pixel", "fid"]):
        assert split_specs(",".join(specs)) == specs


def test_lists_of_detectors():
    assert split_specs("pixel, classifier:d,fid") == ["pixel", "classifier:d", "fid"]
    assert split_specs("classifier:no,such,file,pixel") == ["classifier:no,such,file", "pixel"]


def test_classifier_learns_all_ten_digits(judge):
    assert judge.header["accuracy"] >= 0.97
    images, labels = digits()
    kept, held = stratified_split(labels, 0.2, seed=0)
    right = judge.predict(torch.from_numpy(images[held])).numpy() == labels[held]
    assert right.mean() == pytest.approx(judge.header["accuracy"])  # measured on images it never saw
    assert not set(kept) & set(held)
    assert np.bincount(labels[held]).min() >= 34  # every source is held out


def test_classifier_features(judge):
    images = torch.from_numpy(digits()[0][:40])
    features = judge.features(images)
    assert features.shape == (40, 64)
    said = about(judge)
    assert judge.identity == f"classifier:{said.pop('sha256')[:16]}"
    assert said == dict(name="classifier", width=64, channels=1, resize="none", precision="fp32")
    assert features.dtype == torch.float32
    one_by_one = torch.cat([judge.features(image[None]) for image in images])
    np.testing.assert_allclose(features, one_by_one, rtol=1e-4, atol=1e-5)
    assert judge.classify(features).tolist() == judge.predict(images).tolist()


def test_classifier_file_holds_tensors_and_json_only(judge, tmp_path):
    path = tmp_path / "d.safetensors"
    judge.save(path)
    again = load_classifier(path)
    assert again.identity == judge.identity
    assert again.header["accuracy"] == judge.header["accuracy"]
    images = torch.from_numpy(digits()[0][:40])
    assert torch.equal(again.features(images), judge.features(images))
    with safetensors.safe_open(path, "pt") as f:
        assert json.loads(f.metadata()["header"])["net"]["kwargs"]["num_classes"] == 10
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_files_of_version_1(judge, tmp_path):
    """A header of its own, tensors without prefix: the same detector under the same name."""
    path = tmp_path / "old.safetensors"
    sizes = {"image_shape": [1, 8, 8], "num_classes": 10, "width": 32, "features": 64}
    header = {"format": "classifier-detector-1", **sizes, **judge.header}
    safetensors.torch.save_file(judge.net.state_dict(), path, metadata={"header": json.dumps(header, sort_keys=True)})
    again = load_classifier(path)
    assert again.identity == judge.identity and again.header == judge.header
    again.save(path)
    assert load_classifier(path).identity == judge.identity and load_classifier(path).header == judge.header


def test_bad_classifier_files(judge, tmp_path):
    path = tmp_path / "d.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a classifier file"):
        load_classifier(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a classifier"):
        load_classifier(path)
    judge.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a classifier file"):
        load_classifier(path)


def test_classifier_refuses_other_images(judge):
    with pytest.raises(ValueError, match=r"\[1, 8, 8\].*\[3, 8, 8\]"):
        judge.features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        judge.features(torch.zeros(2, 1, 8, 8))


def test_training_is_seeded_and_leaves_the_global_generator_alone():
    images, labels = digits()
    images, labels = images[:200], labels[:200]
    torch.manual_seed(5)
    first = train_classifier(images, labels, epochs=1, width=8)
    drawn = torch.randn(3)
    torch.manual_seed(6)
    again = train_classifier(images, np.eye(10)[labels], epochs=1, width=8)  # one-hot labels are labels too
    assert first.identity == again.identity
    assert first.identity != train_classifier(images, labels, epochs=1, width=8, seed=1).identity
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(3))


def test_training_errors():
    images, labels = digits()
    with pytest.raises(ValueError, match="uint8"):
        train_classifier(images.astype(np.float32), labels)
    with pytest.raises(ValueError, match="two sources"):
        train_classifier(images[:20], np.zeros(20, int))
    with pytest.raises(ValueError, match="label"):
        train_classifier(images[:20], labels[:19])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 5, 9)])
def test_other_image_shapes(shape):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = (rng.integers(0, 60, (40, *shape)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    assert train_classifier(images, labels, epochs=4, width=8, features=16, batch_size=16).header["accuracy"] == 1


def test_source_agreement():
    assert source_agreement([0, 1, 1, 2, 9], [0, 1, 2, 2, -1]) == {"overall": 0.75, 0: 1.0, 1: 1.0, 2: 0.5}
    assert source_agreement([1], [-1]) == {"overall": None}
