"""Arrays that are no pixels: they train, show grids, and are generated as .npy files with dataset.json beside them."""

import numpy as np
import PIL.Image
import pytest
from small_runs import one_line, run, small_command

import generate_images
import train_edm2
from training.dataset import ImageFolderDataset


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_train_generate_and_read_again(tmp_path, channels):
    data, out = tmp_path / "d", tmp_path / "g"
    data.mkdir()
    for i in range(8):
        np.save(data / f"{i}.npy", np.random.RandomState(i).randn(channels, 8, 8).astype(np.float32))
    run(train_edm2.main, *small_command(data, tmp_path / "run", "--cond=False", "--grid=True"))
    grid = np.asarray(PIL.Image.open(next((tmp_path / "run").glob("samples-*.png"))))
    assert len(np.unique(grid)) > 50
    net = next((tmp_path / "run").glob("network-snapshot-*"))
    common = [f"--net={net}", f"--outdir={out}", "--steps=2", "--device=cpu"]
    run(generate_images.main, *common, "--seeds=0-2")
    before = (out / "000001.npy").read_bytes()
    run(generate_images.main, *common, "--seeds=1-3")
    dataset = ImageFolderDataset(out)
    assert len(dataset) == 4 and dataset[0][0].shape == (channels, 8, 8) and dataset[0][0].dtype == np.float32
    assert (out / "000001.npy").read_bytes() == before and np.load(out / "000001.npy").shape == (channels, 8, 8)
    assert "--steps" in one_line(generate_images.main, *common[:2], "--steps=3", "--device=cpu", "--seeds=0")
    np.save(out / "000009.npy", np.zeros([channels, 8, 8], np.float32))
    one_line(generate_images.main, *common, "--seeds=9", says="000009.npy, which does not say which network")
