"""1, 2 and 3 processes (gloo) and any micro-batch: the same data, noise, losses and gradients; the same samples."""

import json
import socket

import child_runs
import distributed_script
import pytest
import torch
from small_runs import ROOT, assert_identical, one_line, python, small_command

import calculate_metrics
import dataset_tool
import train_edm2
from torch_utils import distributed as dist
from torch_utils.persistence import save_snapshot
from training.networks_edm2 import Precond


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    distributed_script.main(digits, out)
    return torch.load(out / "result.pt"), out


@pytest.fixture(scope="module", params=[2, 3])
def group(request, digits, tmp_path_factory):
    """The same under torchrun."""
    out = tmp_path_factory.mktemp(f"group{request.param}")
    python(ROOT / "tests/distributed_script.py", digits, out, processes=request.param)
    result = torch.load(out / "result.pt")
    assert result["world"] == request.param
    return result, out


def same_losses(a, b):
    assert len(a) == distributed_script.STEPS
    for x, y in zip(a, b, strict=False):
        assert y == pytest.approx(x, rel=1e-5)


def same_gradients(a, b):
    assert sorted(a) == sorted(b) == [1, distributed_script.STEPS - 1]
    for step, tolerance in ((1, 1e-6), (distributed_script.STEPS - 1, 1e-5)):  # by then the weights differ by rounding
        assert float(a[step].norm()) > 0 and float((a[step] - b[step]).norm() / a[step].norm()) < tolerance


def test_data_order_and_noise_do_not_depend_on_the_processes(alone, group):
    assert group[0]["count"] == 2 * distributed_script.BATCH  # each position on one process only
    assert_identical(alone[0]["draws"], {index: group[0]["draws"][index] for index in alone[0]["draws"]})
    assert_identical(alone[0]["draws"], {index: group[0]["small"]["draws"][index] for index in alone[0]["draws"]})
    assert sorted(alone[0]["draws"]) == list(range(2 * distributed_script.BATCH))


def test_losses_and_gradients_do_not_depend_on_the_processes(alone, group):
    same_losses(alone[0]["losses"], group[0]["losses"])
    same_losses(alone[0]["losses"], group[0]["small"]["losses"])
    same_gradients(alone[0]["gradients"], group[0]["gradients"])
    same_gradients(alone[0]["gradients"], group[0]["small"]["gradients"])


def test_gradients_are_summed_while_backward_runs(alone, group):
    """Where processes have equally many micro-batches, every bucket but the last leaves before the end of backward."""
    assert len(group[0]["sent"]) == 2 * distributed_script.STEPS
    for sent, buckets in group[0]["sent"]:
        assert buckets > 3 and (sent >= buckets - 1 if group[0]["world"] == 2 else sent == 0)


def test_losses_and_gradients_do_not_depend_on_the_micro_batch(alone):
    same_losses(alone[0]["losses"], alone[0]["small"]["losses"])
    same_gradients(alone[0]["gradients"], alone[0]["small"]["gradients"])
    assert_identical(alone[0]["draws"], alone[0]["small"]["draws"])


def test_samples_do_not_depend_on_the_processes(alone, group):
    """11 seeds in batches of at most 4: uneven on every number of processes."""
    a, b = alone[0]["samples"], group[0]["samples"]
    assert sorted(a) == sorted(b) == list(range(100, 111))
    for seed in a:
        assert torch.equal(a[seed]["noise"], b[seed]["noise"]) and torch.equal(a[seed]["labels"], b[seed]["labels"])
        assert int((a[seed]["image"].int() - b[seed]["image"].int()).abs().max()) <= 1
    names = {path.name for path in (alone[1] / "images").iterdir()}
    assert names == {path.name for path in (group[1] / "images").iterdir()} and len(names) == 12
    labels = json.loads((group[1] / "images" / "dataset.json").read_text())
    assert labels == json.loads((alone[1] / "images" / "dataset.json").read_text())
    assert labels["labels"] == [[f"{seed:06d}.png", seed % 10] for seed in range(100, 111)]


