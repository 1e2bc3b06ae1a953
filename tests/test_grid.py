"""The sample grid: every source in one batch, the images that rows sampled one by one show, none of an untrained network."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from small_runs import small_config

from torch_utils.random import StackedRandomGenerator
from training import hooks, setup
from training.dataset import label_rows
from training.images import save_grid
from training.samplers import heun


@pytest.mark.parametrize("batch_gpu", [None, 5])
def test_one_batch_shows_what_rows_show(digits, tmp_path, tiny_net, batch_gpu, monkeypatch):
    run = setup.build(small_config(digits, batch_gpu=batch_gpu))
    net, sizes = tiny_net(), []
    labels, titles = hooks.grid_labels(run.feed.dataset)
    assert titles == ["0", "1", "2"]
    stand_in = SimpleNamespace(
        state=SimpleNamespace(cur_nimg=1024), feed=run.feed, parts=run, encoder=run.encoder, run_dir=tmp_path, kimg=1,
        objective=run.objective, average=lambda: Average(net),
    )  # fmt: skip

    def sampler(net, noise, *rest, **more):
        sizes.append(len(noise))
        return heun(net, noise, *rest, **more)

    monkeypatch.setattr(hooks, "heun", sampler)
    hooks.grid_hook(labels, titles)(stand_in)
    assert sizes == ([24] if batch_gpu is None else [5, 5, 5, 5, 4])
    noise = StackedRandomGenerator("cpu", range(8)).randn([8, 1, 8, 8])
    rows = [heun(net, noise, label_rows(torch.full([8], int(k)), 10), num_steps=18) for k in titles]
    save_grid(tmp_path / "rows.png", [run.encoder.decode(row) for row in rows], titles)
    names = "samples-0000001.png", "rows.png"
    found, wanted = (np.asarray(PIL.Image.open(tmp_path / name)).astype(int) for name in names)
    assert found.shape == wanted.shape and abs(found - wanted).max() <= 1  # a level, as batches of sampling may differ
    assert wanted.std() > 10


class Average:
    def __init__(self, net):
        self.net = net

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_no_grid_before_training(tmp_path):
    hooks.grid_hook()(SimpleNamespace(state=SimpleNamespace(cur_nimg=0), run_dir=tmp_path))
    assert not list(tmp_path.iterdir())
