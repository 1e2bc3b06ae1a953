"""The benchmark of a step runs at any size and prints a table that a machine can read."""

import sys
from pathlib import Path

import pytest
from small_runs import one_line, python, run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step  # noqa: E402

STEP = (step.main, "--device=cpu", "--steps=1", "--warmup=0", "--sampling-steps=1", "--batch=4")


@pytest.mark.parametrize("options, parameters", [(["--preset=digits8"], 181_115)])
def test_a_table_of_the_preset(tmp_path, options, parameters):
    run(*STEP, *options, f"--dest={tmp_path / 'table.md'}")
    text = (tmp_path / "table.md").read_text()
    head, _, row = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = dict(zip(map(str.strip, head), map(str.strip, row), strict=True))
    assert (
        cells["precision"] == "fp32"
        and cells["compiled"] == "no"
        and cells["parameters"] == f"{parameters / 1e6:.2f} M"
    )
    assert float(cells["training step [ms]"]) > 0 and float(cells["sampling [img/s]"]) > 0
    assert "batch 4" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--preset=nothing"], "nothing"),
        (["--precision=fp8"], "--precision=fp8"),
        (["--precision=fp16"], "needs a GPU"),
        (["--compile=maybe"], "--compile=maybe"),
        (["--device=abacus"], "abacus"),
        (["--batch=0"], "must be positive"),
    ],
)
def test_mistakes_are_one_line(options, message):
    one_line(*STEP, *options, says=message)


@pytest.mark.slow
def test_speed_beside_the_published_formulation():
    """Every side in a process of its own."""
    what = "--what=train,outside"
    text = python("benchmarks/speed.py", "--device=cpu", "--cases=8", what, "--repeats=1", "--warmup=0").stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[1] for row in rows] == ["reference", "plain", "ours", "ours"]
    ratios = [float(row[3]) for row in rows]
    assert ratios[0] == 1 and all(0.1 < ratio < 3 for ratio in ratios[1:3]) and 0 < ratios[3] < 1
