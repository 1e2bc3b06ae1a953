"""1, 2 and 3 processes (gloo) and any micro-batch: the same data, noise, losses and gradients; the same samples."""

import json

import distributed_script
import pytest
import torch
from small_runs import ROOT, assert_identical, python

from torch_utils import distributed as dist


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
