"""The benchmark of a step runs at any size and prints a table that a machine can read."""

import sys
from pathlib import Path

import pytest
from small_runs import one_line, run

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
