"""The FID's Inception-v3: the public file's names and shapes, torch-fidelity's numbers, the whole chain with random weights."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pickle
import sys
import types

import numpy as np
import published
import pytest
import safetensors.torch
import torch
from PIL import Image
from small_runs import one_line, run

import calculate_metrics
import generate_images
from dnnlib.util import EasyDict, file_sum
from metrics import commands
from metrics.detectors import about, base, find, get_detector, weights
from metrics.detectors.inception import SIDE, WEIGHTS, InceptionV3, Unit
from metrics.detectors.resize import tf1_bilinear
from metrics.references import load_references
from torch_utils.persistence import save_snapshot
from training.encoders import StandardRGBEncoder
from training.fit import Side
from training.networks_edm2 import Precond


@pytest.fixture(scope="module")
def shapes():
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}


@pytest.fixture(scope="module")
def file(shapes, tmp_path_factory):
    """A weight file of golden random numbers, of the name that torch-fidelity's has."""
    path = tmp_path_factory.mktemp("weights") / WEIGHTS.names[0]
    torch.save(published.weights(shapes), path)
    return path


@pytest.fixture(scope="module")
def detector(file):
    return get_detector(f"fid:{file}@any")


def test_names_and_shapes_are_those_of_the_public_file(shapes):
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    kept = {name: shape for name, shape in shapes.items() if name not in counters}
    assert (len(shapes), len(kept)) == (566, 472)
    assert sum(int(np.prod(shape)) for shape in kept.values()) == 23_885_392
    trained = [s for name, s in kept.items() if "running" not in name]
    assert (len(trained), sum(int(np.prod(s)) for s in trained)) == (284, 23_850_960)
    expected = {
        "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_4a_3x3": (192, 80, 3, 3), "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
        "Mixed_5c.branch_pool": (64, 256, 1, 1), "Mixed_5d.branch3x3dbl_3": (96, 96, 3, 3),
        "Mixed_6a.branch3x3": (384, 288, 3, 3), "Mixed_6b.branch7x7dbl_4": (128, 128, 7, 1),
        "Mixed_6c.branch7x7_2": (160, 160, 1, 7), "Mixed_6e.branch7x7dbl_5": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3), "Mixed_7b.branch1x1": (320, 1280, 1, 1),
        "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1), "Mixed_7c.branch_pool": (192, 2048, 1, 1),
    }  # fmt: skip
    for name, shape in expected.items():
        assert kept[f"{name}.conv.weight"] == shape
        assert all(kept[f"{name}.bn.{part}"] == shape[:1] for part in ("weight", "bias", "running_mean", "running_var"))
    assert len([name for name in kept if name.endswith("conv.weight")]) == 94
    assert (kept["fc.weight"], kept["fc.bias"]) == ((1008, 2048), (1008,))


def test_golden_numbers(detector):
    """Of torch-fidelity 0.4.0 with the same weights and images."""
    features = detector.features(published.images(64, 48))
    first, last = [0.000000, 0.463811, 0.123980, 0.475453], [0.000000, 0.029438]
    published.assert_golden(features, first, last, 0.281616, 0.383986)
    logits = detector.logits(features.numpy())
    first, last = [0.094742, 0.514080, -0.348513, 0.568200], [-0.722111, 0.138667]
    published.assert_golden(logits, first, last, -0.025871, 0.467558)
    biased = detector.logits(features, bias=True)
    assert torch.allclose(biased - logits, detector.net.fc.bias.expand(2, -1), atol=1e-5)


def oracle():
    """torch-fidelity's modules of this network, without the rest of the package, which needs torchvision."""
    if "torch_fidelity" not in sys.modules:
        spec = importlib.util.find_spec("torch_fidelity")
        if spec is None:
            pytest.skip("torch-fidelity is not installed: bash_files/setup.sh does that, without its dependencies")
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return FeatureExtractorInceptionV3, interpolate_bilinear_2d_like_tensorflow1x


