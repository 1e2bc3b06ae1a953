"""Killed at any moment, told to stop at any moment, split over invocations, raced: the same files in the end, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import time
import zlib
from pathlib import Path

import child_runs
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from conftest import convert_digits
from small_runs import assert_identical, final_state, small_command

from dnnlib.util import TEMPORARY, locked
from torch_utils import checkpoint
from torch_utils.persistence import save_snapshot
from training.hooks import STOPPING
from training.networks_edm2 import Precond

KILL, TERM, INT, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """4x4 pixels: what is tested here does not depend on the network."""
    return convert_digits(tmp_path_factory.mktemp("digits") / "digits.zip", resolution="4x4")


def command(digits, outdir, *more):
    """6 steps; snapshots, checkpoints and looks at the validation loss every 2; the newest two checkpoints stay."""
    tiny = ["--channel-mult=1", "--attn-resolutions=1", "--batch=512", "--duration=3Ki", "--keep=2"]
    return small_command(digits, outdir, *tiny, f"--val-data={digits}", *more)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = child_runs.run("train_edm2", command(digits, folder / "run"), folder / "log")
    assert code == 0, output
    return folder / "run"


def assert_same_run(whole, run_dir):
    assert_identical(final_state(whole, 3), final_state(run_dir, 3))
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in run_dir.iterdir()} == names  # also: nothing half-written is left behind
    for name in sorted(names):
        if name.endswith(".safetensors"):
            a, b = (safetensors.torch.load_file(folder / name) for folder in (whole, run_dir))
            assert_identical(a, b, name)


MOMENTS = [
    ("step", 1),
    ("step", 4),
    ("step", 6),
    ("before-rename", "training_options.json"),
    ("half-written", "network-snapshot-0000002-*"),
    ("after-rename", "network-snapshot-0000003-*"),
    ("half-written", "network-snapshot-best.safetensors"),
    ("after-rename", "network-snapshot-best.safetensors"),  # before the line of stats.jsonl that it belongs to
    ("half-written", "training-state-0000001.pt"),
    ("half-written", "training-state-0000002.pt"),
    ("before-rename", "training-state-0000003.pt.sha256"),
    ("after-rename", "training-state-0000003.pt.sha256"),
    ("after-rename", "training-state-0000002.pt"),
    ("before-removal", "training-state-0000001.pt"),
    ("after-removal", "training-state-0000001.pt"),
]


CASES = [(KILL, *moment) for moment in MOMENTS] + [(TERM, *MOMENTS[i]) for i in (1, 2, 3, 4, 9, 13)]
CASES.append((INT, *MOMENTS[1]))


@pytest.mark.parametrize("number, what, which", CASES, ids=[f"{n.name}-{what}-{which}" for n, what, which in CASES])
def test_interrupted_and_resumed(digits, whole, tmp_path, number, what, which):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    code, output = child_runs.run("train_edm2", command(digits, run_dir), log, moment=(number, what, which))
    if number == KILL:
        assert code == -KILL
    else:
        last = what.endswith("removal")  # of the run's last checkpoint: there is no step left to stop after
        assert code == (0 if last else 75), output
        assert output.count(STOPPING) == 1
        reached = checkpoint.load(checkpoint.newest_sound(run_dir))["state"]["cur_nimg"]
        assert (reached == 3072) == (last or (what, which) == ("step", 6))  # stopped, unless that was the last step
    for path in checkpoint.list_checkpoints(run_dir):  # whatever has its final name is whole
        assert checkpoint.damage(path) is None
    code, output = child_runs.run("train_edm2", command(digits, run_dir), log)
    assert code == 0, output
    assert_same_run_up_to_stops(whole, run_dir)
    if number == KILL:  # also in what was logged: nothing twice, nothing missing
        assert logged(run_dir) == logged(whole)


def logged(run_dir):
    """(kimg, loss, validation loss) of every line of stats.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [(line["Progress/kimg"], line.get("Loss/loss"), line["Loss/validation"]) for line in lines]


