"""Random input of every kind: an answer or one clear error, never a traceback (property-based, hypothesis)."""

import io
import json
import os
import struct
import zipfile

import click
import PIL.Image
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from small_runs import run

import generate_images
import train_edm2
from dnnlib import format_nimg, parse_nimg, parse_seeds
from dnnlib.util import MAX_SEEDS
from training import dry_run, generation, setup
from training.dataset import ImageFolderDataset
from training.dataset.labels import parse_meta

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def answers(function, *arguments):
    """The result, or None for a ValueError of one line; anything else is a failure."""
    try:
        return function(*arguments)
    except ValueError as err:
        assert str(err) and "Traceback" not in str(err)
        return None


# --- dataset.json -----------------------------------------------------------------------------------------------------

LABELS = st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "c"]), JSON).map(list) | JSON, max_size=4) | JSON
META = st.fixed_dictionaries({}, optional={"labels": LABELS, "num_classes": JSON, "class_names": JSON, "more": JSON})


def png():
    buffer = io.BytesIO()
    PIL.Image.new("L", (2, 2), 7).save(buffer, "png")
    return buffer.getvalue()


PNG = png()


def read_everything(path):
    """What training does with a data set."""
    data = ImageFolderDataset(path)
    for index in range(len(data)):
        image, label = data[index]
        assert image.shape == tuple(data.image_shape) and label.shape == tuple(data.label_shape)
    return data


@QUICK
@given(META | JSON)
@example({"labels": [["a.png", 0], ["b.png", True]]})
@example({"labels": [["a.png", 10**30], ["b.png", 0]]})
@example({"labels": [["a.png", [1.0]], ["b.png", [1.0, 2.0]]]})
@example({"labels": [["a.png", [1e400]], ["b.png", [0.0]]]})
@example({"labels": [["a.png", 0], ["b.png", [0.0]]], "num_classes": 3})
@example({"labels": [["a.png", []], ["b.png", []]]})
def test_any_dataset_json(tmp_path_factory, meta):
    text = json.dumps(meta)
    folder = tmp_path_factory.mktemp("data")
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(PNG)
    (folder / "dataset.json").write_text(text)
    data = answers(read_everything, folder)
    if data is not None and data.has_labels and data.has_onehot_labels:
        stored = dict(map(tuple, meta["labels"]))
        assert [int(data.get_label(i).argmax()) for i in range(2)] == [stored["a.png"], stored["b.png"]]


@QUICK
@given(st.binary(max_size=60))
@example(b"[" * 5000)
@example(b'{"labels": ' + b"[" * 3000)
@example(b"\xef\xbb\xbf{}")
@example(b'{"labels": null, "labels": [["a", NaN]]}')
def test_any_bytes_as_dataset_json(data):
    answers(parse_meta, data)


# --- zip reader -------------------------------------------------------------------------------------------------------


def whole_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("a.png", "b.png"):
            file.writestr(name, PNG)
        file.writestr("dataset.json", '{"labels": [["a.png", 0], ["b.png", 1]]}')
    return buffer.getvalue()


ZIP = whole_zip()


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, len(ZIP) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 40)
)
def test_any_damage_to_a_zip(tmp_path_factory, changes, cut):
    data = bytearray(ZIP)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.mktemp("zip") / "data.zip"
    path.write_bytes(data[: len(data) - cut])
    answers(read_everything, path)