@pytest.mark.parametrize("count, batch, world", [(11, 4, 2), (1, 4, 3), (0, 4, 2), (64, 8, 1), (65, 8, 8)])
def test_batches_are_a_partition_with_equal_numbers_per_process(monkeypatch, count, batch, world):
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts.append(dist.split_batches(range(count), batch))
    assert len({len(part) for part in parts}) == 1
    assert all(len(b) <= batch for part in parts for b in part)
    assert sorted(item for part in parts for b in part for item in b) == list(range(count))


# --- started wrongly ----------------------------------------------------------------------------------------------------

BAD_ENVIRONMENTS = {
    "WORLD_SIZE": {"WORLD_SIZE": "abc"},
    "WORLD_SIZE=": {"WORLD_SIZE": ""},
    "WORLD_SIZE=0": {"WORLD_SIZE": "0"},
    "WORLD_SIZE=-1": {"WORLD_SIZE": "-1"},
    "WORLD_SIZE=1e3": {"WORLD_SIZE": "1e3"},
    "RANK=7": {"WORLD_SIZE": "2", "RANK": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"},
    "RANK=x": {"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"},
    "RANK": {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"},
    "MASTER_ADDR": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29501"},
    "MASTER_PORT": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    "MASTER_PORT=http": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
    "MASTER_PORT=99999": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
    "MASTER_ADDR=256.1.1.1": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "256.1.1.1", "MASTER_PORT": "29501"},
}


@pytest.mark.parametrize("name", BAD_ENVIRONMENTS)
def test_an_environment_that_makes_no_sense(digits, tmp_path, monkeypatch, name):
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in BAD_ENVIRONMENTS[name].items():
        monkeypatch.setenv(variable, value)
    one_line(train_edm2.main, *small_command(digits, tmp_path / "run"), says=name)
    one_line(
        calculate_metrics.cmdline, "ref", f"--data={digits}", f"--dest={tmp_path / 'r.npz'}", "--device=cpu", says=name
    )
    one_line(dataset_tool.main, "inspect", digits, says="start it without torchrun")
    assert not list(tmp_path.iterdir())


def test_a_taken_port(digits, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for variable, value in (
            ("WORLD_SIZE", "2"),
            ("RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
        ):
            monkeypatch.setenv(variable, value)
        one_line(train_edm2.main, *small_command(digits, tmp_path / "run"), says=f"MASTER_PORT={port}")


def generate(data, w):
    save_snapshot(
        w / "n.safetensors", Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8)
    )
    return [f"--net={w}/n.safetensors", f"--outdir={w}/g", "--device=cpu"]


STARTED = {
    "train_edm2": (lambda data, w: small_command(data, w / "run"), ["--lr=0.01", "--lr=0.02"]),
    "generate_images": (generate, ["--seeds=1", "--seeds=2"]),
    "calculate_metrics": (
        lambda data, w: ["ref", f"--data={data}", f"--dest={w}/r.npz", "--device=cpu"],
        ["--per-source", "--no-per-source"],
    ),
}


@pytest.mark.parametrize("script", STARTED)
def test_processes_started_with_other_options(digits, tmp_path, script):
    """Every one of them says so, and nothing is written."""
    arguments, differing = STARTED[script]
    processes = [
        child_runs.start(script, [*arguments(digits, tmp_path), option], tmp_path / f"log{rank}", env=environment)
        for rank, (option, environment) in enumerate(zip(differing, child_runs.ranks(2), strict=True))
    ]
    assert [child_runs.wait(process) for process in processes] == [2, 2]
    for rank in range(2):
        line = (tmp_path / f"log{rank}").read_text().splitlines()[-1]
        assert line.startswith(f"Error: {differing[0].partition('=')[0]} differs between process 0 and process 1"), line
    assert {p.name for p in tmp_path.iterdir()} - {"n.safetensors"} == {"log0", "log1"}
