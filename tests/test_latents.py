"""Latents by several processes and several sources, what is refused, and small latents for real."""

import json
import socket
import time

import child_runs
import PIL.Image
import pytest
from small_runs import one_line, run

import dataset_tool
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
