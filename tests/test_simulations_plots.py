"""Figures from small result files: they are written, headless, from any folder; missing input is one line."""

import json
from pathlib import Path

import matplotlib.image
import pytest
from small_runs import ROOT, one_line, python, run

from metrics import figures
from simulations import plot_gaussian, run_gaussian
from simulations.gaussian_exact import expected_tv


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = ["--tag=all", "--seeds=1,2", "--K-values=1,2", "--n-values=9,40", "--sim-values=0,0.4", "--D=2"]
    run(run_gaussian.main, *options, f"--results-dir={folder}")
    return folder


def check(files, stem):
    png, svg = (Path(f) for f in files)
    assert (png.name, svg.name) == (f"{stem}.png", f"{stem}.svg")
    assert matplotlib.image.imread(png).std() > 0.05  # not blank
    assert "<svg" in svg.read_text()


@pytest.mark.parametrize("tag", ["K", "n", "sim"])
def test_paper_panels(tag, results, tmp_path):
    check(plot_gaussian.plot_paper_panel(tag, results, tmp_path, dpi=60), f"gaussian_{tag}")


def test_overview(results, tmp_path):
    done = run(plot_gaussian.main, f"--results-dir={results}", f"--figures-dir={tmp_path}", "--dpi=60")
    check(json.loads(done.stdout)["files"], "gaussian")


def test_script_from_another_folder(results, tmp_path):
    script = ROOT / "simulations/plot_gaussian_K.py"
    done = python(script, f"--results-dir={results}", "--figures-dir=f", "--dpi=60", cwd=tmp_path)
    check([tmp_path / f for f in json.loads(done.stdout)["files"]], "gaussian_K")


def test_missing_results(tmp_path):
    one_line(plot_gaussian.main, f"--results-dir={tmp_path}", f"--figures-dir={tmp_path}/f", says="run_")


@pytest.mark.parametrize(
    ("values", "log"),
    [
        (list(range(1, 40)), False),
        ([i / 10 for i in range(11)], False),
        ([50, 200], True),
        ([100, 300, 500, 9000], True),
    ],
)
def test_tick_labels_do_not_touch(values, log):
    fig, axis = figures.figure(width=2.1, height=1.9)
    axis.plot(values, values)
    figures.x_ticks(axis, values, log, share=0.28 if log else 0.13)
    fig.canvas.draw()
    boxes = [t.get_window_extent() for t in axis.get_xticklabels(which="both") if t.get_text()]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    figures.plt.close(fig)


@pytest.mark.parametrize(("D", "values"), [(7, [0.0, 0.1, 0.5, 0.9, 1.0]), (10, [0.0, 0.3, 0.7, 1.0])])
def test_exact_curve_passes_through_the_expectation_of_each_cell(D, values):
    """Also where sim * D is rounded down."""
    place, curve = plot_gaussian._exact("sim", values, {"K": 3, "n": 50, "D": D, "sim": 0.5})
    for value in values:
        assert curve[place.index(value)] == expected_tv(3, 50, D, D - int(value * D + 1e-9))
    assert len(place) == (5 if D == 7 else 11)  # a staircase is not drawn as a slope
