"""Command lines: configuration files, option types, and one line with exit code 2 for every mistake."""

import json
import re
import shlex

import click
import pytest
from small_runs import one_line, python, run

import calculate_metrics
import dataset_tool
import generate_images
import run_experiment
import train_edm2
from dnnlib import cli, format_nimg, parse_nimg, parse_seeds
from dnnlib.util import natural_key
from training import training_loop

SCRIPTS = {
    "train_edm2": train_edm2.main,
    "generate_images": generate_images.main,
    "calculate_metrics": calculate_metrics.cmdline,
    "dataset_tool": dataset_tool.main,
    "run_experiment": run_experiment.main,
}

# The training command of the multi-source experiments, as published (braces filled in as its text says).
PUBLISHED = r"""
train_edm2.py \
      --outdir=training-runs/sim3-edm2-img256-xs-10c-1000 \
      --data=datasets/latent_datasets/sim3/inet-256-10c-1000.zip \
      --preset=edm2-img256-xs-10c-1000 \
      --batch=8192 --status=64Ki --snapshot=16Mi --checkpoint=64Mi
"""


def shown(*arguments):
    """The configuration that a dry run of training prints, before it finds that there are no data."""
    text = run(train_edm2.main, *arguments, "--dry-run", code=(0, 2)).stdout
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def test_published_command_as_typed():
    command = shlex.split(PUBLISHED.replace("\\\n", " "))
    config = shown(*command[1:])
    assert config["batch_size"] == 8192 and config["total_nimg"] == 402653184 and config["channels"] == 128
    assert (config["status_nimg"], config["snapshot_nimg"], config["checkpoint_nimg"]) == (2**16, 2**24, 2**26)
    assert (config["lr"], config["decay"], config["cond"], config["seed"]) == (0.006, 3000, True, 0)


def test_it_is_a_program(tmp_path):
    options = [f"--outdir={tmp_path}/run", "--data=nowhere.zip", "--preset=digits8", "--device=cpu"]
    done = python("train_edm2.py", *options, code=2)
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
    assert "nowhere.zip" in done.stderr and not (tmp_path / "run").exists()


def test_explicit_options_win_over_the_preset():
    config = shown(
        "--outdir=x", "--data=y.zip", "--preset=digits8", "--lr=0.5", "--batch=128", "--duration=1Mi", "--cond=False",
        "--P_mean=-1", "--ema-std=0.05,0.2", "--channel-mult=1,2,4", "--betas=0.5,0.6", "--seed=3",
    )  # fmt: skip
    wanted = dict(lr=0.5, batch_size=128, total_nimg=2**20, cond=False, P_mean=-1, ema_std=[0.05, 0.2], seed=3)
    assert {key: config[key] for key in wanted} == wanted
    assert config["channel_mult"] == [1, 2, 4] and config["betas"] == [0.5, 0.6] and config["decay"] == 500


# --- configuration files ----------------------------------------------------------------------------------------------


def test_configuration_files(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "outdir: x\ndata: y.zip\npreset: digits8\nlr: 0.1\nbatch: 128\nduration: 1Mi\nchannel_mult: [1, 2]\n"
    )
    second.write_text("lr: 0.2\nema-std: [0.05, 0.1]\nP_mean: -2\n")
    base = shown(f"--config={first}")
    assert (base["data"], base["lr"], base["batch_size"], base["total_nimg"]) == ("y.zip", 0.1, 128, 2**20)
    assert base["channel_mult"] == [1, 2]
    both = shown(f"--config={first}", f"--config={second}")
    assert (both["lr"], both["batch_size"], both["ema_std"], both["P_mean"]) == (0.2, 128, [0.05, 0.1], -2)
    given = shown(f"--config={first}", "--lr=0.3", f"--config={second}")
    assert given["lr"] == 0.3  # the command line wins over all, wherever it stands


@pytest.mark.parametrize(
    "text, part",
    [
        ("learning: 1", "'learning' is no option"),
        ("- 1", "must map option names"),
        ("lr: [", "config.yaml"),
        ("lr: much", "much"),
        ("batch: 1.5", "1.5"),
        ("1: 2", "1 is no option"),
        ("config: other.yaml", "config"),
        ("\x00", "config.yaml"),
    ],
)
def test_wrong_configuration_files(tmp_path, text, part):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    one_line(train_edm2.main, "--outdir=x", "--data=y.zip", f"--config={path}", "-n", says=part)