def test_features_are_those_of_torch_fidelity(file, detector):
    make, resize = oracle()
    names = ["2048", "logits_unbiased", "logits"]
    with torch.no_grad():
        theirs = make("inception-v3-compat", names, feature_extractor_weights_path=str(file)).eval()
        expected = dict(zip(names, theirs(images := published.images(97, 301)), strict=True))
    features = detector.features(images)
    torch.testing.assert_close(features, expected["2048"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(detector.logits(features), expected["logits_unbiased"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(detector.logits(features, bias=True), expected["logits"], atol=1e-4, rtol=1e-4)
    for size in ((32, 32), (64, 48), (256, 256), (299, 299), (512, 300), (97, 301), (1, 1)):
        x = published.images(*size).float()
        assert torch.equal(tf1_bilinear(x, SIDE), resize(x, (SIDE, SIDE), align_corners=False))


@pytest.mark.parametrize("size", [(1, 1), (5, 64), (299, 299), (400, 7)])
def test_resize_reads_where_tensorflow_1_does(size):
    """By the formula, pixel by pixel in float64: output i reads at i in / out, without a half-pixel shift."""
    x = published.images(*size, count=1).double().numpy()[0]

    def matrix(n):
        at = np.arange(11) * n / 11
        low = np.floor(at).astype(int)
        weights = np.zeros((11, n))
        for i, (l, d) in enumerate(zip(low, at - low, strict=True)):
            weights[i, l] += 1 - d
            weights[i, min(l + 1, n - 1)] += d
        return weights

    expected = np.einsum("iy,cyx,jx->cij", matrix(size[0]), x, matrix(size[1]))
    np.testing.assert_allclose(
        tf1_bilinear(torch.from_numpy(x)[None].float(), 11)[0], expected, atol=1e-2
    )  # float32 positions


def test_folded_norms_change_nothing():
    torch.manual_seed(0)
    unit = Unit(3, "x:8:1x3").eval()
    for name, value in unit.bn.named_buffers():
        value.copy_(torch.rand(8) + 0.5 if name != "num_batches_tracked" else value)
    x = torch.randn(2, 3, 5, 7)
    with torch.no_grad():
        y = torch.nn.functional.conv2d(x.double(), unit.conv.weight.double(), padding=(0, 1))
        mean, var = (v.double()[:, None, None] for v in (unit.bn.running_mean, unit.bn.running_var))
        expected = ((y - mean) / (var + 1e-3).sqrt()).relu()
        np.testing.assert_allclose(unit(x), expected, atol=1e-6)
        unit.fold()
        np.testing.assert_allclose(unit(x), expected, atol=1e-6)


def test_batch_size_does_not_matter(detector, monkeypatch):
    """Of 1, 7 and all at once; more images than the network sees at a time."""
    monkeypatch.setitem(base.CHUNK, "cpu", 4)
    images = published.images(40, 56, count=8)
    together = detector.features(images)
    for batch, count in ((1, 2), (7, 8)):
        apart = torch.cat([detector.features(part) for part in images[:count].split(batch)])
        torch.testing.assert_close(apart, together[:count], atol=1e-4, rtol=1e-4)
    grey = detector.features(images[:2, :1])
    assert torch.equal(grey, detector.features(images[:2, :1].repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"'fid' looks at RGB or grey images.*\[8, 2, 40, 56\]"):
        detector.features(images[:, :2])
    with pytest.raises(ValueError, match="float32"):
        detector.features(images.float())


def test_what_it_says_of_itself(file, detector):
    """Only the published weights, by their sha256, are what other tools call fid."""
    found = about(detector)
    resize = "TensorFlow 1 bilinear to 299 px"
    assert found == dict(name="fid", width=2048, channels=3, resize=resize, sha256=found["sha256"], precision="fp32")
    assert detector.identity == f"fid:{found['sha256'][:16]}"
    assert (
        about(types.SimpleNamespace(resize=print, name="own"))["resize"] is None
    )  # whatever a user's class means by it
    none = dict.fromkeys(("name", "width", "channels", "sha256"))
    assert about(lambda images: images) == {**none, "resize": "none", "precision": "fp32"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty folders for what is kept: ours and torch's."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return [tmp_path / "ours" / "weights", tmp_path / "torch" / "hub" / "checkpoints"]


def test_where_weights_are_found(file, cache, monkeypatch):
    """In both caches, under either name; by URL and `download`, then without the network; published or not by sha256."""
    small = dataclasses.replace(WEIGHTS, sha256=hashlib.sha256(b"published").hexdigest(), url=file.as_uri())
    for folder, name in itertools.product(cache, WEIGHTS.names):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"published")
        found = find(small)
        assert (found.path, found.identity("fid")) == (folder / name, "fid")
        (folder / name).unlink()
    source = cache[0] / "elsewhere.pth"
    source.write_bytes(b"published")
    small = dataclasses.replace(small, url=source.as_uri())
    with pytest.raises(ValueError, match="needs weights-inception"):
        find(small)
    assert find(small, "download").published and find(small, source.as_uri()).published
    source.unlink()
    assert find(small).published and find(small, f"{find(small).path}@any").identity("fid") == "fid"


def test_files_that_are_missing_or_others(file, cache, tmp_path):
    with pytest.raises(ValueError) as error:
        get_detector("fid")
    for part in (
        *WEIGHTS.names,
        str(WEIGHTS.size),
        WEIGHTS.sha256,
        "Apache-2.0",
        *map(str, cache),
        "--weights=fid=FILE",
    ):
        assert part in str(error.value)
    with pytest.raises(
        ValueError, match=f"95702163 bytes, not 95628359; sha256 is .*, expected {WEIGHTS.sha256}.*@any"
    ):
        get_detector(f"fid:{file}")
    with pytest.raises(ValueError, match="sha256 is .*, not 00000000 as asked for"):
        get_detector(f"fid:{file}@00000000")
    with open(file, "rb") as opened:
        own = file_sum(opened)
    assert get_detector(f"fid:{file}@{own[:8].upper()}").identity == f"fid:{own[:16]}"


def test_tensors_of_another_network(shapes):
    with torch.device("meta"):
        net = InceptionV3()
    state = published.weights(shapes)

    def refused(says, **changes):
        changed = {name: value for name, value in (state | changes).items() if value is not None}
        with pytest.raises(ValueError, match=f"x.pth: {says}"):
            weights.fill(net, changed, "x.pth")

    refused("lacks tensor 'fc.bias'", **{"fc.bias": None})
    refused("holds an unexpected tensor 'extra'", extra=torch.zeros(2))
    refused(r"tensor 'fc.bias' has shape \[1000\], expected \[1008\]", **{"fc.bias": torch.zeros(1000)})
    refused("tensor 'fc.bias' holds what are no finite numbers", **{"fc.bias": torch.full([1008], torch.nan)})
    counters = {name: torch.tensor(5) for name in shapes if name.endswith("num_batches_tracked")}
    filled = weights.fill(net, state | counters, "x.pth").state_dict()  # torch-fidelity's converter leaves them out
    assert all(torch.equal(filled[name], value) for name, value in state.items())


def test_files_that_hold_something_else(tmp_path):
    path, state = tmp_path / "x.pth", {"fc.bias": torch.randn(3, 4).T, "b": torch.arange(3.0)}

    def refused(says):
        with pytest.raises(ValueError, match=f"x.pth: {says}"):
            get_detector(f"fid:{path}@any")

    torch.save(state, path)
    refused(r"lacks tensor 'Conv2d_1a_3x3.bn.bias' \(471 such\)")
    torch.save({"AuxLogits.fc.bias": torch.zeros(1)}, path)
    refused("torchvision's network of ImageNet")
    torch.save({"x": "y"}, path)
    refused("no readable weight file .*'x' is no tensor")
    torch.save([1], path)
    refused("no readable weight file .*holds an object")
    path.write_bytes(pickle.dumps({"a": eval}))
    refused("no readable weight file .*refuses to load")
    torch.save({"model_state_dict": state, "epoch": 3}, path)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "x.safetensors")
    for file in (path, tmp_path / "x.safetensors"):
        found = weights.read(file)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def frechet(x, y):
    """Of fewer images than features: the trace of the root is the nuclear norm of the inner products."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")


def test_reference_and_scores_from_the_command_line(file, detector, tmp_path):
    """ref, then calc, then gen of a network: its images, written by generate_images, have the same distance."""
    seen, rng = {}, np.random.RandomState(2)
    for name, most in (("real", 256), ("made", 200)):
        pixels = rng.randint(0, most, (4, 16, 16, 3)).astype(np.uint8)
        (tmp_path / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        seen[name] = detector.features(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double().numpy()
    given = ["--metrics=fid", f"--weights=fid={file}@any"]
    reference = ["ref", f"--data={tmp_path}/real", f"--dest={tmp_path}/r.npz", *given]
    assert json.loads(run(calculate_metrics.cmdline, *reference).stdout)["detectors"] == [detector.identity]
    score = [
        "calc",
        f"--images={tmp_path}/made",
        f"--ref={tmp_path}/r.npz",
        "--splits=0",
        "--distances=fd",
        "--num=4",
    ]
    (reference,) = load_references(tmp_path / "r.npz").values()
    assert reference.provenance["detector"] == about(detector)
    expected = frechet(*seen.values())
    done = run(calculate_metrics.cmdline, *score, *given, "--batch=3")
    scores = json.loads(done.stdout)
    found = scores["metrics"][detector.identity]
    assert scores["scores"] == {f"fd_{detector.identity}": found["overall"]["fd"]}  # not the fid of published weights
    assert found["overall"]["fd"] == pytest.approx(expected, rel=1e-4) and found["feature_width"] == 2048
    again = run(calculate_metrics.cmdline, *score, given[1])  # the reference and --weights say which
    assert json.loads(again.stdout)["metrics"].keys() == {detector.identity}
    torch.manual_seed(0)
    net = Precond(16, 3, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    save_snapshot(tmp_path / "net.safetensors", net, encoder=StandardRGBEncoder())
    sample = [f"--net={tmp_path}/net.safetensors", "--steps=2", "--device=cpu"]
    run(generate_images.main, *sample, f"--outdir={tmp_path}/out", "--seeds=0-3")
    made = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))])
    made = detector.features(torch.from_numpy(made).permute(0, 3, 1, 2)).double().numpy()
    done = run(calculate_metrics.cmdline, "gen", *sample, *score[2:], *given)
    found = json.loads(done.stdout)["metrics"][detector.identity]["overall"]["fd"]
    assert found == pytest.approx(frechet(seen["real"], made), rel=1e-4)
    for options, says in (
        (["--metrics=pixel", given[1]], "--metrics=pixel names no detector 'fid'"),
        (["--metrics=fid", f"--weights=fid={tmp_path}"], f"not in {tmp_path}: put it there"),
        (["--metrics=fid", f"--weights=fid={file}"], f"--weights=fid={file}@any"),
        (["--metrics=fid", "--weights=fid"], "--weights=fid: give NAME=VALUE"),
        ([], "name the detector, --metrics=NAME:FILE"),
        (["--metrics=pixel"], f"holds statistics of {detector.identity}, not of pixel"),
    ):
        one_line(calculate_metrics.cmdline, *score, *options, says=says)


def test_default_is_what_size_and_weights_allow(cache, capsys):
    """Published ones whose files are at hand, unless images are tiny; --weights alone names its detector."""
    chosen = lambda side, **weights: commands.default_metrics(EasyDict(weights=weights), Side("x", img_resolution=side))
    assert chosen(256) == "pixel" and capsys.readouterr().err == ""
    for folder, name in zip(cache, (WEIGHTS.names[1], "dinov2_vitl14_pretrain.pth"), strict=True):
        folder.mkdir(parents=True)
        (folder / name).touch()
    assert chosen(256) == chosen("32x64") == "fid,fd_dinov2" and "fid,fd_dinov2" in capsys.readouterr().err
    assert chosen(28) == chosen("256x8") == "pixel" and chosen(8, fid="x") == "fid"
