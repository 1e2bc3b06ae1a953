"""Evaluation on digits: what must get worse gets worse, and real images score what real images score."""

import json
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from test_pickles import crafted

from metrics.classifier import train_classifier
from metrics.detectors import get_detector, identity_of
from metrics.evaluate import compare
from metrics.features import collect, collect_dataset, generated_batches
from metrics.references import load_references, require_detectors, save_references
from training.dataset import ArrayDataset

data = load_digits()
ORDER = np.random.default_rng(0).permutation(len(data.target))
IMAGES, LABELS = np.round(data.images * 255 / 16).astype(np.uint8)[ORDER, None], data.target[ORDER]
TRAIN, REFERENCE, HELD = slice(0, 500), slice(500, 1300), slice(1300, None)


def dataset(where, labels=LABELS, images=IMAGES):
    return ArrayDataset(images[where], labels[where], num_classes=10)


def seen(data, detector, **options):
    """What a detector (spec, detector or callable) sees in a data set."""
    detector = get_detector(detector)
    return collect_dataset(data, {identity_of(detector): detector}, **options)[identity_of(detector)]


def evaluate(samples, reference, detector, train=None, num=None, seed=0, batch_size=64, **options):
    """`compare` of data sets."""
    samples, train = seen(samples, detector, num=num, seed=seed, batch_size=batch_size), train and seen(train, detector)
    reference = reference if hasattr(reference, "statistics") else seen(reference, detector)
    return compare(samples, reference, detector=get_detector(detector), train=train, seed=seed, **options)


@pytest.fixture(scope="module")
def judge():
    return train_classifier(IMAGES[TRAIN], LABELS[TRAIN], epochs=20, width=16)


@pytest.fixture(scope="module")
def real(judge):
    return evaluate(dataset(HELD), dataset(REFERENCE), judge, train=dataset(TRAIN), splits=8)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # digits have pixels that are always black
def test_distances_are_those_of_the_features():
    result = evaluate(dataset(HELD), dataset(REFERENCE), "pixel", splits=0)
    pixels = IMAGES.reshape(len(IMAGES), -1).astype(np.float64) / 127.5 - 1

    def expected(where):
        a, b = pixels[HELD][where(LABELS[HELD])], pixels[REFERENCE][where(LABELS[REFERENCE])]
        (mu1, s1), (mu2, s2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (a, b))
        return ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)

    assert result["overall"]["fd"] == pytest.approx(expected(lambda labels: labels >= 0), rel=1e-5)
    assert result["sources"]["4"]["fd"] == pytest.approx(expected(lambda labels: labels == 4), rel=1e-5)
    assert result["sources"]["4"]["count"] == (LABELS[HELD] == 4).sum()
    assert result["sources"]["4"]["reference_count"] == (LABELS[REFERENCE] == 4).sum()
    sources = [result["sources"][str(s)]["fd"] for s in range(10)]
    assert result["mean"]["fd"] == pytest.approx(np.mean(sources), rel=1e-12)
    assert result["num_images"] == len(LABELS[HELD])


