"""Published generation presets against the published table; cached downloads; guidance of weight 1 through generation."""

import hashlib
import urllib.error
from pathlib import Path

import pytest
import torch

from dnnlib import download
from torch_utils import persistence
from training.encoders import StandardRGBEncoder
from training.generation import generate_images
from training.presets import GENERATION_PRESETS, generation_preset

SIZES, SMALL = ("xs", "s", "m", "l", "xl", "xxl"), ("s", "m", "l", "xl")


def test_names():
    expected = [f"edm2-img512-{s}-{m}" for s in SIZES for m in ("fid", "dino")]
    expected += [f"edm2-img64-{s}-fid" for s in SMALL]
    expected += [f"edm2-img512-{s}-guid-{m}" for s in SIZES for m in ("fid", "dino")]
    autog = ("img512-s", "img512-xxl", "img512-s-uncond", "img64-s")
    expected += [f"edm2-{s}-autog-{m}" for s in autog for m in ("fid", "dino")]
    assert len(expected) == 36 and sorted(GENERATION_PRESETS) == sorted(expected)


def test_published_results():
    """EDM2 table of results (FID, FD-DINOv2, without and with guidance) and autoguidance table 1."""

    def values(kind, metric, key, names=SIZES, size="img512"):
        rows = [generation_preset("-".join(p for p in ("edm2", size, s, kind, metric) if p)) for s in names]
        return [row["published"][key] for row in rows]

    assert values("", "fid", "fid") == [3.53, 2.56, 2.25, 2.06, 1.96, 1.91]
    assert values("", "dino", "fd_dinov2") == [103.39, 68.64, 58.44, 52.25, 45.96, 42.84]
    assert values("guid", "fid", "fid") == [2.91, 2.23, 2.01, 1.88, 1.85, 1.81]
    assert values("guid", "dino", "fd_dinov2") == [79.94, 52.32, 41.98, 38.20, 35.67, 33.09]
    assert values("", "fid", "fid", SMALL, "img64") == [1.58, 1.43, 1.33, 1.33]
    assert values("autog", "fid", "fid", ("s", "xxl", "s-uncond")) == [1.34, 1.25, 3.86]
    assert values("autog", "dino", "fd_dinov2", ("s", "xxl", "s-uncond")) == [36.67, 24.18, 90.39]
    assert values("autog", "fid", "fid", ("s",), "img64") == [1.01]


def test_rows():
    root = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
    row = generation_preset("edm2-img512-l-guid-dino")
    assert row["net"] == f"{root}/edm2-img512-l-1879048-0.035.pkl" and row["guidance"] == 1.7
    assert row["gnet"] == f"{root}/edm2-img512-xs-uncond-2147483-0.035.pkl"
    row = generation_preset("edm2-img64-xl-fid", root="models/")
    assert row["net"] == "models/edm2-img64-xl-0671088-0.040.pkl" and row["gnet"] is None and row["guidance"] == 1
    row = generation_preset("edm2-img512-s-uncond-autog-dino")
    assert row["net"].endswith("/edm2-img512-s-uncond-2147483-0.090.pkl") and row["guidance"] == 2.9
    assert row["gnet"].endswith("/edm2-img512-xs-uncond-0134217-0.125.pkl")
    for row in map(generation_preset, GENERATION_PRESETS):  # a guide goes with a weight, and the other way round
        assert (row["gnet"] is None) == (row["guidance"] == 1)
    with pytest.raises(ValueError, match="edm2-img512-xs-fid"):
        generation_preset("edm2-img512-xs")


def test_downloads_are_cached_whole_or_not_at_all(tmp_path, monkeypatch):
    source = tmp_path / "a b.bin"
    source.write_bytes(b"x" * 3_000_000)
    url = source.as_uri()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    path = download.cached(url)
    assert path == tmp_path / "cache" / "downloads" / f"{hashlib.md5(url.encode()).hexdigest()}_a_20b.bin"
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert download.cached(url) == path  # not fetched again
    tries = []

    def broken(url, timeout):
        tries.append(url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(download.urllib.request, "urlopen", broken)
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    monkeypatch.setattr(download, "PAUSE", 0)
    with pytest.raises(OSError, match="no route"):
        download.cached("https://example.invalid/x.bin")
    assert len(tries) == 3 and {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.sha256"}
    assert not download.is_url("runs/https-net") and download.is_url("https://example.org/net.safetensors")
    monkeypatch.delenv("DNNLIB_CACHE_DIR")
    assert download.cache_path("https://a/b.pkl").parent == Path.home() / ".cache" / "dnnlib" / "downloads"


def test_guidance_of_weight_one_is_no_guidance_bit_for_bit(tiny_net, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("main", "guide")]
    for seed, path in enumerate(paths):
        persistence.save_snapshot(path, tiny_net(seed=seed), encoder=StandardRGBEncoder())

    def made(**options):
        batches = generate_images(paths[0].as_posix(), seeds=range(3), num_steps=4, max_batch_size=2, **options)
        return torch.cat([batch.images for batch in batches])

    plain = made()
    assert torch.equal(plain, made(gnet=paths[1].as_posix(), guidance=1))
    assert not torch.equal(plain, made(gnet=paths[1].as_posix(), guidance=2))
