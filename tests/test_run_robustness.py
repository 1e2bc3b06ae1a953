"""The grid of robustness experiments: what it measures, its files, and that it resumes."""

import csv
import json
import math

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from small_runs import one_line, run

import calculate_metrics
from metrics import results
from simulations import run_alignment, run_pfgm_toy, run_robustness
from simulations.studies import pfgm_toy, robustness, stable_targets
from torch_utils import persistence
from training import processes
from training.dataset import ImageFolderDataset, load_arrays
from training.dataset.format import png_bytes
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.networks_edm2 import Precond
from training.processes.pfgmpp import PosteriorMean

pytestmark = pytest.mark.filterwarnings("ignore:D = ")
GRID = ["--num=12", "--num-steps=3", "--alpha=0,0.5", "--steps=2,3", "--bits=3", "--batch=6"]


@pytest.fixture
def nets(tiny_net, tmp_path):
    """Two values of D, two training seeds each."""
    paths = []
    for D in (16.0, math.inf):
        for seed in (0, 1):
            path = tmp_path / f"D{D:g}-{seed}.safetensors"
            persistence.save_snapshot(path, tiny_net(label_dim=10, seed=seed), process=processes.PFGMpp(D))
            paths.append(path)
    return paths


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_grid_files_and_resumption(nets, tiny_net, digits, tmp_path, monkeypatch):
    dest = tmp_path / "out"
    command = [*(f"--net={n}" for n in nets), f"--data={digits}", f"--dest={dest}", "--samplings=0,100", *GRID]
    measured = []
    measure = robustness.measure
    monkeypatch.setattr(robustness, "measure", lambda *a, **k: measured.append(a[1]) or measure(*a, **k))
    files = json.loads(run(run_robustness.main, *command).stdout)["files"]
    assert {f.rsplit("/", 1)[1] for f in files} == {
        *(f"robustness-{name}.{kind}" for name in ("alpha", "steps", "bits") for kind in ("csv", "png", "svg")),
        "summary.md", "growth.png", "growth.svg",
    }  # fmt: skip
    # 4 networks x 2 samplings; (0, 3, None) is in all three experiments and measured once.
    assert len(measured) == 4 * 2 * 4 and len(set(measured)) == 4
    rows = {name: read(dest / f"robustness-{name}.csv") for name in ("alpha", "steps", "bits")}
    assert all(len(part) == 4 * 2 * 2 for part in rows.values())
    assert {row["label"] for row in rows["alpha"]} == {"D=16", "D=inf"}
    plain = {(r["net"], r["sampling"]): r["fd"] for r in rows["alpha"] if float(r["value"]) == 0}
    assert plain == {(r["net"], r["sampling"]): r["fd"] for r in rows["steps"] if r["value"] == "3"}
    assert plain == {(r["net"], r["sampling"]): r["fd"] for r in rows["bits"] if r["value"] == "none"}
    assert len(set(plain.values())) == 8

    measured.clear()
    run(run_robustness.main, *command)
    assert not measured and rows["bits"] == read(dest / "robustness-bits.csv")

    # Another file under the same name is another network.
    persistence.save_snapshot(nets[0], tiny_net(label_dim=10, seed=5), process=processes.PFGMpp(16))
    run(run_robustness.main, *command, "--experiments=alpha")
    assert len(measured) == 2 * 2
    fresh = {(r["net"], r["sampling"]): r["fd"] for r in read(dest / "robustness-alpha.csv") if float(r["value"]) == 0}
    assert {key for key in plain if plain[key] != fresh[key]} == {(str(nets[0]), "0"), (str(nets[0]), "100")}


