"""What a user can get wrong, typed at the real command lines: one line that names it, exit code 2, nothing lost."""

import io
import json
import pickle
import zipfile

import child_runs
import numpy as np
import PIL.Image
import pytest
from small_runs import one_line, small_command, small_config

import calculate_metrics
import dataset_tool
import generate_images
import train_edm2
from torch_utils.persistence import save_snapshot
from training import setup
from training.dataset import ImageFolderDataset
from training.feed import Feed
from training.networks_edm2 import Precond


def png(value=0, size=8):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full([size, size], value, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def archive(path, files=None, labels="auto", **meta):
    """A data set of 64 images, with files replaced or added."""
    content = {f"img{i:03d}.png": png(i) for i in range(64)}
    content.update(files or {})
    if labels == "auto":
        labels = [[name, i % 3] for i, name in enumerate(sorted(content))]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
        file.writestr(
            "dataset.json", labels if isinstance(labels, (str, bytes)) else json.dumps({"labels": labels, **meta})
        )
    return path


def reference(path):
    """What is recognised as a reference file."""
    np.savez(path, header=np.array(json.dumps({"format": "feature-reference-1", "detectors": []})))
    return path


def truncated(path):
    archive(path)
    path.write_bytes(path.read_bytes()[:-300])


def flipped(path):
    """A byte of an image inside is another: the zip's own checksum finds it."""
    archive(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    path.write_bytes(data)


BAD_DATA = {
    "missing": (lambda path: None, ["no such file"]),
    "truncated": (truncated, ["truncated"]),
    "empty": (lambda path: path.write_bytes(b""), ["no readable zip"]),
    "no zip": (lambda path: path.write_bytes(b"x" * 999), ["no readable zip"]),
    "no images": (lambda path: zipfile.ZipFile(path, "w").close(), ["no images"]),
    "corrupt image": (lambda path: archive(path, {"img017.png": b"not a picture"}), ["img017.png"]),
    "cut image": (lambda path: archive(path, {"img017.png": png()[:40]}), ["img017.png"]),
    "flipped byte": (flipped, ["img000.png"]),
    "mixed sizes": (lambda path: archive(path, {"img017.png": png(size=16)}), ["img017.png", "[1, 16, 16]", "[1, 8, 8]"]),
    "label too large": (lambda path: archive(path, num_classes=2), ["label 2", "0..1"]),
    "negative label": (lambda path: archive(path, labels=[[f"img{i:03d}.png", -1] for i in range(64)]), ["label -1"]),
    "label missing": (lambda path: archive(path, labels=[["img000.png", 0]]), ["no label for img001.png", "63 of 64"]),
    "no labels": (lambda path: archive(path, labels=None), ["no labels", "--cond=False"]),
    "labels no JSON": (lambda path: archive(path, labels="{"), ["dataset.json", "not valid JSON"]),
    "labels no text": (lambda path: archive(path, labels=b"\xff\xfe"), ["dataset.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_training_on_bad_data(name, tmp_path):
    make, parts = BAD_DATA[name]
    path = tmp_path / "data.zip"
    make(path)
    earlier = tmp_path / "run" / "network-snapshot-0000001-0.100.safetensors"
    earlier.parent.mkdir()
    earlier.write_bytes(b"earlier")
    one_line(train_edm2.main, *small_command(path, tmp_path / "run"), says=["data.zip", *parts])
    assert earlier.read_bytes() == b"earlier" and list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.parametrize("name", [name for name in BAD_DATA if name != "no labels"])
def test_inspecting_and_scoring_bad_data(name, tmp_path):
    make, _ = BAD_DATA[name]
    path = tmp_path / "data.zip"
    make(path)
    one_line(dataset_tool.main, "inspect", path, says="data.zip")
    dest = reference(tmp_path / "refs.npz")
    earlier = dest.read_bytes()
    options = ["ref", f"--data={path}", f"--dest={dest}", "--device=cpu"]
    one_line(calculate_metrics.cmdline, *options, says=["--data", "data.zip"])
    assert dest.read_bytes() == earlier


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--source=sklearn:letters"], ["letters", "digits"]),
        (["--source=nowhere"], ["nowhere"]),
        (["--source=sklearn:digits", "--sources=11"], ["11"]),
        (["--source=sklearn:digits", "--per-source=9999"], ["9999"]),
        (["--source=sklearn:digits", "--sources=a"], ["--sources=a", "no class of that name"]),
        (["--source=sklearn:digits", "--resolution=8"], ["--resolution", "'8'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_converting_from_bad_sources(options, parts, tmp_path):
    dest = tmp_path / "out.zip"
    one_line(dataset_tool.main, "convert", f"--dest={dest}", *options, says=parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, parts",
    [
        ("--outdir=", ["--outdir", "empty"]),
        ("--outdir=FILE", ["data.zip"]),
        ("--outdir=FILE/run", ["data.zip"]),
        ("--outdir=/proc/run", ["/proc/run"]),
        ("--device=", ["--device", "empty"]),
        ("--lr=nan", ["--lr=nan must be finite"]),
        ("--workers=99999", ["--workers", "256"]),
        ("--channels=99999999", ["--channels"]),
        ("--num-blocks=99999999", ["--num-blocks"]),
        ("--channel-mult=-1", ["--channel-mult=[-1]"]),
        ("--preset=nothing", ["nothing", "digits8"]),
        ("--batch=96", ["must be a multiple of --batch=96"]),
        ("--precond=nothing", ["--precond=nothing", "edm"]),
        ("--resume=FILE", ["data.zip", "not a readable checkpoint"]),
    ],
    ids=str,
)
def test_training_options_that_cannot_be(option, parts, tmp_path):
    data = archive(tmp_path / "data.zip")
    command = small_command(data, tmp_path / "run", option.replace("FILE", str(data)))
    before = data.read_bytes()
    one_line(train_edm2.main, *command, says=parts)
    assert data.read_bytes() == before and list(tmp_path.iterdir()) == [data]  # nothing was begun


@pytest.mark.parametrize(
    "option, parts",
    [
        ("--outdir=", ["--outdir", "empty"]),
        ("--outdir=FILE", ["net.safetensors"]),
        ("--outdir=/proc/out", ["/proc/out"]),
        ("--sigma_min=nan", ["--sigma_min=nan"]),
        ("--sigma_max=inf", ["--sigma_max=inf"]),
        ("--sigma_min=100", ["--sigma_min=100 must be below --sigma_max=80"]),
        ("--sources=1", ["--sources=1 needs --class=balanced"]),
        ("--class=3", ["class 3", "0 to 2"]),
        ("--seeds=3-1", ["3-1"]),
        ("--guidance=2", ["--gnet"]),
        ("--solver=nothing", ["nothing"]),
        ("--process=nothing", ["nothing"]),
    ],
    ids=str,
)
def test_generation_options_that_cannot_be(option, parts, tmp_path):
    net = tmp_path / "net.safetensors"
    save_snapshot(net, Precond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8))
    command = [f"--net={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0-1", "--steps=1", "--device=cpu"]
    one_line(generate_images.main, *command, option.replace("FILE", str(net)), says=parts)
    assert list(tmp_path.iterdir()) == [net]


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit(99)",)


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.pkl", pickle.dumps(Bomb())),
        ("x.pkl", b"text"),
        ("x.pt", b"PK\x03\x04"),
        ("x.safetensors", b""),
        ("x.safetensors", b"\xff" * 64),
        ("x.safetensors", (10**15).to_bytes(8, "little") + b"{}"),
        ("x.safetensors", (2).to_bytes(8, "little") + b"{}"),
        ("x", b"something"),
    ],
    ids=str,
)
def test_snapshots_of_a_wrong_format(digits, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    generate = [f"--net={path}", f"--outdir={tmp_path / 'out'}", "--seeds=0-1", "--device=cpu"]
    one_line(generate_images.main, *generate, says=str(path))
    one_line(train_edm2.main, *small_command(digits, tmp_path / "run", f"--init={path}"), says=str(path))
    gen = ["gen", f"--net={path}", f"--data={digits}", "--num=2", "--device=cpu"]
    one_line(calculate_metrics.cmdline, *gen, says=str(path))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", pickle.dumps(Bomb())], ids=str)
def test_checkpoints_of_a_wrong_format(digits, tmp_path, content):
    path = tmp_path / "training-state-0000001.pt"
    path.write_bytes(content)
    command = small_command(digits, tmp_path / "run", f"--resume={path}")
    one_line(train_edm2.main, *command, says=str(path))


def test_checkpoint_of_another_network(digits, tmp_path):
    setup.train(small_config(digits, total_nimg=128, snapshot_nimg=0, checkpoint_nimg=0, status_nimg=0), tmp_path / "a")
    path = tmp_path / "a" / "training-state-0000000.pt"
    command = small_command(digits, tmp_path / "run", f"--resume={path}", "--channels=16")
    one_line(train_edm2.main, *command, says=[str(path), "does not fit"])


def test_loader_processes_name_the_bad_image(tmp_path):
    """Large data sets are read on the way, by other processes; the message is the same."""
    archive(tmp_path / "data.zip", {"img017.png": b"not a picture"})
    data = ImageFolderDataset(tmp_path / "data.zip")
    feed = Feed(data, block=16, cache=False, workers=1)
    with pytest.raises(ValueError, match="data.zip: img017.png is corrupt") as error:
        for position in range(0, 128, 64):
            list(feed.blocks(position, 64))
    assert "\n" not in str(error.value)


# --- disk full --------------------------------------------------------------------------------------------------------


def last_line(output):
    assert "Traceback" not in output, output
    return output.splitlines()[-1]


def test_disk_full_while_training(digits, tmp_path):
    """A file-size limit between those of a snapshot and a checkpoint: the earlier files stay, and training resumes."""
    log, run_dir = tmp_path / "log", tmp_path / "run"
    command = small_command(digits, run_dir, "--batch=512", "--channel-mult=1", "--attn-resolutions=1")
    assert child_runs.run("train_edm2", [*command, "--slice=1Ki"], log)[0] == 0
    before = {p.name: p.read_bytes() for p in run_dir.iterdir() if p.suffix in (".pt", ".sha256", ".safetensors")}
    size = len(before["training-state-0000001.pt"])
    code, output = child_runs.run("train_edm2", command, log, file_limit=size // 2)
    assert code == 2 and last_line(output).startswith("Error: "), output
    assert "training-state-0000002.pt" in last_line(output) and "File too large" in last_line(output)
    after = {name: (run_dir / name).read_bytes() for name in before}
    assert after == before and not list(run_dir.glob(".*"))
    assert child_runs.run("train_edm2", command, log)[0] == 0


def test_disk_full_while_writing_a_snapshot(digits, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    code, output = child_runs.run("train_edm2", small_command(digits, run_dir), log, file_limit=20_000)
    assert code == 2 and "network-snapshot-0000000" in last_line(output), output
    assert not list(run_dir.glob("*.safetensors")) and not list(run_dir.glob(".*"))


def test_disk_full_while_converting_and_scoring(digits, tmp_path):
    log, dest = tmp_path / "log", tmp_path / "data.zip"
    earlier = archive(dest).read_bytes()
    convert = ["convert", "--source=sklearn:digits", f"--dest={dest}", "--overwrite"]
    code, output = child_runs.run("dataset_tool", convert, log, file_limit=20_000)
    assert code == 2 and str(dest) in last_line(output) and "File too large" in last_line(output), output
    assert dest.read_bytes() == earlier and {p.name for p in tmp_path.iterdir()} == {"log", "data.zip"}
    refs = reference(tmp_path / "refs.npz")
    earlier = refs.read_bytes()
    code, output = child_runs.run(
        "calculate_metrics", ["ref", f"--data={digits}", f"--dest={refs}"], log, file_limit=2000
    )
    assert code == 2 and str(refs) in last_line(output) and "File too large" in last_line(output), output
    assert refs.read_bytes() == earlier and {p.name for p in tmp_path.iterdir()} == {"log", "data.zip", "refs.npz"}


def test_disk_full_while_generating(tmp_path):
    net = tmp_path / "net.safetensors"
    save_snapshot(net, Precond(32, 3, 0, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8))
    options = [f"--net={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0-3", "--steps=1", "--device=cpu"]
    code, output = child_runs.run("generate_images", options, tmp_path / "log", file_limit=2000)
    assert code == 2 and "000000.png" in last_line(output), output
    assert not (tmp_path / "out").exists()


# --- which option was it ------------------------------------------------------------------------------------------------

CALC = ["calc", "--images=W/data.zip", "--data=W/data.zip", "--distances=fd"]
LOSS = ["loss", "--net=W/net.safetensors", "--data=W/data.zip"]
GEN = ["gen", "--net=W/net.safetensors", "--num=2", "--steps=1", "--data=W/data.zip"]
GENERATE = ["--net=W/net.safetensors", "--outdir=W/out", "--seeds=0", "--steps=1"]
REPORT = ["report", "--scores=W/s.json", "--dest=W/out"]
NAMED = [
    *((calculate_metrics.cmdline, CALC, option) for option in ("--images", "--data", "--train")),
    (calculate_metrics.cmdline, [*CALC[:2], "--distances=fd"], "--ref"),
    (calculate_metrics.cmdline, CALC, "--metrics=classifier:"),
    (calculate_metrics.cmdline, ["ref", "--dest=W/r.npz"], "--data"),
    (calculate_metrics.cmdline, ["detector", "--dest=W/d"], "--data"),
    (calculate_metrics.cmdline, ["detector", "--dest=W/d", "--data=W/data.zip"], "--holdout"),
    *((calculate_metrics.cmdline, GEN, option) for option in ("--net", "--data")),
    (calculate_metrics.cmdline, [*GEN, "--guidance=2"], "--gnet"),
    *((calculate_metrics.cmdline, LOSS, option) for option in ("--net", "--data")),
    *((calculate_metrics.cmdline, ["likelihood", *LOSS[1:]], option) for option in ("--net", "--data", "--process")),
    (calculate_metrics.cmdline, REPORT[::2], "--scores"),
    (calculate_metrics.cmdline, [*REPORT[::2], "--against=a"], "--scores"),
    (calculate_metrics.cmdline, ["best"], "--scores"),
    *((dataset_tool.main, [command, "--dest=W/n.zip"], "--source") for command in ("convert", "encode", "decode")),
    (generate_images.main, GENERATE, "--net"),
    (generate_images.main, [*GENERATE, "--guidance=2"], "--gnet"),
    *((train_edm2.main, ["TRAIN"], option) for option in ("--data", "--val-data", "--init", "--resume", "--config")),
    (train_edm2.main, ["TRAIN", "--select=jest"], "--reference"),
]


@pytest.mark.parametrize("content", [None, b"", b"\x89 no such format"], ids=["missing", "empty", "garbage"])
@pytest.mark.parametrize("command, words, option", NAMED, ids=lambda v: v if isinstance(v, str) else None)
def test_the_line_names_the_option(tmp_path, net8, command, words, option, content):
    """What is wrong with a file is said of the option that gave it, in every command."""
    archive(tmp_path / "data.zip")
    (tmp_path / "net.safetensors").write_bytes(net8)
    bad = tmp_path / "bad.safetensors"
    if content is not None:
        bad.write_bytes(content or b"[" * (option == "--config"))  # an empty configuration is one
    words = small_command("W/data.zip", "W/run", *words[1:]) if words[0] == "TRAIN" else words
    typed = [word.replace("W/", f"{tmp_path}/") for word in words if not word.startswith(f"{option}=")]
    typed.append(f"{option}{'' if option.endswith(':') else '='}{bad}")
    line = one_line(command, *typed, says=[option.partition("=")[0], "bad.safetensors"])
    assert line.startswith(("Error: --", "Error: Invalid value for '--")), line


@pytest.mark.parametrize("text", ["./data.zip", "data.zip", "../x/data.zip"])
def test_the_line_names_the_option_however_the_path_is_written(tmp_path, monkeypatch, text):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    truncated(tmp_path / "x" / "data.zip")
    one_line(calculate_metrics.cmdline, "ref", f"--data={text}", "--dest=r.npz", says="Error: --data")


@pytest.fixture(scope="module")
def net8(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_snapshot(path, Precond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8))
    return path.read_bytes()