def assert_same_run_up_to_stops(whole, run_dir):
    """A stop leaves a checkpoint of its own kimg, which --keep may have outlived others with."""
    assert_identical(final_state(whole, 3), final_state(run_dir, 3))
    assert not list(run_dir.glob(".*")), "something half-written is left behind"
    for path in whole.glob("*.safetensors"):
        assert_identical(safetensors.torch.load_file(path), safetensors.torch.load_file(run_dir / path.name), path.name)
    assert len(checkpoint.list_checkpoints(run_dir)) == 2


def test_two_interruptions_within_one_kimg(digits, whole, tmp_path):
    """The second checkpoint of a kimg replaces the first; dying in between must not lose both."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    sliced = command(digits, run_dir, "--slice=1Ki", "--checkpoint=0", "--snapshot=0", "--keep=1")
    assert child_runs.run("train_edm2", sliced, log)[0] == 0
    assert [p.name for p in checkpoint.list_checkpoints(run_dir)] == ["training-state-0000001.pt"]
    again = command(digits, run_dir, "--slice=512", "--checkpoint=0", "--snapshot=0", "--keep=1")
    moment = (KILL, "after-rename", "training-state-0000001.pt.sha256")
    assert child_runs.run("train_edm2", again, log, moment=moment)[0] == -KILL
    sound = checkpoint.newest_sound(run_dir)
    assert sound is not None and checkpoint.load(sound)["state"]["cur_nimg"] == 1024
    assert child_runs.run("train_edm2", again, log)[0] == 0
    assert checkpoint.load(sound)["state"]["cur_nimg"] == 1536
    assert len((run_dir / "training-state-0000001.pt.sha256").read_text().splitlines()) == 1


def test_slices(digits, whole, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    reached = []
    for _ in range(3):
        code, output = child_runs.run("train_edm2", command(digits, run_dir, "--slice=1Ki"), log)
        assert code == 0, output
        reached.append(checkpoint.load(checkpoint.newest_sound(run_dir))["state"]["cur_nimg"])
    assert reached == [1024, 2048, 3072]
    assert_same_run(whole, run_dir)
    assert logged(run_dir) == logged(whole) and [kimg for kimg, *_ in logged(run_dir)] == [0, 1.024, 2.048, 3.072]


def test_killed_from_outside_again_and_again(digits, whole, tmp_path):
    """At moments that nobody chose, until the run is through."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    moments = random.Random(0)
    codes = []
    while 0 not in codes and len(codes) < 40:
        process = child_runs.start("train_edm2", command(digits, run_dir), log)
        process.join(moments.uniform(0.05, 0.15) * 1.3 ** len(codes))  # from too short for any machine to long enough
        process.kill()
        codes.append(child_runs.wait(process))  # 0 where it was through just before
        for path in checkpoint.list_checkpoints(run_dir) if run_dir.exists() else ():
            assert checkpoint.damage(path) is None
    assert codes[-1] == 0 and len(codes) > 1 and set(codes[:-1]) == {-KILL}, log.read_text()
    assert_same_run(whole, run_dir)
    assert logged(run_dir) == logged(whole)


