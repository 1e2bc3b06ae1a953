"""What figures show, by their own geometry: intervals that are named, none of one seed, nothing cut, no text on another."""

import itertools
import math
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.path import Path as Outline
from matplotlib.text import Text

from metrics import figures, report, report_arms, report_cells, report_sweep, snapshots, table
from metrics.results import Row
from simulations import plot_gaussian, sweeps
from simulations.studies import alignment, robustness, solvers, solvers_report
from simulations.tree import sweep as tree_sweep

STEM = Path("unused")


def noise(*where):
    return np.random.default_rng(zlib.crc32(repr(where).encode())).normal(0, 0.05)


def draw_report(seeds, measure="fd", floor=True):
    """Two arms on three sources, with a floor."""
    cells = defaultdict(table.Cell)
    for arm, source, seed in itertools.product(("multi", "single"), "012", range(seeds)):
        level = 8 + 2 * (arm == "single") + int(source) + noise(arm, source, seed) + 0.2 * seed
        found = {"fd": level, "fd_se": 0.5, "denoising_loss": level / 20}
        found |= {"fd_at_floor_size": level + 3, "fd_floor": 6.0 + int(source)} if floor else {}
        for name, value in found.items():
            cells[arm, source, name].values[str(seed), "0"] = value
    titles = {"0": "tabby cat", "1": "golden retriever", "2": "volcano", "mean": "mean"}
    images = [np.full((1, 8, 8), 60 * i, np.uint8) for i in range(4)]
    strips = {(title, s): images for title in ("real", "multi", "single") for s in "012"}
    verdict = table.verdict(cells, ["0", "1", "2"], column=measure)
    report.figure(STEM, cells, ("multi", "single"), titles, strips, (measure, verdict))


def draw_arms(seeds):
    arms = {f"classifier-free {i}": {} for i in range(5)}
    for (i, columns), name in itertools.product(enumerate(arms.values()), report_arms.SHOWN):
        columns[name] = {str(seed): i + noise(name, seed, i) + 0.1 * seed for seed in range(seeds)}
    report_arms.figure(STEM, arms)


def draw_sweep(seeds):
    x = np.array([0.02, 0.05, 0.08, 0.12, 0.2])
    best = [0.06 + 0.01 * seed for seed in range(seeds)]
    y = np.array([0.4 + 0.05 * np.log(x / b) ** 2 for b in best])
    report_sweep.figure(STEM, {"a": report_sweep.Curve(x, y, [*map(str, range(seeds))])}, "ema", "denoising_loss")


def draw_cells(seeds):
    rows = []
    for arm, source, seed in itertools.product(("single", "multi"), ("171", "182", "198"), range(seeds)):
        tags = {"arm": arm, "seed": str(seed), "sampling": "0", "source": source, "sim": "sim3", "n": "500"}
        tags["k"] = "3" if arm == "multi" else "1"
        numbers = {"fd": 30 + (arm == "single") + seed * 0.1 + noise(arm, source, seed)}
        about = {"title": source, "images": None}
        rows.append(make_row("fid", source, tags, numbers, f"{arm}{source}{seed}", about))
    report_cells.figure(STEM, report_cells.find(rows)[0])


def make_row(detector, section, tags, numbers, file, about):
    known = {"detector": detector, "section": section, "tags": tags, "numbers": numbers, "file": file, **about}
    return Row(**{name: known[name] for name in Row.__dataclass_fields__ if name in known})


def results_of_sweep(tag, seeds, values, D=10):
    error = lambda value: 0.03 + 0.001 * value / max(values)
    rows = []
    for value in values:
        row = {tag: value, "seeds": seeds, "runs": seeds, "K": 3, "n": 100, "D": D, "sim": 0.5} | {tag: value}
        row |= {"measured ratio": 0.9, "predicted ratio": 0.6, "published ratio": 0.8, "TV of histogram": 0.2}
        for side, level in (("single", 0.06), ("multi", 0.05)):
            row |= {f"TV of {side}": level, f"published TV of {side}": level * 2, f"empirical TV of {side}": level}
            row |= {f"standard error of {name}": error(value) for name in (side, f"empirical {side}", "advantage")}
        rows.append(row)
    return rows


