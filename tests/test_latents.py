"""Latents by several processes and several sources, what is refused, and small latents for real."""

import json
import signal
import socket
import time

import child_runs
import PIL.Image
import pytest
import torch
from small_runs import ROOT, one_line, run

import dataset_tool
import run_experiment
from simulations.studies import small_vae
from torch_utils.persistence import load_snapshot
from training.dataset import ImageFolderDataset


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images of three sources."""
    folder = tmp_path_factory.mktemp("latents")
    run(
        dataset_tool.main,
        "convert",
        "--source=sklearn:digits",
        f"--dest={folder}/i.zip",
        "--sources=1-3",
        "--max-images=11",
    )
    return folder / "i.zip"


def group(count, *arguments, log):
    """(exit codes, outputs) of dataset_tool.py by so many processes (gloo)."""
    logs = [f"{log}-{rank}" for rank in range(count)]
    environments = child_runs.ranks(count)
    started = [
        child_runs.start("dataset_tool", arguments, f, env=env) for f, env in zip(logs, environments, strict=True)
    ]
    return [child_runs.wait(process) for process in started], [open(f).read() for f in logs]


def test_two_processes_write_the_bytes_of_one(images, tiny_vae, tmp_path):
    common = [f"--vae={tiny_vae[0]}", "--batch=3", "--device=cpu"]
    for name, source in (("encode", images), ("decode", tmp_path / "encode-1.zip")):
        for more in ([], ["--sample-seed=5"]) if name == "decode" else ([],):
            alone = [name, f"--source={source}", f"--dest={tmp_path}/{name}-1.zip", *common, *more, "--overwrite"]
            log = tmp_path / "log"
            code, output = child_runs.run("dataset_tool", alone, log)
            assert code == 0, output
            codes, outputs = group(2, *alone[:2], f"--dest={tmp_path}/{name}-2.zip", *alone[3:], log=log)
            assert codes == [0, 0], outputs
            assert (tmp_path / f"{name}-1.zip").read_bytes() == (tmp_path / f"{name}-2.zip").read_bytes()
            assert [len([line for line in text.splitlines() if line[:1] == "{"]) for text in outputs] == [1, 0]
    assert len(ImageFolderDataset(tmp_path / "decode-2.zip")) == 11


def test_an_error_of_one_process_is_everybodys(images, tiny_vae, tmp_path):
    for i, side in enumerate((8, 8, 8, 4)):
        PIL.Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    (tmp_path / "out").mkdir()
    command = ["encode", f"--source={tmp_path}", f"--dest={tmp_path.parent}/none.zip", "--batch=2", "--device=cpu"]
    codes, outputs = group(2, *command, f"--vae={tiny_vae[0]}", log=tmp_path / "out" / "log")
    assert codes == [2, 2] and not (tmp_path.parent / "none.zip").exists()
    assert all("3.png: shape [3, 4, 4] differs from [3, 8, 8]" in text for text in outputs), outputs
    one_line(dataset_tool.main, *command, "--vae", tiny_vae[0], "--dry-run", says="3.png")
    codes, outputs = group(2, *command, "--vae=nowhere/nothing", log=tmp_path / "out" / "log")
    assert codes == [2, 2] and all("nowhere/nothing" in text for text in outputs)


def test_a_killed_encoding_goes_on(images, tiny_vae, tmp_path):
    """After its last whole batch, in two processes just as well: the bytes of one that was not killed."""
    log, command = (
        tmp_path / "log",
        ["encode", f"--source={images}", f"--vae={tiny_vae[0]}", "--batch=3", "--device=cpu"],
    )
    code, output = child_runs.run("dataset_tool", [*command, f"--dest={tmp_path}/whole.zip"], log)
    assert code == 0, output
    part = [*command, f"--dest={tmp_path}/part.zip"]
    assert child_runs.run("dataset_tool", part, log, moment=(signal.SIGKILL, "item", 8))[0] == -signal.SIGKILL
    codes, outputs = group(2, *part, log=log)
    assert codes == [0, 0] and '"resumed": 6' in outputs[0], outputs
    assert (tmp_path / "part.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_dry_runs_read_all_and_several_sources_are_joined(images, tiny_vae, tmp_path):
    common = [f"--vae={tiny_vae[0]}", "--device=cpu"]
    twice = ["encode", f"--source={images}", f"--source={images}", f"--dest={tmp_path}/d.zip", *common]
    planned = json.loads(run(dataset_tool.main, *twice, "--dry-run").stdout)
    assert not [*tmp_path.iterdir()]
    assert json.loads(run(dataset_tool.main, *twice).stdout) == planned and planned["count"] == 22
    data = ImageFolderDataset(tmp_path / "d.zip")
    assert data.raw_labels.tolist() == [*ImageFolderDataset(images).raw_labels] * 2 and data.label_dim == 10
    odd = tmp_path / "odd"
    odd.mkdir()
    PIL.Image.new("RGB", (7, 7)).save(odd / "a.png")
    says = "sides divisible by 2"
    one_line(
        dataset_tool.main, "encode", f"--source={odd}", f"--dest={tmp_path}/x.zip", *common, "--dry-run", says=says
    )


def test_without_network_the_hub_is_asked_once(images, tmp_path, monkeypatch):
    """One line in a moment: its own client retries for half a minute."""
    constants = pytest.importorskip("huggingface_hub").constants
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        command = ["encode", f"--source={images}", f"--dest={tmp_path}/x.zip", "--device=cpu"]
        begin = time.process_time(), time.monotonic()
        one_line(
            dataset_tool.main, *command, "--vae=nobody/nothing", says=["nobody/nothing", "refused", "--vae=FOLDER"]
        )
        waited = time.monotonic() - begin[1] - (time.process_time() - begin[0])
    assert waited < 15 and not [*tmp_path.iterdir()]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one_line(dataset_tool.main, *command, "--vae=nobody/nothing", says="HF_HUB_OFFLINE is set")


# --- An autoencoder of one's own, and the whole route -----------------------------------------------------------------


def test_a_small_vae_has_stabilitys_units_and_its_own_pictures():
    pytest.importorskip("diffusers")
    vae = small_vae.build([8, 16], seed=3).eval().requires_grad_(False)
    images = small_vae.rgb(
        torch.randint(0, 256, [64, 1, 8, 8], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    before = vae.encode(images / 255)["latent_dist"]
    pictures = vae.decode(before.mean)["sample"]
    small_vae.to_stability_units(vae, images)
    after = vae.encode(images / 255)["latent_dist"]
    torch.testing.assert_close(vae.decode(after.mean)["sample"], pictures, atol=1e-4, rtol=1e-4)
    spread = (after.mean.var((0, 2, 3)) + after.std.square().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(
        after.mean.mean((0, 2, 3)), torch.tensor([5.81, 3.25, 0.12, -2.15]), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(spread, torch.tensor([4.17, 4.62, 3.71, 3.28]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        after.std / after.mean.std((0, 2, 3))[:, None, None], before.std / before.mean.std((0, 2, 3))[:, None, None]
    )
    with pytest.raises(ValueError, match="lower --batch"):
        small_vae.train(vae, images, batch=65)


def test_from_pictures_through_latents_to_a_score(tmp_path):
    """experiments/latents.yaml at smoke size: autoencoder, encode, train, generate, decode, score, table."""
    pytest.importorskip("diffusers")
    run(run_experiment.main, ROOT / "experiments" / "latents.yaml", "--budget=smoke", f"--out={tmp_path}", "--jobs=1")
    snapshot = load_snapshot(next((tmp_path / "runs" / "seed0").glob("network-snapshot-*")))
    assert type(snapshot.encoder).__name__ == "StabilityVAEEncoder" and snapshot.net.img_channels == 4
    assert next((tmp_path / "runs" / "seed0").glob("samples-*.png"))  # grids need the VAE too
    found = {}
    for arm in ("real", "through", "latents"):
        assert ImageFolderDataset(tmp_path / "samples" / f"{arm}-seed1").image_shape == [3, 8, 8]
        row = json.loads((tmp_path / "scores" / f"{arm}-seed1.json").read_text())
        (found[arm],) = (value for name, value in row["scores"].items() if name.startswith("fd"))
    assert 0 < found["real"] < found["through"] < float("inf") and found["real"] < found["latents"] < float("inf")
    table = (tmp_path / "latents-seed1.md").read_text()
    assert all(arm in table for arm in found)