def test_distance_is_that_of_the_images(nets, digits):
    """Fréchet distance of pixels, by hand from the generated images."""
    from training.generation import generate_images

    judge = robustness.Judge("pixel", data=str(digits))
    model = robustness.open_model(str(nets[0]))
    ours = robustness.measure(model, robustness.Setting(steps=2), judge, 0, run_robustness.Grid(num=12))["fd"]
    images = torch.cat([b.images for b in generate_images(str(nets[0]), range(12), class_idx="balanced", num_steps=2)])
    dataset = ImageFolderDataset(str(digits))
    real = np.stack([dataset[i][0] for i in range(len(dataset))])
    x, y = (v.reshape(len(v), -1).astype(float) / 127.5 - 1 for v in (images.numpy(), real))
    a, b = np.cov(x.T), np.cov(y.T)
    # The product of covariances is singular: its root's trace is the sum of the roots of its eigenvalues.
    root = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert ours == pytest.approx(expected, rel=1e-3)


def test_labels(nets):
    assert robustness.open_model(str(nets[0])).label == "D=16"
    assert robustness.open_models([f"ours={nets[2]}"])[0].label == "ours"
    assert math.isinf(robustness.open_model(str(nets[2])).D)
    found = robustness.open_models([f"{nets[0].parent}/D*.safetensors", f"last={nets[3].parent}/Dinf-1*"])
    assert [model.label for model in found] == ["D=16", "D=16", "D=inf", "D=inf", "last"]
    assert [model.path for model in found[:4]] == [str(path) for path in nets]


def test_error_bars_are_over_training_seeds():
    rows = [
        {"label": "a", "net": net, "sampling": s, "value": 0.1, "fd": fd}
        for net, s, fd in [("x", 0, 1.0), ("x", 1, 3.0), ("y", 0, 5.0), ("y", 1, 7.0), ("z", 0, 4.0), ("z", 1, 4.0)]
    ]
    mean, sd, seeds = robustness.summarize(rows)["a"][0.1]
    assert (mean, seeds) == (4.0, 3) and sd == pytest.approx(np.std([2, 6, 4], ddof=1))
    mean, sd, seeds = robustness.summarize(rows[:2])["a"][0.1]
    assert (mean, seeds) == (2.0, 1) and sd == pytest.approx(np.std([1, 3], ddof=1))
    assert "| a | 4.00 ± 2.00 |" in robustness.markdown(rows, "alpha")


def test_growth_is_compared_within_a_training_seed():
    """Seeds differ by tens, labels by a few percent of that: pairing shows it."""
    rows = [
        {
            "label": label,
            "net": f"{label}{seed}",
            "sampling": 0,
            "value": alpha,
            "fd": 10.0 * seed + alpha * (slope + seed / 2),
        }
        for label, slope in (("a", 3.0), ("b", 5.0))
        for seed in range(3)
        for alpha in (0.0, 0.1, 0.2)
    ]
    rows[2]["fd"] += 0.3  # label a, seed 0, alpha 0.2
    found = robustness.forgiveness(rows, "alpha")
    assert found["a"][0.1] == pytest.approx((-0.2, 0))
    difference = np.array([-0.1, -0.4, -0.4])
    interval = scipy.stats.t.interval(0.95, 2, difference.mean(), scipy.stats.sem(difference))
    mean, half = found["a"][0.2]
    assert (mean - half, mean + half) == pytest.approx(interval)
    assert "| a | -0.20 ± 0.00 | -0.30 ± 0.43 |" in robustness.markdown(rows, "alpha")
    assert robustness.forgiveness(rows[:-3], "alpha") == {}  # unequal numbers of trainings


def test_dry_run_counts_the_grid(nets):
    command = [*(f"--net={n}" for n in nets), "--dest=nowhere", "--samplings=0,100", "--dry-run", *GRID]
    assert json.loads(run(run_robustness.main, *command).stdout)["cells"] == 4 * 2 * 4


@pytest.mark.parametrize(
    "options, message",
    [(["--alpha=-1"], "--alpha"), (["--bits=0"], "--bits"), (["--steps=0"], "--steps"), (["--samplings=0,5"], "overlap"),
     (["--experiments=alpha,prune"], "prune"), (["--class=x"], "--class"), ([], "--data")],
)  # fmt: skip
def test_errors_are_one_line(nets, tmp_path, options, message):
    given = [f"--net={nets[0]}", f"--dest={tmp_path}/out", "--num=12"]
    one_line(run_robustness.main, *given, *options, says=message)
    assert not (tmp_path / "out").exists()