VALUES = {"K": [1, 3, 5, 7, 10], "n": [1000, 3000, 5000, 10000, 30000], "D": [10, 12, 14, 16, 18], "sim": [0, 0.5, 1]}


def draw_theory(seeds, monkeypatch):
    monkeypatch.setattr(sweeps, "read_results", lambda folder, tag: results_of_sweep(tag, seeds, VALUES[tag]))
    sweeps.plot([*VALUES], "unused", STEM)


def draw_gaussian(seeds, monkeypatch):
    monkeypatch.setattr(plot_gaussian, "read_results", lambda folder, tag: results_of_sweep(tag, seeds, VALUES[tag]))
    plot_gaussian.plot_overview(STEM, STEM)


def solver_rows(seeds):
    """A row per arm of the study, grid, budget, seed and source; Euler-Maruyama on the learned process diverges."""
    rows = []
    for (arm, grid, budget), seed, source in itertools.product(solvers.cells([10, 20, 50]), range(seeds), (0, 1)):
        nfe = 90 if grid == "adaptive" else budget
        worse = 1e5 if arm == "learned EM" else 1
        error = worse * (10 / nfe + 0.02 * seed + noise(arm, grid, seed) ** 2)
        rows.append(solvers.row((arm, grid, budget), nfe, seed, error, source=source))
    return rows


def draw_solvers(seeds):
    curves = solvers_report.curves_of(solver_rows(seeds))
    solvers_report.draw(dict.fromkeys(solvers_report.TITLES, curves), STEM)


def draw_differences(seeds):
    solvers_report.draw_differences(solvers.differences(solver_rows(seeds)), STEM)


def draw_tree(seeds, monkeypatch):
    def history(run):
        arm, seed = run.name.rsplit("-seed", 1)
        level, kimg = 0.3 + 0.01 * int(seed) + noise(arm) / 10, 10.0
        if arm != "baseline":  # fewer samples, lower loss: down on the left
            level, kimg = level / 2, 3.0
        return [
            {"Progress/kimg": kimg * i, "Timing/cpu_sec": 2.0 * i, "Validation/ema_loss": level / i**0.5}
            for i in range(1, 9)
        ]

    monkeypatch.setattr(tree_sweep, "history", history)
    rows = [
        {"comparison": kind, "arm": arm, "seed": seed}
        | {name: 0.5 + 0.02 * seed + noise(kind, arm) for name in tree_sweep.COLUMNS}
        for kind, arm, seed in itertools.product(tree_sweep.COMPARISONS, tree_sweep.ARMS, range(seeds))
    ]
    tree_sweep.plot(rows, list(tree_sweep.ARMS), list(range(seeds)), STEM, STEM)


def draw_robustness(seeds):
    rows = [
        {
            "label": f"D={D}",
            "net": f"{D}-{seed}",
            "sampling": s,
            "value": value,
            "fd": 20 + 60 * value + seed * (1 + value * noise(D)) + noise(D, s),
        }
        for D, seed, s, value in itertools.product((16, 128, 2048), range(seeds), (0, 1), (0, 0.1, 0.2))
    ]
    robustness.plot(rows, "alpha", STEM)


def draw_alignment(seeds):
    rows = [
        {"D": D, "sigma": sigma, "tvd": 1 / (1 + sigma), "error": 0.01}
        for D, sigma in itertools.product(("16", "256", "inf"), (0.1, 1, 10))
    ]
    alignment.plot(rows, STEM)


