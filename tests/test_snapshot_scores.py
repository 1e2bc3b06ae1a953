"""gen over all snapshots of a run and blocks of seeds, and the same as a hook of training: kept, resumed, equal."""

import json

import pytest
from small_runs import assert_identical, final_state, one_line, run, small_command

import calculate_metrics
import dataset_tool
import train_edm2
from metrics import snapshots
from torch_utils.persistence import save_snapshot

METRICS = calculate_metrics.cmdline
HOW = ["--num=6", "--steps=1", "--splits=0", "--distances=fd,kid", "--device=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """A folder with a reference, and run folders: `run` with snapshots of two times and averages, `other` with one."""
    from training.networks_edm2 import Precond

    folder = tmp_path_factory.mktemp("runs")
    run(METRICS, "ref", f"--data={digits}", f"--dest={folder}/ref.npz", "--device=cpu")
    for i, (name, kimg, ema) in enumerate(
        [("run", 1, "0.050"), ("run", 1, "0.100"), ("run", 2, "0.050"), ("other", 1, "ema")]
    ):
        net = Precond(
            8, 1, 10, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8
        )
        net.unet.out_gain.data.fill_(1 + i)
        path = folder / name / f"network-snapshot-{kimg:07d}-{ema}.safetensors"
        save_snapshot(path, net.eval(), nimg=kimg * 1024, ema=ema)
    save_snapshot(folder / "run" / "network-snapshot-best.safetensors", net, nimg=2048, ema="0.050")
    return folder


def gen(made, *more, net="run/*.safetensors"):
    return json.loads(run(METRICS, "gen", f"--net={made}/{net}", f"--ref={made}/ref.npz", *HOW, *more).stdout)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_snapshot_on_every_block(made, tmp_path):
    out = tmp_path / "scores"
    found = gen(made, "--blocks=2", f"--outdir={out}")
    rows = lines(out)
    names = ["0000001-0.050", "0000001-0.100", "0000002-0.050"]  # the best is another file of a time that is there
    assert [(r["tags"]["checkpoint"], r["tags"]["sampling"]) for r in rows] == [
        (n, s) for n in names for s in ("0", "6")
    ]
    alone = gen(made, "--seed=6", net="run/network-snapshot-0000001-0.100.safetensors")
    assert alone["metrics"] == rows[3]["metrics"] and alone["scores"] == rows[3]["scores"]
    best = found["metrics"]["pixel"]["best"]["fd_pixel"]
    for i, name in enumerate(names):
        a, b = (row["scores"]["fd_pixel"] for row in rows[2 * i : 2 * i + 2])
        expected = {"min": min(a, b), "mean": (a + b) / 2, "sd": abs(a - b) / 2**0.5, "blocks": 2}
        assert best["checkpoints"][name] == pytest.approx(expected)
    assert best["min"] == min(row["scores"]["fd_pixel"] for row in rows)
    assert found["files"] == [f"{out}/metrics.{end}" for end in ("jsonl", "png", "svg")] and found["seeds"] == [0, 6]
    assert json.loads(run(METRICS, "best", f"--scores={out}/metrics.jsonl").stdout) == best
    assert 'id="legend_1"' in (out / "metrics.svg").read_text()


def test_finished_scores_are_kept_and_others_made(made, tmp_path, monkeypatch):
    out, seen, real = f"--outdir={tmp_path}/cut", [], snapshots.generated

    def generated(snapshot, first, *rest):
        if seen == ["0000001-0.050"]:
            seen.clear()
            raise KeyboardInterrupt
        seen.append(f"{snapshot.header['nimg'] // 1000:07d}-{snapshot.header['ema']}")
        return real(snapshot, first, *rest)

    monkeypatch.setattr(snapshots, "generated", generated)
    run(METRICS, "gen", f"--net={made}/run/*.safetensors", f"--ref={made}/ref.npz", *HOW, out, code=130)
    (kept,) = lines(tmp_path / "cut")
    whole = gen(made, out)
    assert seen == ["0000001-0.100", "0000002-0.050"] and lines(tmp_path / "cut")[0] == kept
    assert gen(made, out) == whole and len(seen) == 2  # all are there
    gen(made, out, "--min-kimg=2", "--batch=3")
    assert len(seen) == 2 and [row["kimg"] for row in lines(tmp_path / "cut")] == [2]
    gen(made, out, "--min-kimg=2", "--sigma_max=40")
    assert seen[2:] == ["0000002-0.050"]  # other options: nothing of before is taken


def test_training_scores_its_snapshots(made, digits, tmp_path):
    """Stopped and resumed, the hook leaves training as it is to the bit, and finds what gen finds in the files."""
    more = ["--eval-every=1Ki", "--eval-num=6", f"--eval-ref={made}/ref.npz"]
    run(train_edm2.main, *small_command(digits, tmp_path / "plain"))
    run(train_edm2.main, *small_command(digits, tmp_path / "scored", *more, "--slice=1Ki"))
    half = lines(tmp_path / "scored" / "metrics")
    run(train_edm2.main, *small_command(digits, tmp_path / "scored", *more))
    assert_identical(final_state(tmp_path / "scored"), final_state(tmp_path / "plain"))
    rows = lines(tmp_path / "scored" / "metrics")
    assert [row["kimg"] for row in half] == [1] and [row["kimg"] for row in rows] == [1, 2] and rows[:1] == half
    assert (tmp_path / "scored" / "metrics" / "metrics.png").is_file()
    same = [
        "gen",
        f"--net={tmp_path}/plain/network-snapshot-0000002*",
        f"--ref={made}/ref.npz",
        "--num=6",
        "--device=cpu",
    ]
    run(METRICS, *same)
    (found,) = lines(tmp_path / "plain" / "metrics")  # where a pattern without --outdir puts it
    assert found["metrics"] == rows[1]["metrics"]


def test_bad_input_of_training(made, digits, tmp_path):
    train = lambda *more: small_command(digits, tmp_path / "run", *more)
    ref = f"--eval-ref={made}/ref.npz"
    run(dataset_tool.main, "convert", f"--source={digits}", f"--dest={tmp_path}/rgb.zip", "--channels=3")
    run(METRICS, "ref", f"--data={tmp_path}/rgb.zip", f"--dest={tmp_path}/rgb.npz", "--device=cpu")
    for words, more in [
        (["--eval-every=1024", "--eval-ref"], ["--eval-every=1Ki"]),
        (["--eval-ref=", "--eval-every"], [ref]),
        (["--eval-every=1536", "--snapshot=1024"], ["--eval-every=1536", ref]),
        (["no.npz"], ["--eval-every=1Ki", f"--eval-ref={tmp_path}/no.npz"]),
        (["nope"], ["--eval-every=1Ki", ref, "--eval-metrics=nope"]),
        (["img_channels=3", "img_channels=1"], ["--eval-every=1Ki", f"--eval-ref={tmp_path}/rgb.npz"]),
    ]:
        one_line(train_edm2.main, *train(*more), says=words)
    assert not (tmp_path / "run").exists()


def test_bad_input_of_gen(made, tmp_path):
    before = sorted(made.rglob("*"))
    for words, *args in [
        (["--net=", "no snapshot matches"], "run/none-*.safetensors"),
        (["several folders"], "*/network-snapshot-*.safetensors"),
        (["--min-kimg=3", "1 to 2 kimg"], "run/*.safetensors", "--min-kimg=3"),
        (["--min-kimg", "pattern"], "run/network-snapshot-0000001-0.050.safetensors", "--min-kimg=1"),
        (["--outdir=", "not a folder of scores"], "run/*.safetensors", f"--outdir={made}/run"),
    ]:
        one_line(METRICS, "gen", f"--net={made}/{args[0]}", f"--ref={made}/ref.npz", *HOW, *args[1:], says=words)
    assert sorted(made.rglob("*")) == before


def test_a_snapshot_without_its_time(made, tmp_path, tiny_net):
    save_snapshot(tmp_path / "a.safetensors", tiny_net())
    common = [f"--ref={made}/ref.npz", *HOW]
    one_line(METRICS, "gen", f"--net={tmp_path}/*.safetensors", *common, says="does not say how long")
    alone = run(METRICS, "gen", f"--net={tmp_path}/a.safetensors", "--blocks=2", *common)
    assert json.loads(alone.stdout)["metrics"]["pixel"]["best"]["fd_pixel"]["checkpoints"]["a"]["blocks"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]  # nothing written
