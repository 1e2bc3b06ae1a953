"""What runs on a GPU, at the smallest size on the CPU: every section measures, and the file keeps what it held."""

import os
import re
import sys

from small_runs import ROOT, python

sys.path.insert(0, str(ROOT / "benchmarks"))
from measures import gpu  # noqa: E402


def test_every_section_measures(tmp_path):
    (tmp_path / "results.md").write_text("# Results\n\n| kept |\n")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])"
    command = ["benchmarks/gpu.sh", "--device=cpu", "--tiny", f"--dest={tmp_path}/results.md"]
    python("-c", script, *command, env=environment)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Results\n\n| kept |\n\n## ") and not re.search(
        "failed|not reached|DIFFERENT", text.partition("### K models")[0]
    )
    titles = re.findall(r"^### (.*)$", text, re.M)
    assert len(titles) == 5 and titles[0].startswith("Exactness")
    table = {row[1].strip(): row[2:-1] for row in (line.split("|") for line in text.splitlines() if line[:2] == "| ")}
    assert [float(cell) > 0 for cell in table["digits8 fp32"][:2]] == [
        True,
        True,
    ]  # batch and rate, of the later section
    assert table["gloo: sum, broadcast, barrier of one process"][0].strip() == "identical"
    assert table["weights of a run under torchrun and of a plain one"][0].strip() == "0.0e+00 apart"


def test_what_fails_or_is_not_reached_says_so():
    def measure(x):
        return [1 / x]

    rows = list(gpu.rows_until(gpu.Budget(60), [("a", 1), ("b", 0)], 0, measure, 1))
    assert rows == [["a", 1.0], ["b", "failed: ZeroDivisionError: division by zero"]]
    assert list(gpu.rows_until(gpu.Budget(1), [("a", 1)], 30, measure, 2)) == [["a", "not reached: no time left", "-"]]