OVER_SEEDS = [draw_report, draw_arms, draw_sweep, draw_cells, draw_theory]
OVER_SEEDS += [draw_gaussian, draw_solvers, draw_tree, draw_robustness]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are when they are saved, by the function that draws them."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda fig, stem, dpi=200: kept.append(fig) or [])

    def make(draw, *arguments):
        draw(
            *arguments,
            *([monkeypatch] if "monkeypatch" in draw.__code__.co_varnames[: draw.__code__.co_argcount] else []),
        )
        kept[-1].canvas.draw()
        return kept[-1]

    yield make
    for fig in kept:
        figures.plt.close(fig)


def bars(fig):
    """(axis, container, its ends [N, 2, 2] in data units) of all error bars that have an end."""
    for axis in fig.axes:
        for container in axis.containers:
            if isinstance(container, ErrorbarContainer):
                segments = np.array([s for lines in container[2] for s in lines.get_segments() if len(s)])
                if np.isfinite(segments).all(axis=(1, 2)).any():
                    yield axis, segments[np.isfinite(segments).all(axis=(1, 2))]


def bands(fig):
    return [drawn for axis in fig.axes for drawn in axis.collections if drawn.get_label() == figures.BAND]


def shown_texts(fig):
    """Text that a reader sees: of ticks, those within their axis."""
    hidden = set()
    for axis in fig.axes:
        for ticks, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            for tick in [*ticks.get_major_ticks(), *ticks.get_minor_ticks()]:
                inside = min(limits) <= tick.get_loc() <= max(limits)
                hidden |= {label for label in (tick.label1, tick.label2) if not (inside and label.get_visible())}
    found = fig.findobj(Text)
    return [text for text in found if text.get_text().strip() and text.get_visible() and text not in hidden]


def outline(text):
    """The corners of a text's rectangle, slanted as it is."""
    box, angle = text.get_window_extent(), math.radians(text.get_rotation())
    if angle % (math.pi / 2) < 1e-6:
        width, height, angle = box.width, box.height, 0.0
    else:
        width, height = np.linalg.solve(
            [[math.cos(angle), math.sin(angle)], [math.sin(angle), math.cos(angle)]], box.size
        )
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) / 2 * (np.array([width, height]) - 1)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return Outline(corners @ turn + [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])


def touching(fig):
    places = [(text.get_text(), outline(text)) for text in shown_texts(fig)]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(places, 2) if one.intersects_path(two)]


def words(fig):
    return " ".join(text.get_text() for text in shown_texts(fig))


@pytest.mark.parametrize("draw", [*OVER_SEEDS, draw_differences, draw_alignment])
def test_intervals_are_named_and_whole_and_texts_apart(draw, drawn):
    fig = drawn(draw, 3)
    assert list(bars(fig)) or bands(fig)
    assert "95 %" in words(fig)
    assert touching(fig) == []
    for axis, ends in bars(fig):
        assert (np.ptp(ends, axis=1).max(axis=1) > 0).all(), "a bar without length"
        for i, scale, limits in ((0, axis.get_xscale(), axis.get_xlim()), (1, axis.get_yscale(), axis.get_ylim())):
            seen = ends[..., i] if scale != "log" else ends[..., i][ends[..., i] > 0]  # what is below 0 has no place
            assert seen.min() >= min(limits) and seen.max() <= max(limits), "a bar is cut"


@pytest.mark.parametrize("draw", OVER_SEEDS)
def test_one_seed_has_no_interval(draw, drawn):
    fig = drawn(draw, 1)
    assert list(bars(fig)) == [] and bands(fig) == [] and "95 %" not in words(fig) and "nan" not in words(fig)
    assert touching(fig) == []


def draw_snapshots(blocks):
    """Two averages at four times, several blocks of seeds each."""
    rows = []
    for ema, kimg, block in itertools.product(("0.050", "0.100"), (1000, 2000, 4000, 8000), range(blocks)):
        overall = {"fd": 30 - kimg / 500 + block + 5 * float(ema), "kid": 0.1}
        rows.append({"kimg": kimg, "ema": ema, "metrics": {"pixel": {"overall": overall}}})
    snapshots.curve(rows, STEM)