@QUICK
@given(st.binary(max_size=200))
@example(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
def test_any_bytes_as_a_zip(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("zip") / "data.zip"
    path.write_bytes(data)
    answers(read_everything, path)


@QUICK
@given(st.text(min_size=1, max_size=12))
@example("../../x.png")
@example("/etc/x.png")
@example("x\x00.png")
def test_any_name_in_a_zip(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("zip") / "data.zip"
    try:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name + ".png", PNG)
    except (UnicodeEncodeError, ValueError):
        assume(False)
    before = set(os.listdir(path.parent))
    answers(read_everything, path)
    assert set(os.listdir(path.parent)) == before  # reading writes nothing


# --- seeds and counts -------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 50)), min_size=1, max_size=5))
def test_seed_ranges_are_what_they_say(ranges):
    text = ",".join(str(a) if n == 0 else f"{a}-{a + n}" for a, n in ranges)
    assert parse_seeds(text) == [seed for a, n in ranges for seed in range(a, a + n + 1)]
    assert parse_seeds(",".join(f"{a}+{n + 1}" for a, n in ranges)) == parse_seeds(text)


@QUICK
@given(st.text(alphabet="0123456789,-+ a.", max_size=14))
@example("1-" + "9" * 30)
@example("0-100000000")
def test_any_text_as_seeds(text):
    seeds = answers(parse_seeds, text)
    assert seeds is None or (0 < len(seeds) <= MAX_SEEDS and all(seed >= 0 for seed in seeds))


@QUICK
@given(st.integers(0, 2**50))
def test_counts_round_trip(count):
    assert parse_nimg(format_nimg(count)) == count


@QUICK
@given(st.text(max_size=8))
@example("9" * 5000)
def test_any_text_as_a_count(text):
    count = answers(parse_nimg, text)
    assert count is None or count >= 0


# --- command lines ----------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.integers(-5, 10**7).map(str),
    st.floats(width=32).map(str),
    st.sampled_from(
        ["", "nan", "inf", "-1", "0", "1e309", "True", "1,2", ",", "None", "{}", "\x00", "64Ki", "'", "--", "/"]
    ),
    st.text(max_size=6),
)
TRAIN = [p for p in train_edm2.main.params if p.name not in ("config", "dry_run", "outdir", "data", "help")]
GENERATE = [p for p in generate_images.main.params if p.name not in ("config", "outdir", "help")]


@pytest.fixture(autouse=True)
def no_estimates(monkeypatch):
    """Options are tested here, not what a run costs."""
    monkeypatch.setattr(dry_run, "of_training", lambda *args: "")


def options(params):
    """A few options of a command with random values."""
    valued = [p for p in params if isinstance(p, click.Option) and not p.is_flag]
    return st.lists(st.tuples(st.sampled_from([p.opts[0] for p in valued]), WORDS), min_size=1, max_size=3)


def one_line_or_success(command, *arguments):
    result = run(command, *arguments, code=(0, 2))
    if result.exit_code == 2:
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and "Traceback" not in result.stderr


@QUICK
@given(options(TRAIN))
def test_any_training_options(digits, chosen):
    command = [
        "--outdir=x",
        f"--data={digits}",
        "--preset=digits8",
        "--dry-run",
        *(f"{name}={value}" for name, value in chosen),
    ]
    one_line_or_success(train_edm2.main, *command)


@settings(QUICK, max_examples=40)
@given(options([p for p in TRAIN if p.name not in ("channels", "num_blocks", "channel_mult", "batch_size", "device")]))
def test_any_training_options_up_to_the_start(digits, tmp_path_factory, chosen):
    """All of a run but the training: whatever passes the options must build, or say what is wrong."""
    outdir = tmp_path_factory.mktemp("run") / "run"
    command = [f"--outdir={outdir}", f"--data={digits}", "--preset=digits8", "--channels=8", "--device=cpu"]
    command += [f"{name}={value}" for name, value in chosen]

    def started(*args, **kwargs):
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.Run, "start", started)
        one_line_or_success(train_edm2.main, *command)


@QUICK
@given(options(GENERATE))
def test_any_generation_options(tmp_path_factory, tiny_snapshot, chosen):
    outdir = tmp_path_factory.mktemp("out") / "out"
    command = [f"--net={tiny_snapshot}", f"--outdir={outdir}", "--device=cpu", *(f"{n}={v}" for n, v in chosen)]

    def started(*args, **kwargs):
        return iter([])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate_images", started)
        one_line_or_success(generate_images.main, *command)


@pytest.fixture(scope="module")
def tiny_snapshot(tmp_path_factory):
    from torch_utils.persistence import save_snapshot
    from training.networks_edm2 import Precond

    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_snapshot(path, Precond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, channels_per_head=8))
    return path


@QUICK
@given(JSON)
def test_any_configuration_file(digits, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(json.dumps(content))
    command = ["--outdir=x", f"--data={digits}", "--preset=digits8", "--dry-run", f"--config={path}"]
    one_line_or_success(train_edm2.main, *command)


@QUICK
@given(st.dictionaries(st.sampled_from([p.name for p in TRAIN]), JSON, max_size=3))
def test_any_values_in_a_configuration_file(digits, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(json.dumps(content))
    command = ["--outdir=x", f"--data={digits}", "--preset=digits8", "--dry-run", f"--config={path}"]
    one_line_or_success(train_edm2.main, *command)