# --- the best of many checkpoints -------------------------------------------------------------------------------------


def write_score(folder, checkpoint, sampling, fd, detector="pixel"):
    content = {"tags": {"checkpoint": checkpoint, "sampling": sampling}, "metrics": {detector: {"overall": {"fd": fd}}}}
    (folder / f"{checkpoint}-{sampling}-{detector}.json").write_text(json.dumps(content))


def test_minimum_and_top_three(tmp_path):
    """Each checkpoint counts with the lowest of its blocks; 2.0 and 1.9 of one checkpoint are not two of the top three."""
    for checkpoint, values in {
        "0000100": [2.0, 1.9],
        "0000200": [2.1, 2.3],
        "0000300": [2.5, 2.6],
        "0000400": [3.0],
    }.items():
        for sampling, fd in enumerate(values):
            write_score(tmp_path, checkpoint, str(sampling), fd)
    found = json.loads(run(calculate_metrics.cmdline, "best", f"--scores={tmp_path}/*.json").stdout)
    assert (found["min"], found["min_checkpoint"]) == (1.9, "0000100")
    assert found["top_mean"] == pytest.approx((1.9 + 2.1 + 2.5) / 3)
    assert found["top_checkpoints"] == ["0000100", "0000200", "0000300"]
    assert found["checkpoints"]["0000200"] == {
        "min": 2.1,
        "mean": pytest.approx(2.2),
        "blocks": 2,
        "sd": pytest.approx(0.2 / 2**0.5),
    }


def best(pattern, **options):
    return results.best_of(results.read_scores(pattern, ["checkpoint"]), **options)


def test_best_refuses_what_it_cannot_compare(tmp_path):
    with pytest.raises(ValueError, match="no score files"):
        best(tmp_path / "*.json")
    write_score(tmp_path, "1", "0", 2.0)
    (tmp_path / "2.json").write_text('{"tags": {}, "metrics": {}}')
    with pytest.raises(ValueError, match="--tag checkpoint"):
        best(tmp_path / "*.json")
    with pytest.raises(ValueError, match="no kid"):
        best(tmp_path / "1-*.json", measure="kid")
    two = {"tags": {"checkpoint": "3"}, "metrics": {"a": {"overall": {"fd": 1.0}}, "b": {"overall": {"fd": 5.0}}}}
    (tmp_path / "3.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match="--detector"):
        best(tmp_path / "3.json")
    assert best(tmp_path / "3.json", detector="b")["checkpoints"]["3"] == {"min": 5.0, "mean": 5.0, "blocks": 1}
    with pytest.raises(ValueError, match="no fd of detector b"):
        best(tmp_path / "[13]*.json", detector="b")  # the first file has another detector


def test_best_does_not_mix_detectors(tmp_path):
    """Also where every file holds one alone."""
    write_score(tmp_path, "1", "0", 2.0, "pixel")
    write_score(tmp_path, "2", "0", 1.0, "classifier")
    with pytest.raises(ValueError, match="pixel, classifier: choose one with --detector"):
        best(tmp_path / "*.json")


# --- stable targets ---------------------------------------------------------------------------------------------------


def test_stable_targets_lower_the_variance(digits):
    """The exact posterior-mean denoiser: its loss against stable targets is nearly nothing, against one image it is not."""
    dataset, encoder = ImageFolderDataset(str(digits)), StandardRGBEncoder()
    images, _ = load_arrays(dataset)
    net = Exact(encoder.encode_latents(images))
    rows = stable_targets.loss_statistics(net, processes.PFGMpp(16), dataset, encoder, -0.4, 1.2, 256, 512)
    found = {(row["levels"], row["target"]): row for row in rows}
    image, stable = found["all", "image"], found["all", "stable"]
    assert image["count"] == stable["count"] == 256
    assert stable["mean"] < 0.2 * image["mean"] and stable["variance"] < 0.2 * image["variance"]
    for row in rows:  # its loss is what the target leaves open
        assert row["target_variance"] == pytest.approx(row["mean"], rel=1e-3, abs=1e-6)
    assert sum(row["count"] for key, row in found.items() if key[0] != "all" and key[1] == "image") >= 250


class Exact(torch.nn.Module):
    """Posterior mean over the data under PFGM++ noise with D = 16, unconditional."""

    label_dim, sigma_data = 0, 0.75

    def __init__(self, data):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.exact = PosteriorMean(data, 16.0)

    def forward(self, x, sigma, class_labels=None):
        return self.exact(x, sigma)


def test_latents_are_decoded_by_the_vae_that_is_given(tiny_vae, tmp_path):
    torch.manual_seed(0)
    net = Precond(4, 4, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    persistence.save_snapshot(tmp_path / "net.safetensors", net, encoder=StabilityVAEEncoder("nobody/nothing"))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, [12, 3, 8, 8], dtype=np.uint8)):
        (tmp_path / "images" / f"{i}.png").write_bytes(png_bytes(image))
    command = [f"--net={tmp_path}/net.safetensors", f"--data={tmp_path}/images", f"--dest={tmp_path}/out", *GRID]
    one_line(run_robustness.main, *command, "--experiments=steps", says=["nobody/nothing", "--vae=FOLDER"])
    run(run_robustness.main, *command, "--experiments=steps", f"--vae={tiny_vae[0]}")
    assert [row["value"] for row in read(tmp_path / "out" / "robustness-steps.csv")] == ["2", "3"]


