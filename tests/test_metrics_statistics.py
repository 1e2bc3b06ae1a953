"""Streamed statistics: batch size, merging, processes without images."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import child_runs
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from small_runs import python

from metrics.detectors import get_detectors
from metrics.distances import Gaussian, frechet, frechet_distance
from metrics.evaluate import compare
from metrics.features import collect, collect_dataset, image_hashes
from metrics.statistics import FeatureStatistics
from training.dataset import ArrayDataset


def features(n=203, width=6):
    rng = np.random.default_rng(0)
    return 50 + rng.normal(size=(n, width)), rng.integers(0, 3, n)


def check(statistics, x, labels):
    mu, sigma = statistics.moments()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-10)
    for source in np.unique(labels):
        part = x[labels == source]
        mu, sigma = statistics.moments(source)
        assert statistics.count(source) == len(part)
        np.testing.assert_allclose(mu, part.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(part, rowvar=False), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 7, 64, 256])
@pytest.mark.parametrize("width", [6, 80, 300])  # all groups wider than their images, the sources alone, none
def test_any_batch_size_gives_mean_and_covariance(batch, width):
    x, labels = features(width=width)
    statistics = FeatureStatistics(num_sources=3)
    for i in range(0, len(x), batch):
        statistics.update(x[i : i + batch], labels[i : i + batch])
    check(statistics, x, labels)


def test_memory_follows_images_and_not_the_square_of_the_width():
    x, labels = features(n=90, width=40)
    labels = np.where(np.arange(90) < 50, 0, 1000)  # of 1001 sources two have images
    statistics = FeatureStatistics(1001).update(x, labels)
    assert [row for row, group in statistics.groups.items() if group.outer is not None] == [0, 1]  # more than 40 images
    assert statistics.groups[1001].rows.shape == (40, 40) and list(statistics.groups) == [0, 1, 1001]
    check(statistics, x, labels)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("n, m", [(20, 30), (20, 64), (20, 300), (300, 20), (65, 65), (2, 2), (300, 400)])
def test_the_span_of_the_samples_gives_the_dense_distance(n, m):
    """64 features of 20 images: the same Fréchet distance as with matrices [64, 64], and as scipy's matrix root gives."""
    rng = np.random.default_rng(n)
    mixing = rng.normal(size=(64, 64))
    x, y = rng.normal(size=(n, 64)) @ mixing, 3 + rng.normal(size=(m, 64)) @ mixing
    a, b = FeatureStatistics().update(x), FeatureStatistics().update(y)
    assert a.gaussian().factor.shape[1] <= min(n, 64)
    found = frechet(a.gaussian(), b.gaussian())
    assert found == pytest.approx(frechet_distance(*a.moments(), *b.moments()), rel=1e-9)
    assert found == pytest.approx(frechet(Gaussian.of_features(x), Gaussian.of_features(y)), rel=1e-9)
    (mu1, s1), (mu2, s2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (x, y))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    assert found == pytest.approx(((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root), rel=1e-6)


def test_memory_is_estimated_before_the_work(monkeypatch):
    """More than there is: one line with the advice. 20 images of 64x64x3 need no matrix of 12288 x 12288."""
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 64, 64), dtype=np.uint8)
    dataset = ArrayDataset(images, np.arange(20) % 2)
    monkeypatch.setattr("metrics.statistics.free_memory", lambda: 40_000_000)
    group = collect_dataset(dataset, get_detectors("pixel"))["pixel"].statistics.groups[0]
    assert group.outer is None and group.rows.shape == (20, 12288)
    monkeypatch.setattr("metrics.statistics.free_memory", lambda: 5_000_000)
    with pytest.raises(
        ValueError, match="'pixel': .*20 images with 12288 features.*0.005 GB are free: use.*classifier"
    ):
        collect_dataset(dataset, get_detectors("pixel"))
    net = SimpleNamespace(features=None, name="wide", width=12288)  # says its width: before the first batch
    with pytest.raises(ValueError, match="'wide': .*20 images with 12288 features"):
        collect(iter([]), {"wide": net}, num_images=20)
    limit = "import resource, metrics.statistics as m; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); "
    done = python("-c", limit + "print(m.free_memory() < 2**33); m.require_memory('pixel', 10**5, 12288, 10)", code=1)
    assert done.stdout == "True\n" and "100000 images with 12288 features take about 15.9 GB" in done.stderr


PHOTOS = """
import resource, sys, calculate_metrics
for command in (["ref", "--data={0}", "--dest={1}"], ["calc", "--images={0}", "--ref={1}", "--num=50"]):
    calculate_metrics.cmdline([a.format(*sys.argv[1:]) for a in [*command, "--metrics=pixel"]], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_sixty_photos_of_256_pixels_need_little_memory(tmp_path):
    """The published workflow, whose dense matrices of 196608 x 196608 would be 309 GB each."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(60):
        y, x = (rng.integers(0, side - 256) for side in photos[i % 2].shape[:2])
        Image.fromarray(photos[i % 2][y : y + 256, x : x + 256]).save(tmp_path / f"photos/{i:02d}.png")
    done = python("-c", PHOTOS, tmp_path / "photos", tmp_path / "ref.npz")
    printed, peak = done.stdout.rsplit("\n", 2)[:2]
    assert 1024 * int(peak) < 2e9
    scores = json.loads(printed[printed.index('{\n  "images"') :])["metrics"]["pixel"]
    assert scores["feature_width"] == 196608 and scores["overall"]["fd"] > 0 and scores["overall"]["fd_se"] > 0