def test_flipped_byte_in_the_newest_checkpoint(digits, whole, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert child_runs.run("train_edm2", command(digits, run_dir, "--slice=2Ki"), log)[0] == 0
    newest = run_dir / "training-state-0000002.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    code, output = child_runs.run("train_edm2", command(digits, run_dir), log)
    assert code == 0, output
    assert f"{newest} is damaged (its checksum does not match)" in output
    assert f"Resuming from {run_dir / 'training-state-0000001.pt'}" in output
    assert_same_run(whole, run_dir)


def test_no_sound_checkpoint_is_no_reason_to_start_over_in_silence(digits, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert child_runs.run("train_edm2", command(digits, run_dir, "--slice=1Ki"), log)[0] == 0
    path = run_dir / "training-state-0000001.pt"
    path.write_bytes(path.read_bytes()[:-1])
    code, output = child_runs.run("train_edm2", command(digits, run_dir), log)
    assert code == 2 and "Error: " in output.splitlines()[-1]
    assert "all checkpoints" in output.splitlines()[-1] and str(run_dir) in output.splitlines()[-1]
    assert path.exists()
    code, output = child_runs.run("train_edm2", command(digits, run_dir, f"--resume={path}"), log)
    assert code == 2 and f"{path}: damaged" in output.splitlines()[-1]


def test_one_of_two_processes_is_killed(digits, tmp_path):
    """The other ends by itself, says so in one line, and the same command resumes to the same weights."""

    def both(run_dir, moment=None):
        environments = child_runs.ranks(2)
        processes = [
            child_runs.start(
                "train_edm2",
                command(digits, run_dir),
                tmp_path / f"log{rank}",
                env=env,
                moment=moment if rank else None,
            )
            for rank, env in enumerate(environments)
        ]
        child_runs.wait(processes[1])
        ended = time.monotonic()
        codes = [child_runs.wait(process) for process in processes]
        assert time.monotonic() - ended < 60  # and not after the half hour of the process group's own limit
        return codes, [(tmp_path / f"log{rank}").read_text() for rank in range(2)]

    codes, logs = both(tmp_path / "whole")
    assert codes == [0, 0], logs
    codes, logs = both(tmp_path / "part", (KILL, "step", 4))
    assert codes == [1, -KILL], logs
    assert logs[0].splitlines()[-1].startswith("Error: another process of this training has ended"), logs[0]
    assert "Traceback" not in logs[0]
    codes, logs = both(tmp_path / "part")
    assert codes == [0, 0] and "Resuming from" in logs[0], logs
    assert_identical(final_state(tmp_path / "whole", 3), final_state(tmp_path / "part", 3))
    codes, logs = both(tmp_path / "stopped", (TERM, "step", 4))  # a stop request on any process stops all
    assert codes == [75, 75], logs
    codes, logs = both(tmp_path / "stopped")
    assert codes == [0, 0], logs
    assert_identical(final_state(tmp_path / "whole", 3), final_state(tmp_path / "stopped", 3))


# --- the other commands: killed, then the same again; two at once --------------------------------------------------------

CONVERT = ["convert", "--source=sklearn:digits", "--sources=0,1", "--resolution=4x4"]
SCORE = ["--metrics=pixel", "--distances=fd", "--device=cpu"]
# name: script, arguments of a folder and of the data (and a snapshot) there, what is written last.
WRITERS = {
    "zip": ("dataset_tool", lambda w: [*CONVERT, f"--dest={w}/d.zip"], "d.zip"),
    "zips": (
        "dataset_tool",
        lambda w: [*CONVERT, "--per-source=9", f"--dest={w}/d.zip", f"--holdout={w}/h.zip"],
        "d.zip",
    ),
    "folder": ("dataset_tool", lambda w: [*CONVERT, f"--dest={w}/d"], "d"),
    "images": ("generate_images", lambda w: [*GENERATE(w), "--subdirs", "--grid"], "dataset.json"),
    "reference": (
        "calculate_metrics",
        lambda w: ["ref", f"--data={w.parent}/data.zip", f"--dest={w}/r.npz", *SCORE[::2]],
        "r.npz",
    ),
    "detector": ("calculate_metrics", lambda w: [*DETECTOR(w), f"--dest={w}/d.safetensors"], "d.safetensors"),
    "scores": ("calculate_metrics", lambda w: [*CALC(w), *SCORE, f"--dest={w}/s.json"], "s.json"),
    "run": ("train_edm2", lambda w: command(f"{w.parent}/data.zip", w / "run"), "training-state-0000001.pt"),
}
GENERATE = lambda w: [
    f"--net={w.parent}/net.safetensors",
    f"--outdir={w}/g",
    "--seeds=0-5",
    "--steps=1",
    "--device=cpu",
]
DETECTOR = lambda w: ["detector", f"--data={w.parent}/data.zip", "--epochs=1", "--device=cpu"]
CALC = lambda w: ["calc", f"--images={w.parent}/data.zip", f"--data={w.parent}/data.zip"]
FOREIGN = (".d.zip.tmp", ".d.zip.abcdefgh.tmp", ".lock", ".r.npz.swp", ".e.zip.abcdefgh.dnnlib-tmp")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def world(digits, tmp_path_factory):
    """A folder with data.zip and net.safetensors, and {name: the files of WRITERS that nobody disturbed}."""
    root = tmp_path_factory.mktemp("world")
    (root / "data.zip").write_bytes(digits.read_bytes())
    torch.manual_seed(0)
    net = Precond(4, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    save_snapshot(root / "net.safetensors", net)
    return root, {}


def undisturbed(world, name):
    root, found = world
    if name not in found:
        script, arguments, _ = WRITERS[name]
        folder = root / f"{name}-whole"
        folder.mkdir()
        code, output = child_runs.run(script, arguments(folder), root / "log")
        assert code == 0, output
        found[name] = contents(folder)
    return found[name]


KILLS = [
    *(
        ("zip", *moment)
        for moment in (("half-written", "d.zip"), ("before-rename", "d.zip"), ("after-rename", "d.zip"))
    ),
    *(
        ("zips", *moment)
        for moment in (("after-rename", "h.zip"), ("before-rename", "d.zip"), ("after-rename", "d.zip"))
    ),
    *(("folder", *moment) for moment in (("before-rename", "d"), ("after-rename", "d"))),
    ("images", "half-written", "000003.png"),
    ("images", "after-rename", "000004.png"),
    ("images", "half-written", "dataset.json"),
    ("images", "after-rename", "dataset.json"),
    *((name, "half-written", WRITERS[name][2]) for name in ("reference", "detector", "scores")),
]


@pytest.mark.parametrize("name, what, which", KILLS, ids=lambda value: value)
def test_killed_and_run_again(world, tmp_path, name, what, which):
    """The same files as undisturbed, nothing of the killed command left; hidden files of others stay."""
    whole = undisturbed(world, name)
    script, arguments, _ = WRITERS[name]
    folder = world[0] / f"{name}-{what}-{which}"
    folder.mkdir()
    for foreign in FOREIGN:
        (folder / foreign).write_text("mine")
    assert child_runs.run(script, arguments(folder), tmp_path / "log", moment=(KILL, what, which))[0] == -KILL
    assert len(list(folder.rglob(".*"))) > len(FOREIGN)  # the kill left something
    code, output = child_runs.run(script, arguments(folder), tmp_path / "log")
    assert code == 0, output
    assert contents(folder) == whole | dict.fromkeys(FOREIGN, b"mine")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 JPEGs of three classes, and what becomes of them: {name: bytes} of `convert` without and with --holdout."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for i in range(24):
        (root / "in" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        image = PIL.Image.fromarray(rng.randint(0, 256, [20, 24, 3], np.uint8))
        image.save(root / "in" / "abc"[i % 3] / f"{i:02d}.jpg", quality=95)
    return root / "in"


def go_on(source, folder, end, *more):
    held = ["--per-source=6", f"--holdout={folder}/h{end}"] if end else []
    words = ["--resolution=16x16", "--transform=center-crop-dhariwal", *held, *more]
    return ["convert", f"--source={source}", f"--dest={folder}/d{end}", *words]


def spoil(paths):
    """Other bytes in files that look the same from outside."""
    for path in paths:
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("end", [".zip", ""], ids=["zips", "folder"])
def test_a_killed_conversion_goes_on(photos, tmp_path, end):
    """Killed again and again, then the bytes of one that was not; what was done is not even read again."""
    source, log = tmp_path / "in", tmp_path / "log"
    shutil.copytree(photos, source)  # with their times
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    assert child_runs.run("dataset_tool", go_on(source, tmp_path / "whole", end), log)[0] == 0
    whole, command = contents(tmp_path / "whole"), go_on(source, tmp_path / "part", end)
    there = set()
    for number, count in ((KILL, 1), (KILL, 5), (KILL, 13), (INT, 4), (KILL, 21)):  # 4: while it reads what is there
        code, output = child_runs.run("dataset_tool", command, log, moment=(number, "item", count))
        assert code == (130 if number == INT else -KILL), output
        assert there <= (there := {*unfinished(tmp_path / "part")})  # nothing is lost again
    first = sorted(source.rglob("*.jpg"), key=lambda path: (path.parent.name, path.name))
    chosen = re.findall(r"img(\d{8})\.png", " ".join(unfinished(tmp_path / "part")))
    assert len(set(chosen)) >= 20
    spoil(first[int(index)] for index in set(chosen))
    code, output = child_runs.run("dataset_tool", command, log)
    assert code == 0 and json.loads(output.splitlines()[-1])["resumed"] == len(set(chosen)), output
    assert contents(tmp_path / "part") == whole
    assert {path.name for path in (tmp_path / "part").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def unfinished(folder):
    """Names of the items that lie whole in what interrupted commands have left, read by none of their code."""
    for place in folder.glob(f".*{TEMPORARY}"):
        if place.is_dir():
            yield from (path.name for path in place.rglob("*.png"))
        else:
            data = place.read_bytes()
            for match in re.finditer(rb"PK\x03\x04.{10}(.{4}).{4}(.{4})(.{2})\x00\x00", data, re.DOTALL):
                crc, size, length = (int.from_bytes(part, "little") for part in match.groups())
                end = match.end() + length
                if zlib.crc32(data[end : end + size]) == crc:
                    yield data[match.end() : end].decode()


def test_only_the_same_work_goes_on(photos, tmp_path):
    """Other options, or an image that has changed: all anew, and nothing of before is left."""
    source, log = tmp_path / "in", tmp_path / "log"
    shutil.copytree(photos, source)
    command = ["convert", f"--source={source}", "--resolution=16x16"]
    for change in ("option", "image", "list"):
        part, whole = tmp_path / f"{change}.zip", tmp_path / "whole.zip"
        assert child_runs.run("dataset_tool", [*command, f"--dest={part}"], log, moment=(KILL, "item", 20))[0] == -KILL
        assert list(tmp_path.glob(f".{part.name}.*{TEMPORARY}"))
        if change == "image":
            shutil.copy(source / "a" / "00.jpg", source / "a" / "03.jpg")
        more = {"option": ["--resolution=8x8"], "list": ["--sources=a,c"]}.get(change, [])
        for dest in (part, whole):
            code, output = child_runs.run("dataset_tool", [*command, f"--dest={dest}", *more, "--overwrite"], log)
            assert code == 0 and json.loads(output.splitlines()[-1])["resumed"] == 0, output
        assert part.read_bytes() == whole.read_bytes() and not list(tmp_path.glob(".*"))


def test_killed_while_replacing_a_folder(world, tmp_path):
    """Between the two renames: the next command of any outcome finds the data set of before."""
    script, arguments, _ = WRITERS["folder"]
    command, log = arguments(tmp_path), tmp_path / "log"
    assert child_runs.run(script, command, log)[0] == 0
    before = contents(tmp_path / "d")
    moment = (KILL, "after-rename", ".d.*.old")
    assert child_runs.run(script, [*command, "--overwrite", "--max-images=3"], log, moment=moment)[0] == -KILL
    assert not (tmp_path / "d").exists()
    code, output = child_runs.run(script, command, log)
    assert code == 2 and "exists already" in output, output
    assert contents(tmp_path / "d") == before and {p.name for p in tmp_path.iterdir()} == {"d", "log"}


def test_what_a_user_put_in_place_after_a_kill_is_not_replaced(world, tmp_path):
    script, arguments, _ = WRITERS["zip"]
    command, log = arguments(tmp_path), tmp_path / "log"
    assert child_runs.run(script, command, log, moment=(KILL, "before-rename", "d.zip"))[0] == -KILL
    (tmp_path / "d.zip").write_bytes((world[0] / "data.zip").read_bytes())
    code, output = child_runs.run(script, command, log)
    assert code == 2 and "exists already" in output, output
    assert (tmp_path / "d.zip").read_bytes() == (world[0] / "data.zip").read_bytes()


@pytest.mark.parametrize("name", ["zips", "images", "detector"])
def test_killed_at_moments_that_nobody_chose(world, tmp_path, name):
    whole, moments = undisturbed(world, name), random.Random(name)
    script, arguments, _ = WRITERS[name]
    folder = world[0] / f"{name}-random"
    folder.mkdir()
    codes = []
    while not {0, 2} & {*codes} and len(codes) < 40:
        process = child_runs.start(script, arguments(folder), tmp_path / "log")
        process.join(moments.uniform(0.001, 0.01) * 1.4 ** len(codes))  # the first before anything can be done
        process.kill()
        codes.append(child_runs.wait(process))
    log = (tmp_path / "log").read_text()
    assert len(codes) > 1 and set(codes[:-1]) == {-KILL}, log
    if codes[-1] == 2:  # killed with everything in place, while it let go of the places one by one
        assert "exists already" in log
        assert {path: data for path, data in contents(folder).items() if not Path(path).name.startswith(".")} == whole
    else:
        assert codes[-1] == 0, log
        assert contents(folder) == whole


@pytest.mark.parametrize("name", WRITERS)
def test_two_commands_into_one_place(world, tmp_path, name):
    """The second says who holds it and changes nothing; the first, stopped meanwhile, ends as if alone."""
    script, arguments, last = WRITERS[name]
    folder = world[0] / f"{name}-raced"
    folder.mkdir()
    moment = (STOP, "after-rename" if name in ("images", "run") else "before-rename", last)
    first = child_runs.start(script, arguments(folder), tmp_path / "log", moment=moment)
    state = lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0]
    while first.is_alive() and state() != "T":
        time.sleep(0.02)
    before = contents(folder)
    code, output = child_runs.run(script, arguments(folder), tmp_path / "log2")
    assert code == 2 and len(output.splitlines()) == 1, output
    assert (
        "is being written by" in output and f"process {first.pid} on " in output and output.startswith("Error: --")
    ), output
    assert contents(folder) == before
    os.kill(first.pid, signal.SIGCONT)
    assert child_runs.wait(first) == 0, (tmp_path / "log").read_text()
    assert not list(folder.rglob(".*"))
    if name != "run":
        assert contents(folder) == undisturbed(world, name)


def test_two_at_the_same_moment(tmp_path):
    """Whoever is first: one of them writes the data set."""
    arguments = WRITERS["zip"][1](tmp_path)
    processes = [child_runs.start("dataset_tool", arguments, tmp_path / f"log{i}") for i in range(3)]
    assert sorted(child_runs.wait(process) for process in processes) == [0, 2, 2]
    assert not list(tmp_path.glob(".*"))


def test_children_of_a_killed_command_do_not_hold_its_lock(tmp_path):
    """Loader processes live on for a moment."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path / "run"):
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
            time.sleep(60)
    child = int(os.read(read, 20))
    with pytest.raises(ValueError, match=f"is being written by process {parent} on "), locked(tmp_path / "run"):
        pass
    os.kill(parent, KILL)
    os.waitpid(parent, 0)
    try:
        with locked(tmp_path / "run"):
            os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, KILL)