def test_real_images_score_the_floor(real):
    overall, mean = real["overall"], real["mean"]
    assert overall["floor_size"] == 400  # half of the reference, fewer than the 497 samples
    spread = np.hypot(overall["fd_floor_sd"], overall["fd_at_floor_size_sd"])
    assert abs(overall["fd_at_floor_size"] - overall["fd_floor"]) < 3 * spread
    assert 0.7 < mean["fd_at_floor_size"] / mean["fd_floor"] < 1.4  # 40 images of each source
    assert abs(overall["kid"]) < 5 * overall["kid_floor_sd"]
    assert overall["nearest_train"] == pytest.approx(overall["nearest_train_reference"], rel=0.1)
    assert overall["agreement"] > 0.93
    assert abs(mean["agreement"] - mean["agreement_reference"]) < 0.04
    assert real["predicted"] == {str(s): pytest.approx((LABELS[HELD] == s).sum(), abs=12) for s in range(10)}
    assert sum(real["predicted"].values()) == real["num_images"]
    json.dumps(real, allow_nan=False)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_the_floor_is_at_the_size_of_the_comparison():
    """60 images stand beside floors of 60: halves as drawn, cut, by scipy; the bias of so few is several times larger."""
    options = dict(splits=2, per_source=False, measures=("fd", "kid"))
    found = evaluate(dataset(slice(0, 60)), dataset(REFERENCE), "pixel", **options)["overall"]
    expected, pixels = [], IMAGES[REFERENCE].reshape(800, -1) / 127.5 - 1
    for split in range(2):
        order = np.random.default_rng([0, split]).permutation(800)
        a, b = pixels[order[:60]], pixels[order[400:460]]
        root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
        apart = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
        expected.append(apart - 2 * np.trace(root))
    assert found["floor_size"] == 60 and found["fd_floor"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert found["fd_floor_sd"] == pytest.approx(np.std(expected, ddof=1), rel=1e-2)
    more = evaluate(dataset(HELD), dataset(REFERENCE), "pixel", **options)["overall"]
    assert more["floor_size"] == 400 and found["fd_floor"] > 3 * more["fd_floor"]


def test_noise_lowers_precision_and_raises_the_distance(judge, real):
    noise = np.random.default_rng(1).normal(0, 60, IMAGES.shape)
    noisy = np.clip(IMAGES + noise, 0, 255).astype(np.uint8)
    result = evaluate(dataset(HELD, images=noisy), dataset(REFERENCE), judge)
    assert result["overall"]["precision"] < real["overall"]["precision"] - 0.2
    assert result["overall"]["fd"] > 5 * result["overall"]["fd_floor"]
    assert result["overall"]["kid"] > real["overall"]["kid"] + 5 * real["overall"]["kid_floor_sd"]


def test_mode_collapse_lowers_recall(judge, real):
    few = np.concatenate([np.flatnonzero(s == LABELS)[:2] for s in range(10)]).repeat(25)
    result = evaluate(dataset(few), dataset(REFERENCE), judge)
    assert result["overall"]["recall"] < 0.3 < real["overall"]["recall"] - 0.3
    assert result["overall"]["precision"] > 0.9
    assert result["overall"]["agreement"] > 0.9  # agreement alone does not see it


def test_a_missing_source_shows(judge):
    where = np.flatnonzero(LABELS[HELD] != 7) + HELD.start
    wrong = np.where(LABELS == 3, 7, LABELS)  # the model draws threes where sevens were asked for
    result = evaluate(dataset(where, labels=wrong), dataset(REFERENCE), judge)
    assert result["sources"]["7"]["agreement"] < 0.1
    assert result["sources"]["2"]["agreement"] > 0.8
    assert result["sources"]["7"]["fd"] > 5 * result["sources"]["7"]["fd_floor"]
    assert result["sources"]["3"]["count"] == 0
    assert result["sources"]["3"]["fd"] is None
    assert result["predicted"].get("7", 0) < 5
    filled = [s for s in result["sources"].values() if s["count"]]
    assert result["mean"]["agreement"] == pytest.approx(np.mean([s["agreement"] for s in filled]))


def test_copies_of_training_images_show():
    result = evaluate(dataset(slice(0, 200)), dataset(REFERENCE), "pixel", train=dataset(TRAIN), measures=("fd",))
    assert result["overall"]["nearest_train"] == 0
    assert result["overall"]["nearest_train_reference"] > 1
    assert result["mean"]["nearest_train"] == 0
    assert "kid" not in result["overall"]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_nothing(batch_size):
    options = {"train": dataset(slice(0, 50)), "splits": 2}
    a, b = (
        evaluate(dataset(slice(0, 90)), dataset(slice(100, 250)), "pixel", batch_size=n, **options)
        for n in (batch_size, 256)
    )
    for name, value in a["overall"].items():
        assert value == (value and pytest.approx(b["overall"][name], rel=1e-10, abs=1e-10)), name


def test_few_images_of_wide_features_are_compared_in_their_span(monkeypatch):
    """A rotation: all numbers are those of the features themselves, per source and of training images too."""
    few = [dataset(slice(start, start + 24)) for start in (0, 100, 200)]
    wide = lambda images: torch.nn.functional.pad(images, (0, 4)).flatten(1).float()  # 96 features
    wide = lambda images, inner=wide: torch.cat([inner(images), inner(images).square() / 255], 1)
    options = {"train": few[2], "splits": 2, "k": 2}
    found = evaluate(few[0], few[1], wide, **options)
    assert found["feature_width"] == 192 and found["overall"]["nearest_train"] > 0
    monkeypatch.setattr("metrics.evaluate._in_span", lambda *sets: sets)
    direct = evaluate(few[0], few[1], wide, **options)
    for section in (lambda r: r["overall"], lambda r: r["mean"], lambda r: r["sources"]["3"]):
        a, b = section(found), section(direct)
        assert list(a) == list(b)
        for name, value in a.items():
            assert value == (value and pytest.approx(b[name], rel=1e-9, abs=1e-9)), name


def test_every_number_has_its_error(real, judge):
    """In every section; the errors of means over sources are those of independent sources."""
    overall, mean = real["overall"], real["mean"]
    numbers = ["fd", "kid", "mmd_gaussian", "precision", "recall", "density", "coverage", "nearest_train"]
    numbers += ["agreement", "agreement_reference", "agreement_top5", "inception_score", "inception_score_reference"]
    for name in numbers:
        assert overall[f"{name}_se"] >= 0 and overall[name] is not None, name
    assert 0 < overall["fd_se_samples"] < overall["fd_se"]
    assert overall["agreement"] <= overall["agreement_top5"] <= 1
    assert abs(overall["inception_score"] - overall["inception_score_reference"]) < 5 * overall["inception_score_se"]
    for name in ("fd_se", "recall_se", "agreement_se"):
        errors = [section[name] for section in real["sources"].values()]
        assert mean[name] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 10)
    p, n = overall["agreement"], overall["count"]
    assert overall["agreement_se"] == pytest.approx(np.sqrt(p * (1 - p) / (n - 1)))
    assert real["warnings"] == [] or "source" in real["warnings"][0]


