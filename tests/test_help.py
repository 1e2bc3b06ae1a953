"""One voice of --help: headings, bounds and defaults in one form; lists of choices; one word for one thing, old words too."""

import re

import click
import pytest
from small_runs import ROOT, one_line, run
from test_commands import command_of
from test_plugin import PLUGIN, TABLES

FILES = [str(p.relative_to(ROOT)) for pattern in ("*.py", "simulations/run_*.py") for p in sorted(ROOT.glob(pattern))]


def leaves(file):
    """(words before the options, command) of every sub-command of a script, or of the script."""
    command = command_of(file)
    found = getattr(command, "commands", None)
    return [([name], leaf) for name, leaf in found.items()] if found else [([], command)]


LEAVES = [(file, words, leaf) for file in FILES for words, leaf in leaves(file)]
NAMES = [" ".join([file, *words]) for file, words, _ in LEAVES]


@pytest.mark.parametrize("file, words, leaf", LEAVES, ids=NAMES)
def test_one_voice(file, words, leaf):
    text = run(command_of(file), *words, "--help").stdout
    options = re.split(r"\n(?=\S[^\n]*:\n  -)", text)[1:]
    flat = " ".join(text.split())
    assert "None" not in re.findall(r"\[[^]]*\]", flat) and " RANGE" not in text and "<=None" not in text
    assert all(
        flat[: m.start()].rfind("[") > flat[: m.start()].rfind("]") for m in re.finditer(r"\bdefault: ", flat)
    ), flat
    assert options[-1].startswith("Options:") and "--config" in options[-1]
    count = sum(isinstance(p, click.Option) for p in leaf.params)
    assert len(options) > 1 or count <= 26, f"{count} options in one list"


@pytest.mark.parametrize(
    "file, words, flag, names",
    [
        ("train_edm2.py", [], "presets", ["digits8", "small32", "edm2-img512-xs"]),
        ("train_edm2.py", [], "processes", ["edm", "cld", "learned"]),
        ("train_edm2.py", [], "selections", ["jest", "random"]),
        ("generate_images.py", [], "presets", ["edm2-img512-s-guid-fid"]),
        ("generate_images.py", [], "solvers", ["heun", "sscs"]),
        ("calculate_metrics.py", ["gen"], "detectors", ["pixel", "fid"]),
        ("calculate_metrics.py", ["gen"], "solvers", ["heun", "sscs"]),
        ("calculate_metrics.py", ["ref"], "detectors", ["pixel", "classifier"]),
    ],
)
def test_lists(file, words, flag, names, tmp_path):
    """Without what is required; those of a plugin are among them, wherever it stands."""
    plugin = tmp_path / "own.py"
    plugin.write_text(PLUGIN)
    before = [dict(table) for table in TABLES]
    own = {"processes": "uniform", "selections": "first", "solvers": "still", "detectors": "mean"}
    try:
        lines = run(command_of(file), *words, f"--list-{flag}", f"--plugin={plugin}").stdout.splitlines()
    finally:
        for table, entries in zip(TABLES, before, strict=True):
            for name in set(table) - set(entries):
                del table[name]
    found = {line.split()[0]: line for line in lines if line.strip()}
    assert {*names, own.get(flag, names[0])} <= set(found)
    assert flag == "presets" or all(len(found[name].split()) > 3 for name in names), "says what they are"


def test_suggestions():
    generate = ["--net=x", "--outdir=x"]
    one_line(command_of("generate_images.py"), *generate, "--time-grid=uniforn", says="did you mean uniform?")
    loss = ["likelihood", "--net=x", "--data=y", "--method=obe"]
    one_line(command_of("calculate_metrics.py"), *loss, says=["--method", "did you mean", "ode", "elbo"])
    sampling = ["generate_images.py", "--preset=edm2-img512-s-autog-dyno", "--outdir=x"]
    one_line(command_of(sampling[0]), *sampling[1:], says=["did you mean edm2-img512-s-autog-dino", "--list-presets"])


OLDER = [
    ("run_experiment.py", [], "--outdir", "--out"),
    ("plan.py", [], "--outdir", "--dest"),
    ("simulations/run_gaussian.py", [], "--outdir", "--results_dir"),
    ("simulations/run_robustness.py", [], "--outdir", "--dest"),
    ("simulations/run_bounds.py", [], "--dest", "--out"),
    ("simulations/run_tree.py", ["plot"], "--figure", "--save"),
    ("simulations/run_tree.py", ["train"], "--train-steps", "--total-iter"),
    ("simulations/run_toy.py", ["train"], "--train-steps", "--steps"),
    ("calculate_metrics.py", ["gen"], "--num", "--num-images"),
    ("train_edm2.py", [], "--channels", "--cbase"),
]


@pytest.mark.parametrize("file, words, name, older", OLDER, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_older_names_work_and_are_not_shown(file, words, name, older):
    leaf = {" ".join(w): leaf for w, leaf in leaves(file)}[" ".join(words)]
    (param,) = (p for p in leaf.params if name in p.opts)
    assert older in param.opts
    text = run(command_of(file), *words, "--help").stdout
    assert re.search(rf"^  {name}\b", text, re.M) and not re.search(
        rf"{older}(?![\w-])", text.partition("Examples:")[0]
    )


def test_outputs_have_one_word():
    """A folder that is written is --outdir, one file --dest, a figure --figure; not in commands published otherwise."""
    exempt = {"dataset_tool.py", "calculate_metrics.py", "convert_snapshot.py"}
    for file, words, leaf in LEAVES:
        for param in leaf.params:
            if getattr(param, "writes", None) and file not in exempt:
                first = next(name for name in param.opts if name.startswith("--"))
                folder = param.metavar == "DIR"
                known = ("--outdir", "--figures-dir") if folder else ("--dest", "--figure", "--tables")
                assert first in known, (file, words)
