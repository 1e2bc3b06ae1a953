"""--plugin FILE.py: a user's own choices as values of the options of every script, in the file's own words if it fails."""

import json

import pytest
from small_runs import one_line, run, small_command

import calculate_metrics
import generate_images
import train_edm2
from metrics import detectors
from torch_utils.persistence import load_snapshot, save_snapshot
from training import presets, processes, samplers, selection

PLUGIN = """
import torch
from metrics.detectors import DETECTORS
from torch_utils import random
from torch_utils.persistence import persistent
from training import presets, processes, samplers, selection

@persistent
class Uniform:
    def unit_noise(self, shape, generator=None):
        return 12**0.5 * (random.rand(shape, generator) - 0.5)

def still(net, process, latents, labels=None, **options):
    return net(latents[:, 0], torch.tensor(80.0), labels)

processes.REGISTRY["uniform"] = Uniform
samplers.SOLVERS["still"] = still
selection.FUNCTIONS["first"] = lambda learner_loss, *, size, generator: torch.arange(size)
presets.PRESETS["own"] = dict(presets.PRESETS["digits8"], P_mean=-0.7)
DETECTORS["mean"] = lambda argument: lambda images: images.float().mean(dim=(2, 3)).repeat(1, 2)
"""
TABLES = [processes.REGISTRY, samplers.SOLVERS, selection.FUNCTIONS, presets.PRESETS, detectors.DETECTORS]


@pytest.fixture
def plugin(tmp_path):
    """Path of a file that adds to every table, which are as before afterwards."""
    before = [dict(table) for table in TABLES]
    path = tmp_path / "own choices.py"
    path.write_text(PLUGIN)
    yield path
    for table, entries in zip(TABLES, before, strict=True):
        for name in set(table) - set(entries):
            del table[name]


def test_own_choices_from_training_to_scores(plugin, digits, tmp_path, tiny_net):
    net, out = tmp_path / "run", tmp_path / "out"
    own = ["--preset=own", "--process=uniform", "--select=first", "--filter-ratio=0.5", "--duration=256", "--status=0"]
    command = [w for w in small_command(digits, net) if not w.startswith(("--preset", "--duration", "--status"))]
    given = [*command, *own, "--checkpoint=0"]
    one_line(train_edm2.main, *given, says="own")  # unknown without the file
    run(train_edm2.main, f"--plugin={plugin}", *given)
    snapshot = load_snapshot(net)
    assert type(snapshot.process).__name__ == "Uniform"
    assert (snapshot.options["P_mean"], snapshot.options["select"]) == (-0.7, "first")
    more = ["--seeds=0-7", "--class=balanced", "--steps=2", "--plugin", plugin]
    run(generate_images.main, f"--net={net}", f"--outdir={out}", *more)
    save_snapshot(tmp_path / "gaussian.safetensors", tiny_net())
    own = [f"--net={tmp_path / 'gaussian.safetensors'}", f"--outdir={tmp_path / 'still'}", "--solver=still"]
    run(generate_images.main, *own, *more)
    score = ["calc", f"--images={out}", f"--data={digits}", "--metrics=mean", "--distances=fd", f"--plugin={plugin}"]
    assert json.loads(run(calculate_metrics.cmdline, *score).stdout)["metrics"]["mean"]["feature_width"] == 2
    config = tmp_path / "c.yaml"
    config.write_text(f"plugin: [{plugin}]\n")
    run(calculate_metrics.cmdline, *score[:-1], f"--config={config}")


@pytest.mark.parametrize(
    "content, says",
    [
        ("import math\n\nmath.nothing", "line 3: module 'math' has no attribute 'nothing'"),
        ("x = (", "'(' was never closed"),
        ("import no_such_package", "line 1: No module named 'no_such_package'"),
        ("raise RuntimeError", "line 1: RuntimeError"),
        (None, "No such file"),
    ],
)
def test_files_that_fail(tmp_path, digits, content, says):
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    for command in (train_edm2.main, generate_images.main):
        error = one_line(
            command, f"--plugin={path}", f"--outdir={tmp_path / 'run'}", says=[str(path), "--plugin", says]
        )
        assert not (tmp_path / "run").exists() and error.count(str(path)) == 1
    path.write_text("")
    one_line(train_edm2.main, f"--plugin={path.rename(tmp_path / 'own.txt')}", says="give a Python file (.py)")


def test_every_command_that_takes_a_choice_has_it():
    made = calculate_metrics.cmdline.commands
    takers = [
        train_edm2.main,
        generate_images.main,
        *(c for c in made.values() if any(p.name == "device" for p in c.params)),
    ]
    assert {"ref", "calc", "gen", "loss", "likelihood"} <= {command.name for command in takers}
    assert all(any("--plugin" in param.opts for param in command.params) for command in takers)