def test_distance_of_infinitely_many_digits_is_lower(judge):
    """497 samples of 32 features; and the warning where images are fewer than features."""
    small = train_classifier(IMAGES[TRAIN], LABELS[TRAIN], epochs=1, width=8, features=32)
    overall = evaluate(dataset(HELD), dataset(REFERENCE), small, splits=0, per_source=False)["overall"]
    assert 0 < overall["fd_infinity"] < overall["fd"]
    found = evaluate(dataset(slice(0, 60)), dataset(REFERENCE), "pixel", splits=0, per_source=False)
    assert found["overall"]["fd_infinity"] is None
    assert "60 images, 64 features: covariances are singular" in found["warnings"][0]


def test_subset_is_seeded_and_exact():
    first, again, other = (
        evaluate(dataset(HELD), dataset(REFERENCE), "pixel", num=100, seed=s, splits=0, measures=("fd",))["overall"]
        for s in (0, 0, 1)
    )
    assert first == again
    assert first["count"] == 100
    assert first["fd"] != other["fd"]
    with pytest.raises(ValueError, match="num=498"):
        evaluate(dataset(HELD), dataset(REFERENCE), "pixel", num=498)


def test_refusals(judge):
    reference = seen(dataset(REFERENCE), "pixel")
    with pytest.raises(ValueError, match="different detectors"):
        evaluate(dataset(HELD), reference, judge)
    small = ArrayDataset(IMAGES[:, :, :4, :4], LABELS)
    with pytest.raises(ValueError, match="width 16.*64"):
        evaluate(small, reference, "pixel")
    latents = ArrayDataset(np.zeros((9, 4, 2, 2), np.float32))
    with pytest.raises(ValueError, match="latents"):
        evaluate(latents, reference, "pixel")


def test_unlabelled_images_and_plain_callables():
    unlabelled = ArrayDataset(IMAGES[:60])
    result = evaluate(unlabelled, unlabelled, lambda images: images.float().mean((2, 3)))
    assert "sources" not in result
    assert result["overall"]["fd"] == pytest.approx(0, abs=1e-9)