def test_values_that_are_not_finite_are_refused():
    x, labels = features()
    for value in (np.nan, np.inf, -np.inf):
        x[7, 2] = value
        with pytest.raises(ValueError, match="features of 1 of 203 images hold NaN or infinity"):
            FeatureStatistics(3).update(x, labels)
    with pytest.raises(ValueError, match="detector 'root': features of 21 of 21 images hold NaN"):
        collect_dataset(data(21), get_detectors([root]))


def root(images):
    return (-1 - integer_features(images)).sqrt()


def test_source_ids_beyond_those_announced():
    x, labels = features()
    statistics = FeatureStatistics(1)
    for part in (slice(0, 100), slice(100, 100), slice(100, None)):
        statistics.update(x[part], labels[part])
    check(statistics, x, labels)


def test_unlabelled_images_count_overall_only():
    x, labels = features()
    labels[:50] = -1
    statistics = FeatureStatistics(3).update(x, labels)
    assert statistics.count() == len(x)
    assert sum(statistics.count(s) for s in range(3)) == len(x) - 50
    check(statistics, x, labels[labels >= 0][:0])


def test_errors():
    statistics = FeatureStatistics().update(np.ones((1, 4)))
    with pytest.raises(ValueError, match="1 image"):
        statistics.moments()
    with pytest.raises(ValueError, match="width 5"):
        statistics.update(np.ones((2, 5)))


def integer_features(images):
    """Exact in float32, so that equal features meet every rank and batch."""
    return images.flatten(1).float()


def data(n):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n, 1, 3, 3), dtype=np.uint8)
    return ArrayDataset(images, np.arange(n) % 3, num_classes=4)


CASES = [(21, 4), (1, 4), (9, 2)]  # images, batch size: uneven last batches; a rank without images; none of 9 x 9


SUMS = ("sum", "outer", "rows")


def seen_and_scored(n, batch):
    """(what all processes see of n images, the scores of these against others)."""
    sets = [collect_dataset(data(k), get_detectors([integer_features]), batch_size=batch) for k in (n, n + 9)]
    found, others = (one["integer_features"] for one in sets)
    return found, compare(found, others, train=others, k=2)


def worker(rank, env, folder):
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for n, batch in CASES:
        found, scores = seen_and_scored(n, batch)
        Path(f"{folder}/{n}-{rank}.json").write_text(json.dumps(scores))
        groups = {f"{name}{row}": getattr(g, name) for row, g in found.statistics.groups.items() for name in SUMS}
        sums = {name: value for name, value in groups.items() if value is not None}
        seen = {name: getattr(found, name) for name in ("features", "labels", "hashes")}
        np.savez(f"{folder}/{n}-{rank}.npz", n=found.statistics.n, **seen, **sums)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one(tmp_path, size):
    places = enumerate(child_runs.ranks(size))
    started = [child_runs.CONTEXT.Process(target=worker, args=(*place, str(tmp_path))) for place in places]
    assert [process.start() for process in started] and [child_runs.wait(process) for process in started] == [0] * size
    for n, rank in [(n, rank) for n, _ in CASES for rank in range(size)]:
        expected, scores = seen_and_scored(n, 5)[1], json.loads(Path(f"{tmp_path}/{n}-{rank}.json").read_text())
        for section in (lambda r: r["overall"], lambda r: r["mean"], lambda r: r["sources"]["1"]):
            for name, value in section(expected).items():
                assert section(scores)[name] == (value and pytest.approx(value, rel=1e-10, abs=1e-10)), name
        assert (n < 2) == (expected["overall"]["fd"] is None)
        x = data(n)
        pixels = np.stack([x[i][0] for i in range(n)]).reshape(n, -1).astype(np.float64)
        found = np.load(tmp_path / f"{n}-{rank}.npz")
        np.testing.assert_array_equal(found["features"], pixels)
        np.testing.assert_array_equal(found["labels"], np.arange(n) % 3)
        np.testing.assert_array_equal(found["n"], [n, *(len(range(s, n, 3)) for s in range(3)), 0])
        np.testing.assert_array_equal(
            found["hashes"], image_hashes(torch.from_numpy(np.stack([x[i][0] for i in range(n)])))
        )
        for row, part in enumerate([pixels, *(pixels[s::3] for s in range(3))]):
            if not len(part):
                assert f"sum{row}" not in found
                continue
            np.testing.assert_allclose(found[f"sum{row}"], part.sum(0), rtol=1e-12)
            if len(part) > 9:
                np.testing.assert_allclose(found[f"outer{row}"], part.T @ part, rtol=1e-12)
            else:
                np.testing.assert_array_equal(*map(sorted, map(np.ndarray.tolist, (found[f"rows{row}"], part))))