def test_alignment_of_digits(digits, tmp_path):
    """Curves of large D meet over sigma; a noise level of zero is refused before anything is written."""
    command = [f"--data={digits}", "--aug-dims=1e6,inf", "--num=40"]
    written = [f"--dest={tmp_path}/a.csv", f"--figure={tmp_path}/a", "--sigmas=0.5,5"]
    files = json.loads(run(run_alignment.main, *command, *written).stdout)["files"]
    assert [f.rsplit("/", 1)[1] for f in files] == ["a.csv", "a.png", "a.svg"]
    known, forgotten, *gaussian = (float(row["tvd"]) for row in read(tmp_path / "a.csv"))
    assert [known, forgotten] == pytest.approx(gaussian, abs=1e-3) and known > 2 * forgotten
    one_line(run_alignment.main, *command, f"--dest={tmp_path}/b.csv", "--sigmas=0,1", says=["--sigmas=0,1"])
    assert not (tmp_path / "b.csv").exists()


def test_the_toy_notebook(tmp_path):
    """Its discrepancy by scipy's distances; its points have the covariance of the embedding; one row for each D and seed."""
    x, y = np.random.default_rng(0).normal(size=[2, 30, 4])
    squared = scipy.spatial.distance.cdist(np.r_[x, y], np.r_[x, y], "sqeuclidean")
    width = squared.sum() / (60 * 59) / 4
    values = sum(np.exp(-squared / (width * 2**i)) for i in range(5))
    expected = values[:30, :30].mean() + values[30:, 30:].mean() - 2 * values[:30, 30:].mean()
    assert pfgm_toy.discrepancy(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-9)
    embedding = torch.randn(10, 1000, generator=torch.Generator().manual_seed(0))
    points = pfgm_toy.clusters(4000, embedding, torch.Generator().manual_seed(1)).flatten(1).double()
    law = embedding.double().T @ (0.04 * torch.eye(10) + torch.ones(10, 10)).double() @ embedding.double() / 1.04
    assert (points.T @ points / len(points) - law).norm() < 0.02 * law.norm()
    run(run_pfgm_toy.main, "--aug-dims=3,inf", "--seeds=0,1", "--num=8", "--epochs=1", f"--dest={tmp_path}/t.csv")
    rows = read(tmp_path / "t.csv")
    assert [(row["D"], row["seed"]) for row in rows] == [("3", "0"), ("inf", "0"), ("3", "1"), ("inf", "1")]
    assert rows[0]["floor"] == rows[1]["floor"] != rows[2]["floor"] and len({row["mmd"] for row in rows}) == 4