def test_generated_batches_skip_ranks_without_images():
    class Item:
        def __init__(self, images, labels, seeds):
            self.images, self.labels, self.seeds = images, labels, seeds

    images, onehot = torch.from_numpy(IMAGES[:6]), torch.eye(10)[LABELS[:6]]
    items = [Item(images[4:], onehot[4:], [4, 5]), Item(None, None, []), Item(images[:4], onehot[:4], [0, 1, 2, 3])]
    detectors = {"mean": type("Mean", (), {"features": staticmethod(lambda x: x.float().mean((2, 3)))})}
    found = collect(generated_batches(items), detectors, num_sources=2)["mean"]
    np.testing.assert_allclose(found.features[:, 0], IMAGES[:6].mean((1, 2, 3)), rtol=1e-6)  # in order of the seeds
    assert found.labels.tolist() == LABELS[:6].tolist()
    assert found.num_sources == LABELS[:6].max() + 1  # the network has more sources than the reference


# Reference files.


def test_reference_file_round_trip(tmp_path, judge):
    path = tmp_path / "ref.npz"
    references = {d: seen(dataset(REFERENCE), d) for d in ("pixel", judge)}
    references = {reference.detector: reference for reference in references.values()}
    save_references(path, references)
    found = load_references(path)
    assert list(found) == ["pixel", judge.identity]
    assert found["pixel"].provenance == references["pixel"].provenance
    for detector in ("pixel", judge):
        name = detector if detector == "pixel" else judge.identity
        direct = evaluate(dataset(HELD), references[name], detector, splits=1)
        assert evaluate(dataset(HELD), found[name], detector, splits=1) == direct
    np.testing.assert_allclose(np.load(path)["0/mu"], IMAGES[REFERENCE].mean(0).ravel() / 127.5 - 1, rtol=1e-5)
    with pytest.raises(ValueError, match="not of fid"):
        require_detectors(found, {"fid": None}, path)


@pytest.mark.parametrize("keep", [False, True])
def test_reference_files_of_either_form(tmp_path, keep):
    """Sources with fewer images than features are stored as images; files of the first format, sums alone, are read."""
    few = dataset(slice(500, 700))
    reference = seen(few, "pixel")
    save_references(tmp_path / "ref.npz", {"pixel": reference}, keep_features=keep)
    pixels, labels = reference.features.astype(np.float64), reference.labels
    parts = [pixels, *(pixels[labels == s] for s in range(12))]  # the last two are empty
    sums = {"n": [len(x) for x in parts], "sum": [x.sum(0) for x in parts], "outer": [x.T @ x for x in parts]}
    kept = {"features": reference.features, "labels": labels} if keep else {}
    header = {"format": "feature-reference-1", "detectors": [{"identity": "pixel", "provenance": {}}]}
    arrays = {f"0/{name}": np.array(value) for name, value in (sums | kept).items()}
    np.savez(tmp_path / "first.npz", header=np.array(json.dumps(header)), **arrays)
    direct = evaluate(dataset(HELD), reference, "pixel", splits=1)
    for name in ("ref.npz", "first.npz"):
        found = load_references(tmp_path / name)["pixel"]
        assert found.statistics.n[:11].tolist() == reference.statistics.n.tolist()
        result = evaluate(dataset(HELD), found, "pixel", splits=1)
        for section in (lambda r: r["overall"], lambda r: r["sources"]["3"], lambda r: r["mean"]):
            assert section(result)["fd"] == pytest.approx(section(direct)["fd"], rel=1e-10)
        assert (result["overall"]["kid"] == direct["overall"]["kid"]) == keep


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
@pytest.mark.parametrize("name", ["features", "0/sum", "0/outer", "labels", "n"])
def test_reference_files_that_are_not_finite_or_contradict_themselves(tmp_path, name, value):
    save_references(tmp_path / "ref.npz", {"pixel": seen(dataset(slice(0, 90)), "pixel")})
    arrays = dict(np.load(tmp_path / "ref.npz"))
    bad = arrays[f"0/{name}"].astype(np.float64)
    if value is None:
        bad = bad[:-1] if name != "n" else -bad
    else:
        bad.flat[3] = value
    np.savez(tmp_path / "bad.npz", **arrays | {f"0/{name}": bad})
    with pytest.raises(ValueError, match=r"bad.npz' is no readable reference file \([^)]*(NaN|89 |fit|integers)"):
        load_references(tmp_path / "bad.npz")