def test_missing_configuration_file():
    one_line(train_edm2.main, "--outdir=x", "--data=y.zip", "--config=nowhere.yaml", "-n", says="nowhere.yaml")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_takes_a_configuration_file_and_answers_in_one_line(name):
    command = SCRIPTS[name]
    leaves = getattr(command, "commands", {name: command})
    for path, leaf in leaves.items():
        given = [path] if leaf is not command else []
        assert any(p.name == "config" for p in leaf.params), path
        run(command, *given, "--help")
        one_line(command, *given, "--no-such-option=1")
        one_line(command, *given, "--config=nowhere.yaml", says="nowhere.yaml")
        if any(p.required for p in leaf.params):
            one_line(command, *given, says="Missing")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--preset=edm2-img999"], ["edm2-img999", "did you mean edm2-img", "--list-presets"]),
        (["--duration=1000"], ["--duration=1000", "--batch=64", "960"]),
        (["--batch=96"], ["131072 must be a multiple of --batch=96"]),
        (["--batch=0"], ["--batch=0"]),
        (["--batch=ten"], ["--batch", "ten", "Ki"]),
        (["--snapshot=128"], ["--snapshot=128", "1Ki"]),
        (["--lr=-1"], ["--lr=-1"]),
        (["--lr=nan"], ["--lr=nan"]),
        (["--lr=inf"], ["--lr=inf"]),
        (["--P_std=0"], ["--P_std=0"]),
        (["--P_mean=nan"], ["--P_mean=nan"]),
        (["--sigma-data=0"], ["--sigma-data=0"]),
        (["--betas=0.9"], ["--betas=[0.9]"]),
        (["--betas=0.9,1"], ["--betas=[0.9, 1.0]"]),
        (["--betas=a,b"], ["--betas", "a,b"]),
        (["--dropout=2"], ["--dropout", "2"]),
        (["--ema-std=0.5"], ["--ema-std=[0.5]", "0.2887"]),
        (["--ema-std=0"], ["--ema-std"]),
        (["--ema=halflife", "--ema-halflife=0"], ["--ema-halflife=0"]),
        (["--ema=decay", "--ema-decay=1"], ["--ema-decay=1"]),
        (["--grad-clip=0"], ["--grad-clip=0"]),
        (["--weight-decay=-1"], ["--weight-decay=-1"]),
        (["--decay=-1"], ["--decay=-1"]),
        (["--rampup=nan"], ["--rampup=nan"]),
        (["--ls=0"], ["--ls=0"]),
        (["--augment=0.1"], ["--augment=0.1", "--arch"]),
        (["--aug-dim=64"], ["--aug-dim=64", "--process=pfgmpp"]),
        (["--process=pfgmpp", "--aug-dim=0"], ["--aug-dim=0"]),
        (["--process=pfgmpp", "--aug-dim=nan"], ["--aug-dim=nan"]),
        (["--process=xyz"], ["xyz", "pfgmpp"]),
        (["--select=jist"], ["--select=jist", "did you mean jest?", "known: "]),
        (["--lr-schedule=konstant"], ["--lr-schedule=konstant", "did you mean constant?"]),
        (["--arch=unet"], ["--arch=unet", "edm2"]),
        (["--loss=l2"], ["--loss=l2", "edm2"]),
        (["--arch=ddpmpp", "--precond=x", "--loss=edm"], ["--precond=x"]),
        (["--optimizer=sgd"], ["sgd", "adam"]),
        (["--lr-schedule=linear"], ["linear", "edm2"]),
        (["--select=best"], ["--select=best", "jest"]),
        (["--select=jest"], ["--reference"]),
        (["--select=random", "--filter-ratio=1"], ["filter", "1"]),
        (["--score-scale=nan", "--select=hard"], ["--score-scale=nan"]),
        (["--resume=nowhere.pt"], ["nowhere.pt"]),
        (["--init=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--reference=nowhere.safetensors", "--select=jest"], ["nowhere.safetensors"]),
        (["--val-data=nowhere.zip"], ["nowhere.zip"]),
        (["--max-images=0"], ["--max-images"]),
        (["--channels=0"], ["--channels"]),
        (["--channel-mult=1,2,3,4,5"], ["img_resolution=8", "channel_mult"]),
        (["--device=abacus"], ["abacus"]),
        (["--device=cuda:99"], ["cuda:99"]),
        (["--seed=-1"], ["--seed"]),
        (["--block=0"], ["--block"]),
        (["--outdir="], ["outdir"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0].startswith("--") else "",
)
def test_mistakes_in_training_options(digits, tmp_path, options, parts, monkeypatch):
    """Answered before work starts: nothing is written."""

    def started(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr(training_loop.TrainingLoop, "run", started)
    outdir = tmp_path / "run"
    given = [f"--outdir={outdir}", f"--data={digits}", "--preset=digits8", "--device=cpu"]
    one_line(train_edm2.main, *given, *options, says=parts)
    assert not outdir.exists()


def test_missing_options():
    one_line(train_edm2.main, "--data=x.zip", says="--outdir")
    one_line(train_edm2.main, "--outdir=x", says="--data")


@pytest.mark.parametrize(
    "options, parts",
    [
        ([], ["--net"]),
        (["--net=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--net=x", "--seeds=5-1"], ["--seeds", "5-1"]),
        (["--net=x", "--seeds=a"], ["--seeds", "'a'"]),
        (["--net=x", "--class=first"], ["first", "balanced"]),
        (["--net=x", "--class=-1"], ["-1"]),
        (["--net=x", "--guidance=2"], ["--guidance=2", "--gnet"]),
        (["--net=x", "--guidance-interval=1"], ["--guidance-interval"]),
        (["--net=x", "--steps=0"], ["--steps"]),
        (["--net=x", "--sigma_min=0"], ["--sigma_min"]),
        (["--net=x", "--batch=0"], ["--batch"]),
        (["--preset=nothing"], ["nothing"]),
    ],
    ids=str,
)
def test_mistakes_in_generation_options(tmp_path, options, parts):
    one_line(generate_images.main, f"--outdir={tmp_path / 'out'}", "--device=cpu", *options, says=parts)
    assert not (tmp_path / "out").exists()


# --- option types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value", [("0", 0), ("64", 64), ("64Ki", 65536), ("3Mi", 3 * 2**20), ("2Gi", 2**31), (512, 512)]
)
def test_counts_of_images(text, value):
    assert parse_nimg(text) == value
    assert parse_nimg(format_nimg(value)) == value


