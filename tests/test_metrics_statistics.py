"""Streamed statistics: batch size, merging, processes without images."""

import os
import socket

import numpy as np
import pytest
import torch

from metrics.detectors import get_detectors
from metrics.features import collect_dataset
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
def test_any_batch_size_gives_mean_and_covariance(batch):
    x, labels = features()
    statistics = FeatureStatistics(num_sources=3)
    for i in range(0, len(x), batch):
        statistics.update(x[i : i + batch], labels[i : i + batch])
    check(statistics, x, labels)


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


CASES = [(21, 4), (1, 4)]  # images, batch size: uneven last batches; a rank without images


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for n, batch in CASES:
        found = collect_dataset(data(n), get_detectors([integer_features]), batch_size=batch)["integer_features"]
        sums = {name: getattr(found.statistics, name).numpy() for name in ("n", "sum", "outer")}
        np.savez(f"{folder}/{n}-{rank}.npz", features=found.features, labels=found.labels, **sums)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    for n, rank in [(n, rank) for n, _ in CASES for rank in range(2)]:
        x = data(n)
        pixels = np.stack([x[i][0] for i in range(n)]).reshape(n, -1).astype(np.float64)
        found = np.load(tmp_path / f"{n}-{rank}.npz")
        np.testing.assert_array_equal(found["features"], pixels)
        np.testing.assert_array_equal(found["labels"], np.arange(n) % 3)
        np.testing.assert_array_equal(found["n"], [n, *(len(range(s, n, 3)) for s in range(3)), 0])
        np.testing.assert_allclose(found["sum"][0], pixels.sum(0), rtol=1e-12)
        np.testing.assert_allclose(found["outer"][0], pixels.T @ pixels, rtol=1e-12)
        np.testing.assert_allclose(found["sum"][2], pixels[1::3].sum(0), rtol=1e-12)