@pytest.mark.parametrize(("place", "value"), [((2, 2), 1e308), ((1, 1), -1.0), ((0, 3), 1e9), ((3, 0), 0.5)])
def test_second_moments_that_no_features_have(tmp_path, place, value):
    x = np.random.default_rng(0).normal(size=(50, 6))
    sigma = np.cov(x, rowvar=False)
    sigma[place] = value
    np.savez(tmp_path / "bad.npz", mu=x.mean(0), sigma=sigma)
    with pytest.raises(ValueError, match="no matrix of second moments"):
        load_references(tmp_path / "bad.npz")
    save_references(tmp_path / "ref.npz", {"pixel": seen(dataset(slice(0, 90)), "pixel")})
    arrays = dict(np.load(tmp_path / "ref.npz"))
    name = next(name for name in arrays if name.endswith("/outer"))
    arrays[name] = arrays[name].copy()
    arrays[name][place] = value if value != 0.5 else arrays[name].max() / 2
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match="no matrix of second moments"):
        load_references(tmp_path / "bad.npz")


def test_reference_file_without_features_has_distances_only(tmp_path):
    path = tmp_path / "ref.npz"
    reference = seen(dataset(REFERENCE), "pixel")
    save_references(path, {"pixel": reference}, keep_features=False)
    found = evaluate(dataset(HELD), load_references(path)["pixel"], "pixel")
    full = evaluate(dataset(HELD), reference, "pixel")
    assert found["sources"]["1"]["fd"] == full["sources"]["1"]["fd"]
    assert found["sources"]["1"]["kid"] is None
    assert found["overall"]["fd_floor"] is None
    assert "features of the reference were not kept: no floor" in found["warnings"][0] and len(found["warnings"]) == 1


def test_foreign_reference_files(tmp_path):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 5))
    moments = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}
    np.savez(tmp_path / "edm.npz", **moments)
    contents = {"num_images": 30, "fid": moments, "fd_dinov2": moments}
    for protocol in (2, 4, 5):
        (tmp_path / f"edm2-{protocol}.pkl").write_bytes(pickle.dumps(contents, protocol=protocol))
    old = pickle.dumps(contents, protocol=2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "edm2-old.pkl").write_bytes(old)
    for name in ("edm.npz", "edm2-2.pkl", "edm2-4.pkl", "edm2-5.pkl", "edm2-old.pkl"):
        found = load_references(tmp_path / name)
        assert list(found) == (["fid"] if name == "edm.npz" else ["fid", "fd_dinov2"])
        mu, sigma = found["fid"].statistics.moments()
        np.testing.assert_array_equal(mu, moments["mu"])
        np.testing.assert_array_equal(sigma, moments["sigma"])
        assert found["fid"].count() == (None if name == "edm.npz" else 30)

        class Inception:
            name = "fid"
            features = staticmethod(lambda images: images.float().flatten(1)[:, 10:15])

        result = evaluate(dataset(HELD), found["fid"], Inception())
        y = IMAGES[HELD].reshape(-1, 64)[:, 10:15].astype(np.float64)
        s1, s2 = np.cov(y, rowvar=False), moments["sigma"]
        expected = ((y.mean(0) - mu) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        assert result["overall"]["fd"] == pytest.approx(expected, rel=1e-6)
        assert result["overall"]["fd_floor"] is None  # no features in these files


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_reference_files_execute_nothing(tmp_path):
    target = tmp_path / "executed"
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"fid": Malicious(str(target))}))
    with pytest.raises(ValueError, match="bad.pkl.*refuses to load 'io.open'"):
        load_references(path)
    with pytest.raises(ValueError, match="no readable reference"):  # a type that claims to hold pointers
        path.write_bytes(
            b"(S'fid'\n(S'mu'\n" + crafted(flags=63)[:-1] + b"S'sigma'\n" + crafted(flags=63)[:-1] + b"dd."
        )
        load_references(path)
    np.savez(tmp_path / "bad.npz", mu=np.array([Malicious(str(target))], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="bad.npz"):
        load_references(tmp_path / "bad.npz")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"text", pickle.dumps([1, 2]), pickle.dumps({})])
def test_damaged_reference_files(tmp_path, content):
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.npz.*no readable reference"):
        load_references(path)
