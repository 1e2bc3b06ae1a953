"""What `pip install .` gives: the commands of the wheel from any folder, their help without torch, completion by the shell."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from small_runs import ROOT

# Calls the entry point of a command in an unpacked wheel: SITE NAME MODULE:FUNCTION WORDS. None of it comes from elsewhere.
CHILD = """
import importlib, sys
site, name, (module, function), *words = sys.argv[1], sys.argv[2], sys.argv[3].split(":"), *sys.argv[4:]
sys.path.insert(0, site)
for heavy in ("torch", "scipy", "matplotlib"):
    sys.modules[heavy] = None  # importing it fails
try:
    getattr(importlib.import_module(module), function).main(words, prog_name=name)
finally:
    ours = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ("dnnlib", "training", "metrics", module)]
    assert all(file is None or file.startswith(site) for file in ours), ours
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder of the unpacked wheel, {command: entry point})."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".md") or path.name == "LICENSE":
            shutil.copy(path, source)
        elif path.name in ("dnnlib", "torch_utils", "training", "metrics", "simulations", "experiments"):
            ignored = shutil.ignore_patterns("__pycache__", "results", "figures")
            shutil.copytree(path, source / path.name, ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(source.glob("dist/*.whl"))) as wheel:
        wheel.extractall(site)
    entries = configparser.ConfigParser()
    entries.read(next(site.glob("*.dist-info/entry_points.txt")))
    return site, dict(entries["console_scripts"])


def call(installed, cwd, name, *words, **environment):
    site, entries = installed
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment}
    command = [sys.executable, "-c", CHILD, str(site), name, entries[name], *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_is_a_command(installed, tmp_path):
    entries = installed[1]
    assert {entry.partition(":")[0] for entry in entries.values()} == {p.stem for p in ROOT.glob("*.py")}
    for name in entries:
        assert call(installed, tmp_path, name, "--help").startswith(f"Usage: {name} [OPTIONS]")


def test_experiments_are_found_from_any_folder(installed, tmp_path):
    for file in ("experiments/quickstart.yaml", "quickstart.yaml"):
        assert "train-multi-seed0" in call(installed, tmp_path, "msd-experiment", file, "--list")
    assert "--set source=" not in json.dumps(call(installed, tmp_path, "msd-plan", "--help"))
    assert (installed[0] / "experiments" / "plan.yaml").is_file()


def test_the_shell_completes(installed, tmp_path):
    said = lambda *words: call(
        installed, tmp_path, "msd-train", _MSD_TRAIN_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(["msd-train", *words]), COMP_CWORD=str(len(words)),
    )  # fmt: skip
    assert "plain,--loss\n" in said("--lo") and said("--loss", "edm").split() == ["plain,edm2", "plain,edm"]
    assert "complete " in call(installed, tmp_path, "msd-train", _MSD_TRAIN_COMPLETE="bash_source")