@pytest.mark.parametrize("text", ["", "ki", "1.5Mi", "-1", "1ki", "1 Ki", "1K", "1e3", "0x10", "١"])
def test_wrong_counts(text):
    with pytest.raises(ValueError, match="no count of images"):
        parse_nimg(text)


@pytest.mark.parametrize(
    "text, seeds",
    [
        ("3", [3]),
        ("1,2,5-10", [1, 2, 5, 6, 7, 8, 9, 10]),
        ("0-0", [0]),
        ("7,7", [7, 7]),
        ("10+3", [10, 11, 12]),
        ("5, 6", [5, 6]),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "a", "1-", "-1", "3-1", "1--2", "1.5", "0-99999999999", "1+0", "1-2-3"]
)
def test_wrong_seeds(text):
    with pytest.raises(ValueError, match="seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(
    "text, values",
    [("3", [3]), ("1, 2,5-7", [1, 2, 5, 6, 7]), ("-2,0-0", [-2, 0]), ("-1-1", [-1, 0, 1]), ([4, 5], [4, 5]), (6, [6])],
)
def test_lists_of_integers(text, values):
    assert cli.INTS.convert(text, None, None) == values


@pytest.mark.parametrize("text", ["", "a", "1,", "1.5", "3-1", "1-", "0-99999999", "1--2", "nan"])
def test_wrong_lists_of_integers(text):
    with pytest.raises(click.BadParameter, match="list of integers"):
        cli.INTS.convert(text, None, None)


def test_errors_of_libraries_become_one_line(monkeypatch):
    @cli.command()
    def main():
        raise ValueError("several\nlines")

    one_line(main, says="several lines")

    @cli.command()
    def full():
        raise OSError(28, "No space left on device", "file.bin")

    one_line(full, says=["No space left", "file.bin"])
    monkeypatch.setenv("DNNLIB_TRACEBACK", "1")
    with pytest.raises(ValueError, match="several"):
        main.main([])


def test_help_names_the_exit_codes():
    text = re.sub(r"\s+", " ", run(train_edm2.main, "--help").output)
    assert "75 stopped by SIGTERM, SIGINT or SIGUSR1" in text and "2 bad input" in text


def test_natural_order():
    names = ["cfg-1.25", "cfg-1.5", "cfg-2", "cfg-10", "none", "x2y", "x10", "x10.npz"]
    assert sorted(sorted(names), key=natural_key) == names