def test_a_band_over_blocks_is_named(drawn):
    """Line at the lowest block, band up to the highest; of one block, and of equal ones, there is no band."""
    fig = drawn(draw_snapshots, 3)
    assert "line: lowest block of seeds; band: up to the highest" in words(fig) and "95 %" not in words(fig)
    assert touching(fig) == []
    first, second = ([c for c in axis.collections if c.get_label() == figures.RANGE] for axis in fig.axes)
    assert len(first) == 2 and second == []
    lowest = fig.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(lowest, [28.25, 26.25, 22.25, 14.25])
    corners = first[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (lowest.min(), lowest.max() + 2)
    assert "band" not in words(drawn(draw_snapshots, 1))


LINES = [draw_snapshots, draw_sweep, draw_theory, draw_solvers, draw_tree, draw_robustness, draw_alignment]


@pytest.mark.parametrize("draw", LINES)
def test_lines_differ_without_colour(draw, drawn):
    """Of the lines with an entry in a legend no two have marker, its filling and line style in common."""
    lines = {}
    for line in (line for axis in drawn(draw, 3).axes for line in axis.get_lines()):
        container = next((c for c in line.axes.containers if isinstance(c, ErrorbarContainer) and c[0] is line), line)
        if not str(label := container.get_label()).startswith("_"):
            filled = line.get_markerfacecolor() != "white"
            lines[label] = line.get_marker(), filled, line.get_linestyle(), tuple(line._dash_pattern[1] or ())
    assert len(lines) > 1 and len(set(lines.values())) == len(lines), lines


def test_a_distance_stands_beside_the_floor_of_its_size(drawn):
    axis = drawn(draw_report, 3).axes[1]
    (floor,) = [c for c in axis.collections if "floor" in str(c.get_label())]
    np.testing.assert_allclose([s[0, 1] for s in floor.get_segments()], [6, 7, 8, 7])
    lowest = [c[0].get_ydata()[0] for c in axis.containers if isinstance(c, ErrorbarContainer)]
    assert lowest[0] > 10.5 and "at the floor's size" in axis.get_ylabel()  # 8 at full size, 11 at the floor's
    for arguments in ((3, "denoising_loss"), (3, "fd", False)):
        axis = drawn(draw_report, *arguments).axes[1]
        assert not any("floor" in str(c.get_label()) for c in axis.collections) and "floor" not in axis.get_ylabel()


def test_small_multiples_are_complete(drawn):
    fig = drawn(draw_solvers, 1)
    assert len(fig.axes) == 3 * 5 and [a.get_title() for a in fig.axes[:5]] == ["EDM", "VP", "CLD", "MALDA", "learned"]
    assert all(a.lines for a in fig.axes) and "beyond the axis" in words(fig)
    cld = set(fig.axes[2].get_legend_handles_labels()[1]) - {"EDM Heun, to compare"}
    assert cld == {f"{s}, {g} grid" for s in ("EM", "SSCS", "flow") for g in ("uniform", "quadratic")} | {"RK45"}
    fig = drawn(draw_tree, 1)
    others = len(tree_sweep.ARMS) - 1
    titles = [axis.get_title() for axis in fig.axes]
    assert titles[:others] == ["random", "JEST", "AJEST", "early AJEST", "late AJEST", "diverse", "iAJEST"]
    assert titles[2 * others :] == ["equal steps", "equal trained samples", "equal CPU time"] * 2
    assert all(len(axis.lines) >= 2 for axis in fig.axes[: 2 * others])  # the arm, and the baseline behind it
    for axis in (axis for axis in fig.axes if axis.get_legend()):
        inside = axis.get_legend().get_window_extent().contains
        points = [p for line in axis.get_lines() for p in axis.transData.transform(line.get_xydata())]
        assert not any(inside(*point) for point in points), "a legend hides a point"
