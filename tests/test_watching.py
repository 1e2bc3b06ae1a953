"""Watching a run: its bar and status lines on one terminal, and what trackers are sent, read back by their own reader."""

import contextlib
import importlib.util
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
from small_runs import one_line, run, small_command, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_edm2
from training import hooks, setup, trackers, training_loop


class Terminal(io.StringIO):
    """What a terminal would show."""

    def isatty(self):
        return True

    def screen(self):
        lines = [""]
        for part in re.split(r"([\r\n])", self.getvalue()):
            if part == "\n":
                lines.append("")
                column = 0
            elif part == "\r":
                column = 0
            else:
                at = 0 if not lines[-1] else column
                lines[-1] = lines[-1][:at] + part + lines[-1][at + len(part) :]
                column = at + len(part)
        return [line.rstrip() for line in lines]


def test_status_lines_stand_above_the_bar(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SHOW_LOSS", -1)
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        setup.train(small_config(digits, snapshot_nimg=0), tmp_path / "run")
    shown = terminal.screen()
    status = [line for line in shown if "Status:" in line]
    assert len(status) == 3 and all(re.fullmatch(r"Status: kimg [\d.]+ .*\d", line) for line in status), shown
    bars = [line for line in shown if "img/s" in line]
    assert len(bars) == 1 and re.fullmatch(
        r"loss \d\.\d{4} .*2\.05k/2\.05k \[\d\d:\d\d<\d\d:\d\d, .*img/s\]", bars[0]
    ), shown


def test_the_loss_of_the_bar_is_that_of_the_status_line(digits, tmp_path):
    """Of one rank, the running mean becomes the mean that the next status line reports."""
    seen = []

    class Spy(training_loop.Collector):
        def means(self):
            before = self.so_far("Loss/loss")
            found = super().means()
            seen.append((before, found.get("Loss/loss"), self.so_far("Loss/loss")))
            return found

    loop = setup.build(small_config(digits, snapshot_nimg=0), "cpu").loop(tmp_path / "run")
    loop.stats = Spy()
    loop.run()
    assert seen[0][1] is None and len(seen) == 3
    assert all(before == mean and after is None for before, mean, after in seen)


def read(run_dir):
    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return reader.Reload()


@pytest.fixture(scope="module")
def logged(digits, tmp_path_factory):
    """A run of a learned process with a selection, stopped and resumed: every line, grid and option in event files."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    more = [
        "--log=tensorboard",
        "--grid=True",
        "--grid-every=1Ki",
        "--snapshot=2Ki",
        "--process=learned",
        "--select=random",
    ]
    words = [word for word in small_command(digits, run_dir) if not word.startswith(("--grid", "--snapshot"))]
    run(train_edm2.main, *words, *more, "--slice=1Ki")
    run(train_edm2.main, *words, *more)
    return run_dir


def test_tensorboard_reads_every_number(logged):
    reader = read(logged)
    lines = [json.loads(line) for line in (logged / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0, 1.024, 2.048]
    names = {name for line in lines for name, value in line.items() if value is not None} - {"timestamp"}
    assert names == set(reader.Tags()["scalars"])
    assert {"Process/Q01", "Process/min_eigenvalue", "Selection/time_share", "Loss/loss", "Loss/learning_rate"} <= names
    for name in names:
        found = [(event.step, event.value) for event in reader.Scalars(name)]
        assert found == [
            (round(line["Progress/kimg"] * 1e3), np.float32(line[name])) for line in lines if line.get(name) is not None
        ]
    text = reader.Tensors("options/text_summary")[-1].tensor_proto.string_val[0]
    options = json.loads(text.decode().strip("`").removeprefix("json"))
    assert options["process"] == "learned" and options["batch_size"] == 128


def test_tensorboard_reads_every_grid(logged):
    images = read(logged).Images("samples")
    paths = sorted(logged.glob("samples-*.png"))
    assert [image.step for image in images] == [1024, 2048] and len(paths) == 2  # of the grid before the stop, once
    for image, path in zip(images, paths, strict=True):
        sent, written = (
            np.asarray(PIL.Image.open(f).convert("RGB")) for f in (io.BytesIO(image.encoded_image_string), path)
        )
        assert np.array_equal(sent, written)


def test_what_is_refused(digits, tmp_path, monkeypatch):
    words = [*small_command(digits, tmp_path / "run")]
    one_line(train_edm2.main, *words, "--log=mlflow", says=["--log", "tensorboard", "wandb", "trackio"])
    one_line(train_edm2.main, *words, "--grid-every=100", says=["--grid-every", "--status=1024"])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "trackio" else found(name, *more)
    )
    one_line(train_edm2.main, *words, "--log=trackio", says=["--log=trackio", "pip install trackio"])
    assert not (tmp_path / "run" / "stats.jsonl").exists()


def test_a_tracker_that_cannot_start_is_one_line(digits, tmp_path, monkeypatch):
    """As W&B without a key; nothing is trained without what was asked for."""

    class Broken:
        package = "json"

        def __init__(self, *_):
            raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    words = small_command(digits, tmp_path / "run", "--log=tensorboard")
    one_line(train_edm2.main, *words, says=["--log=tensorboard", "api_key not configured"])


def test_ctrl_c_is_answered(capfd, monkeypatch):
    """At once, on stderr, whatever the step is at; the second one interrupts."""
    handlers = {}
    monkeypatch.setattr(hooks.signal, "signal", lambda number, handle: handlers.update({number: handle}))
    stop = hooks.stop_on_signal()
    assert not stop() and capfd.readouterr().err == ""
    handlers[hooks.signal.SIGINT](hooks.signal.SIGINT, None)
    assert stop() and capfd.readouterr().err == f"\n{hooks.STOPPING}\n" and "checkpoint" in hooks.STOPPING
    handlers[hooks.signal.SIGTERM](hooks.signal.SIGTERM, None)
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        handlers[hooks.signal.SIGINT](hooks.signal.SIGINT, None)
