"""The comparison of processes and solvers: laws against samples, the commands a user types, tables and differences."""

import json
import math

import pytest
import scipy.stats
from small_runs import one_line, run

from metrics.classifier import train_classifier
from simulations import run_solvers
from simulations.studies import solvers, solvers_report
from torch_utils.persistence import save_snapshot
from training import processes
from training.dataset import ImageFolderDataset, load_arrays
from training.encoders import StandardRGBEncoder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_exact_law_of_the_solvers():
    """Errors fall with the number of evaluations, and SSCS beats Euler-Maruyama at 20 and 50 on both grids (CLD §5)."""
    for grid in ("uniform", "quadratic"):
        em = [solvers.exact_error(("CLD EM", grid, nfe)) for nfe in (20, 50)]
        sscs = [solvers.exact_error(("CLD SSCS", grid, nfe)) for nfe in (20, 50)]
        assert sscs[0] < 0.6 * em[0] and sscs[1] < em[1] < em[0]
    assert solvers.exact_error(("EDM Heun", "sigma", 99)) < 0.01
    cell = ("CLD EM", "quadratic", 10)  # an independent law: samples of the same arm
    x, nfe = solvers.sample(solvers.Affine(), cell, (20000, 1, 1, 1), seed=0)
    law = math.hypot(float(x.mean()) - 0.3, float(x.std()) - 0.5)
    assert abs(law - solvers.exact_error(cell)) < 4 * 0.5 / 20000**0.5 and nfe == 10


@pytest.mark.parametrize("cell", solvers.cells((9,), grids=("quadratic",)))
def test_no_arm_spends_more_than_it_was_given(cell):
    x, nfe = solvers.sample(solvers.Affine(), cell, (8, 1, 1, 1), seed=0)
    assert x.shape == (8, 1, 1, 1) and x.isfinite().all()
    assert (nfe > 9) if cell[1] == "adaptive" else (8 <= nfe <= 9)


def test_points(tmp_path):
    run(run_solvers.main, "gaussian", "--nfe=4", "--arms=EDM Heun,CLD flow", f"--dest={tmp_path}")
    run(
        run_solvers.main,
        "mixture",
        "--nfe=4",
        "--seeds=0-1",
        "--num=64",
        "--grids=uniform",
        "--arms=VP EM,CLD RK45",
        f"--dest={tmp_path}",
    )
    assert len(read(tmp_path, "gaussian")) == 1 + 3
    one_line(run_solvers.main, "mixture", "--grids=log", f"--dest={tmp_path}", says="--grids: 'log' is unknown")
    one_line(run_solvers.main, "gaussian", "--nfe=10,2", f"--dest={tmp_path}", says="--nfe=2: give at least 3")
    rows = read(tmp_path, "mixture")
    assert {(r["arm"], r["grid"]) for r in rows} == {("data", ""), ("VP EM", "uniform"), ("CLD RK45", "adaptive")}
    text = solvers_report.plot_solvers(tmp_path, tmp_path / "figure")
    assert "| VP EM | uniform |" in text and "CLD RK45: " in text and (tmp_path / "figure.png").stat().st_size > 10_000


def test_images(tmp_path, tiny_net, digits):
    images, labels = load_arrays(ImageFolderDataset(digits))
    train_classifier(images, labels.argmax(1), epochs=1, width=4, features=4).save(tmp_path / "judge.safetensors")
    net, learned = tmp_path / "net.safetensors", tmp_path / "learned.safetensors"
    save_snapshot(net, tiny_net(), encoder=StandardRGBEncoder(), process=None)
    process = processes.get("learned", V=2)
    save_snapshot(learned, tiny_net(), process=process)
    common = [f"--net={net}", f"--data={digits}", f"--dest={tmp_path}", f"--learned={learned}"]
    command = [
        "digits",
        *common,
        f"--detector={tmp_path}/judge.safetensors",
        "--nfe=3",
        "--grids=uniform",
        "--per-source=8",
    ]
    run(run_solvers.main, *command, "--seeds=0-0", "--arms=EDM Heun,learned EM")
    first = read(tmp_path, "digits")
    assert len(first) == 6 and all(math.isfinite(row["error"]) for row in first)
    run(run_solvers.main, *command, "--seeds=0-1", "--arms=EDM Heun,learned EM")
    rows = read(tmp_path, "digits")
    assert rows[:6] == first and len(rows) == 12 and {row["seed"] for row in rows} == {0, 1}
    one_line(run_solvers.main, *command, "--per-source=9", says="--per-source=9")
    one_line(run_solvers.main, *command, "--arms=DDIM", says="--arms")
    one_line(run_solvers.main, *command, f"--learned={net}", says="--learned")

    run(run_solvers.main, "bound", *common, "--num=4", "--samples=1")
    bits = read(tmp_path, "bound")
    by = {(row["draws"], row["process"], row["image"]): row["bits"] for row in bits}
    assert len({row["process"] for row in bits}) == 5 and len(by) == 2 * 5 * 4
    assert by["common", "learned", 0] == pytest.approx(by["common", "VP", 0], abs=1e-9)
    assert by["own", "learned", 0] != pytest.approx(by["own", "VP", 0], abs=1e-4)

    for seed in (0, 1):  # folders of seeds come before what lies beside them
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}/digits.json").write_text(json.dumps([row for row in rows if row["seed"] == seed]))
    draw = ["plot", f"--dest={tmp_path}", f"--figure={tmp_path}/figure", f"--tables={tmp_path}/tables.md"]
    (tmp_path / "digits.json").unlink()
    run(run_solvers.main, *draw)
    alone = (tmp_path / "tables.md").read_text()
    (tmp_path / "digits.json").write_text(json.dumps([{**row, "error": 2 * row["error"]} for row in rows]))
    run(run_solvers.main, *draw)
    assert (tmp_path / "tables.md").read_text() == alone
    text = (tmp_path / "tables.md").read_text()
    assert "| less EDM Heun |" in text and "less VP, own draws" in text
    assert (tmp_path / "figure-sources.png").is_file()


def test_differences_against_the_written_out_ones():
    def row(arm, nfe, seed, error, source=0):
        return dict(arm=arm, grid="g", nfe=nfe, seed=seed, error=error, source=source)

    rows = [row("EDM Heun", 10, s, 99.0) for s in (0, 1, 2)] + [row("EDM Heun", 20, s, 1.0 + s) for s in (0, 1, 2)]
    rows += [row("VP EM", 20, s, 4.0 + s**2) for s in (2, 1, 0)] + [row("CLD EM", 20, 0, 3.0)]
    found = solvers.differences(rows)
    mean, error, low, high, p = found["VP EM", "g", 0]
    test = scipy.stats.ttest_rel([4.0, 5.0, 8.0], [1.0, 2.0, 3.0])  # by seed, in whatever order the rows come
    assert (low, high) == pytest.approx(tuple(test.confidence_interval(0.95))) and p == pytest.approx(test.pvalue)
    assert list(found) == [("VP EM", "g", 0)]  # one seed has no error
    assert mean == pytest.approx(11 / 3) and error == pytest.approx(mean / test.statistic)
