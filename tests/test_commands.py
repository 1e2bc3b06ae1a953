"""docs/commands.md: every command of ours parses, and no documented command of the published systems lacks a row."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import click.testing
import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "commands.md"


def rows():
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[0] not in ("theirs", "---"):
            yield cells


def our_commands():
    """Commands in backticks in the columns `ours` and `note`."""
    for _, ours, note in rows():
        for text in re.findall(r"`([^`]+)`", ours + " " + note):
            if re.match(r"(python|torchrun|bash) \S", text):
                yield text


def command_of(script):
    """The click command of a script, by its path from the root."""
    import importlib

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return next(
        value
        for name in ("main", "cmdline", "cli", "run")
        if isinstance(value := getattr(module, name, None), click.Command)
    )


@pytest.mark.parametrize("text", sorted(set(our_commands())))
def test_our_command_parses(text):
    words = shlex.split(text)
    if words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file(), words[1]
        if "--dry-run" in words:
            done = subprocess.run(["bash", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            for line in done.stdout.splitlines():
                if match := re.match(r"\+ (?:\w+=\S+ )*((?:python|torchrun) .*)", line):
                    check(shlex.split(match[1]))
        else:
            assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        return
    check(words)


def check(words):
    """Parse a python or torchrun command line with its own parser; training commands also resolve their options."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    command, args = command_of(words[at]), words[at + 1 :]
    extra = "--dry-run" if words[at] == "train_edm2.py" and "--help" not in args else "--help"
    result = click.testing.CliRunner().invoke(command, [*args, extra])
    assert result.exit_code == 0, result.output + str(result.exception)


SEEDS = {
    "Multi-source": [
        "run_gaussian.py --tag=K", "run_gaussian.py --tag=n", "run_gaussian.py --tag=sim", "plot_gaussian_K.py",
        "plot_gaussian_n.py", "plot_gaussian_sim.py", "dataset_tool.py convert", "dataset_tool.py encode",
        "calculate_metrics.py ref", "convert_1c.sh sim3", "train_edm2.py", "--preset", "--batch", "--status",
        "--snapshot", "--checkpoint", "pip install",
    ],
}  # fmt: skip


@pytest.mark.parametrize("needle", SEEDS["Multi-source"])
def test_multi_source_readme_is_covered(needle):
    assert any(needle in theirs for theirs, _, _ in rows()), f"no row for {needle}"
