"""The lead paper's experiment from an ImageNet tree to its table, and the scripts that call it, at smoke size."""

import csv
import re

import numpy as np
import PIL.Image
import published
import pytest
import torch
from small_runs import ROOT, run

import run_experiment
from metrics.detectors.inception import WEIGHTS, InceptionV3
from training.dataset import ImageFolderDataset, content_hash
from training.dataset.imagenet import LEVELS

YAML = ROOT / "experiments" / "imagenet.yaml"
OTHERS = ["n01440764", "n03000684"]  # tench, chain saw: of no level
NAMES = [name for _, _, name in LEVELS["sim3"][:3]]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The class folders of twelve WordNet ids, four JPEGs of several sizes in each."""
    root, rng = tmp_path_factory.mktemp("imagenet") / "train", np.random.RandomState(0)
    for wnid in [*OTHERS, *(wnid for _, wnid, _ in LEVELS["sim3"])]:
        (root / wnid).mkdir(parents=True)
        for i in range(4):
            colour, size = rng.randint(40, 216, 3), rng.randint(40, 80, 2)
            pixels = np.clip(colour + rng.randint(-40, 40, [*size, 3]), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(root / wnid / f"{wnid}_{i}.JPEG")
    return root


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights in a file as the public one is named."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / WEIGHTS.names[0]
    torch.save(published.weights(shapes), path)
    return path


@pytest.fixture(scope="session")
def settings(tree, inception, tiny_vae, tmp_path_factory):
    """Words that keep everything small and in one folder."""
    root = tmp_path_factory.mktemp("cells")
    folders = {name: root / name for name in ("data", "refs", "runs", "samples", "out")}
    given = {"source": tree, "vae": tiny_vae[0], "metrics": f"fid:{inception}@any", **folders}
    return ["--budget=smoke", *(word for name, value in given.items() for word in ("--set", f"{name}={value}"))], root


def test_from_the_images_to_the_table(settings):
    """Convert, encode, references, ten trainings, scores, table; then nothing is left to do."""
    words, root = settings
    plan = run(run_experiment.main, YAML, *words, "--dry-run", "--seconds=0").stdout
    printed = run(run_experiment.main, YAML, *words, "--jobs=1").stdout
    head, row = (line.split(" | ") for line in printed.splitlines()[:3:2])
    assert [cell.strip("| ") for cell in row[:3]] == ["Sim 2 (dogs)", "3", "2"]
    assert len(head) == len(row) == 10
    assert re.fullmatch(r"\d+\.\d\d ± \d\.\d{4}", row[4]) and re.fullmatch(
        r"-?[\d.]+% \(-?[\d.]+% to -?[\d.]+%\)", row[6]
    )
    assert all(f"| {name} | " in printed for name in NAMES) and "| 5 |" not in printed
    data = root / "data" / "latent_datasets" / "sim3"
    multi = ImageFolderDataset(data / "inet-256-3c-2.zip")
    single = [ImageFolderDataset(data / f"inet-256-{source}-2.zip") for source in multi.sources]
    assert multi.image_shape == [8, 16, 16] and len(multi) == 6 and content_hash(multi) == content_hash(*single)
    assert f"Both arms saw the same images: sha256 {content_hash(multi)[:16]} of 6 images" in printed
    with open(root / "out" / "cells.csv") as file:
        (cell,) = csv.DictReader(file)
    with open(root / "out" / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert {r["class"] for r in rows} == set(NAMES) and len(rows) == 2 * 3 * 2
    for arm in ("multi", "single"):
        assert float(cell[arm]) == pytest.approx(np.mean([float(r["fd"]) for r in rows if r["arm"] == arm]), rel=1e-6)
    said = re.search(r"data sets ([\d.e-]+) GB, references ([\d.e-]+) GB, generated images ([\d.e-]+) GB", plan)
    for found, place in zip(said.groups(), ("data/**/*.zip", "refs/**/*.npz", "samples/*/**/*.png"), strict=True):
        size = sum(path.stat().st_size for path in root.glob(place))
        assert size / 1.3 < 1e9 * float(found) < 1.3 * size, (place, size, plan)
    listed = run(run_experiment.main, YAML, *words, "--list").stdout.splitlines()
    assert len(listed) > 20 and all(line.split()[1] == "done" for line in listed)
