"""Curves of runs: every quantity in its panel, at the right place, readable ticks, runs told apart without colour."""

import json
import re

import pytest
from small_runs import one_line, run

from metrics import curves
from simulations import plot_run

LEVELS = ("0.05", "0.4", "3.2")


def lines_of(best=3, start=1.0):
    """Five status lines; the validation loss is lowest at `best`; losses at level s are start + s."""
    return [
        {"Progress/kimg": float(k), "Timing/total_sec": 60.0 * k, "Timing/sec_per_kimg": 4.0, "Loss/loss": start / (k + 1),
         "Loss/validation": start + abs(k - best), "Loss/learning_rate": 0.01,
         **{f"Loss/validation_sigma{s}": start + float(s) + 10 * (k != best) for s in LEVELS},
         **{f"Loss/validation_source{s}": start + s for s in (0, 1)}, "Process/Q01": 0.1 * k, "Process/D11": 1.0}
        for k in range(5)
    ]  # fmt: skip


def write(folder, lines, scores=()):
    folder.mkdir()
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scores:
        (folder / "metrics").mkdir()
        rows = [
            {"kimg": kimg, "ema": ema, "metrics": {"pixel": {"overall": {"fd": fd, "kid": None}}}}
            for kimg, ema, fd in scores
        ]
        (folder / "metrics" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(axis):
    return {line.get_label(): [*map(tuple, line.get_xydata())] for line in axis.get_lines()}


def test_a_run_is_drawn_whole(tmp_path):
    folder = write(tmp_path / "a", lines_of(), [(2, "0.05", 9.0), (2, "0.10", 8.0), (4, "0.05", 7.5), (4, "0.05", 7.0)])
    runs = {"a": curves.read_run(folder)}
    axes = {axis.get_title(): axis for axis in curves.draw(runs).axes if axis.get_title()}
    assert list(axes) == [
        "training loss", "validation loss", "validation loss by noise level σ", "validation loss by source",
        "learning rate", "throughput (images/s)", "learned Q", "learned D", "fd_pixel by average",
    ]  # fmt: skip
    assert drawn(axes["training loss"]) == {"a": [(k, 1 / (k + 1)) for k in range(5)]}
    assert drawn(axes["throughput (images/s)"]) == {"a": [(k, 250.0) for k in range(5)]}
    by_level = drawn(axes["validation loss by noise level σ"])
    assert list(by_level) == list(LEVELS) and by_level["3.2"][3] == (3, 4.2) and by_level["3.2"][0] == (0, 14.2)
    assert drawn(axes["learned Q"]) == {"01": [(k, 0.1 * k) for k in range(5)]}
    scores = drawn(axes["fd_pixel by average"])
    assert scores == {"0.05": [(2, 9.0), (4, 7.0)], "0.10": [(2, 8.0)]}  # the lowest of the blocks
    in_time = curves.draw(runs, [key for key in runs["a"][-1] if key.endswith("/0.05")], ["time"]).axes[0]
    assert drawn(in_time) == {"a": [(120.0, 9.0), (240.0, 7.0)]}  # when the run had seen as many images


def test_several_runs_at_their_lowest_loss():
    """Levels and sources are an axis; runs differ in colour and in line and marker; those of one label look alike."""
    runs = {"a": lines_of(3, 1.0), "b": lines_of(1, 2.0)}
    axes = {axis.get_title(): axis for axis in curves.draw(runs).axes}
    levels = axes["lowest validation loss by noise level σ"]
    assert drawn(levels) == {
        name: [(float(s), start + float(s)) for s in LEVELS] for name, start in (("a", 1), ("b", 2))
    }
    sources = drawn(axes["lowest validation loss by source"])
    assert [[y for _, y in sources[name]] for name in "ab"] == [[1, 2], [2, 3]] and sources["a"] != sources["b"]
    look = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in levels.get_lines()}
    assert all(len(set(parts)) == 2 for parts in zip(*look, strict=True))
    fig, axis = curves_figure()
    curves.draw_panel(axis, curves.panels(runs, ["Loss/loss"])[0], runs, labels={"a": "arm", "b": "arm"})
    first, second = axis.get_lines()
    assert first.get_color() == second.get_color() and len(axis.get_legend_handles_labels()[1]) == 1
    assert curves.describe(runs, curves.panels(runs)[0], {"a": "arm", "b": "arm"}).endswith("0.2 to 0.4 (arm)")


def curves_figure():
    from metrics import figures

    return figures.figure()


@pytest.mark.parametrize("top", [1.2, 30.0])
def test_ticks_are_plain_numbers(top):
    """At least two of them, none with a power of ten; a range of less than four is linear."""
    runs = {"a": [{"Progress/kimg": k, "Loss/loss": y} for k, y in enumerate((top, 1.0, 1.1))]}
    figure = curves.draw(runs)
    figure.canvas.draw()
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    shown = [t.get_text() for t, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True) if low <= y <= high]
    assert len(shown) >= 2 and all(re.fullmatch(r"[\d.]+", text) for text in shown), shown
    assert axis.get_yscale() == ("log" if top > 4 else "linear")


def test_the_command(tmp_path):
    for name in "ab":
        write(tmp_path / name, lines_of())
    run(plot_run.main, tmp_path / "a", tmp_path / "b", f"--save={tmp_path / 'x.png'}", "--x=images,time")
    assert (tmp_path / "x.png").is_file() and "<svg" in (tmp_path / "x.svg").read_text()
    one_line(
        plot_run.main,
        tmp_path / "a",
        "--keys=Loss/los",
        f"--save={tmp_path / 'y'}",
        says=["--keys=Loss/los", "Loss/loss"],
    )
    one_line(plot_run.main, write(tmp_path / "c", [{"z": 1}]), f"--save={tmp_path / 'y'}", says=["--keys", "z"])
    write(tmp_path / "d", lines_of(), [(2, "0.05", 9.0)])
    (tmp_path / "d" / "metrics" / "metrics.jsonl").write_text('{"kimg": 1}\n')
    one_line(plot_run.main, tmp_path / "d", f"--save={tmp_path / 'y'}", says="metrics.jsonl")
