"""Averages made after training: against exact arithmetic, against averages tracked online, from ours and NVIDIA's files."""

import copy
import json
import multiprocessing
import os
import re
from pathlib import Path

import foreign_files as theirs
import mpmath
import numpy as np
import pytest
import scipy.integrate
import torch
from small_runs import one_line, run

import reconstruct_phema
from torch_utils import persistence
from torch_utils.persistence import load_snapshot, save_snapshot
from training import phema
from training.encoders import StandardRGBEncoder
from training.networks_toy import MLPDenoiser
from training.processes import PFGMpp

STEP = 1024 * 64


def exact(times, stds, end, wanted):
    """The coefficients in fifty digits: Gram matrix of t^gamma on [0, end], solved, each column summing to one."""
    with mpmath.workdps(50):
        gamma = lambda std: mpmath.findroot(
            lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3)) - mpmath.mpf(std) ** 2, float(phema.std_to_exp(std))
        )

        def product(a, b):  # the shorter profile ends first: int_0^min
            (ta, ga), (tb, gb) = sorted([a, b], key=lambda p: p[0])
            return (ga + 1) * (gb + 1) / (ga + gb + 1) * ta**gb / tb ** (gb + 1)

        own = [(mpmath.mpf(t) / times[0], gamma(std)) for t, std in zip(times, stds, strict=True)]
        columns = []
        for std in wanted:
            goal = (mpmath.mpf(end) / times[0], gamma(std))
            A = mpmath.matrix([[product(a, b) for b in own] for a in own])
            x = mpmath.lu_solve(A, mpmath.matrix([product(a, goal) for a in own]))
            columns.append([float(v / sum(x)) for v in x])
    return np.array(columns).T


@pytest.mark.parametrize("count, wanted", [(1, [0.06, 0.09]), (2, [0.075, 0.15]), (4, [0.04, 0.1, 0.2])])
def test_coefficients_to_ten_digits(count, wanted):
    times, stds = np.repeat(np.arange(1, count + 1) * 8 * 2**20, 2).tolist(), [0.05, 0.1] * count
    found = phema.solve_posthoc_coefficients(times, stds, times[-1], wanted)
    np.testing.assert_allclose(found, exact(times, stds, times[-1], wanted), rtol=0, atol=1e-10)


def test_the_fit_error_is_the_distance_of_the_profiles():
    times, stds, wanted = [1.0, 1.0, 2.0, 2.0], [0.05, 0.1] * 2, [0.07, 0.2]
    x = phema.solve_posthoc_coefficients(times, stds, 2.0, wanted)

    def profile(t, end, std):
        g = phema.std_to_exp(std)
        return (g + 1) / end * (t / end) ** g if t <= end else 0.0

    for column, std, found in zip(x.T, wanted, phema.profile_error(times, stds, 2.0, wanted, x), strict=True):

        def gap(t, w=column, std=std):
            mixture = sum(a * profile(t, e, s) for a, e, s in zip(w, times, stds, strict=True))
            return (mixture - profile(t, 2.0, std)) ** 2

        off = scipy.integrate.quad(gap, 0, 2, points=[1], limit=200)[0]
        size = scipy.integrate.quad(lambda t, s=std: profile(t, 2.0, s) ** 2, 0, 2)[0]
        assert found == pytest.approx(np.sqrt(off / size), rel=1e-5)
    exactly = phema.solve_posthoc_coefficients(times, stds, 2.0, [0.1])
    assert phema.profile_error(times, stds, 2.0, [0.1], exactly) < 1e-6


def wandering(folder, stds, tracked, dtype, steps, every, kind):
    """A run of `steps` steps of a network that walks at random; snapshots of `stds`. Returns {std: average} of all."""
    torch.manual_seed(0)
    net = MLPDenoiser(hidden_dim=32, num_layers=1) if kind == "ours" else theirs.edm2_net()[0]
    averages = phema.PowerFunctionEMA(net, [*stds, *tracked])
    generator = torch.Generator().manual_seed(3)
    batch = 1024
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.01)
        averages.update(step * batch, batch)
        if step % every == 0:
            for average, name in averages.get()[: len(stds)]:
                path = folder / f"network-snapshot-{step * batch // 1000:07d}-{name}"
                if kind == "ours":
                    save_snapshot(f"{path}.safetensors", average, dtype=dtype, nimg=step * batch, ema=name)
                else:
                    kwargs = theirs.edm2_net()[1]
                    theirs.dump(theirs.edm2_content(copy.deepcopy(average), kwargs), f"{path}.pkl")
    return {float(name): average for average, name in averages.get()}


def distance(a, b):
    """Relative L2 distance of all parameters; one rounding to half precision (11 bits) makes about 2.1e-4."""
    a, b = (torch.cat([p.flatten() for p in net.parameters()]).double() for net in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "ours"), (None, "ours"), (torch.float16, "theirs")])
def test_a_tracked_average_comes_back(tmp_path, dtype, kind):
    steps, every = (320, 20) if kind == "ours" else (40, 5)
    tracked = wandering(tmp_path, [0.05, 0.1], [0.07, 0.12], dtype, steps, every, kind)
    options = [f"--indir={tmp_path}", f"--outdir={tmp_path / 'out'}", "--outstd=0.050,0.070,0.100,0.120"]
    report = json.loads(run(reconstruct_phema.main, *options, "--batch=3").stdout)
    files = report["outputs"]
    assert [entry["std"] for entry in files] == [0.05, 0.07, 0.1, 0.12]
    for entry in files:
        found = load_snapshot(entry["file"])
        error, stored = distance(found.net, tracked[entry["std"]]), entry["std"] in (0.05, 0.1)
        # In half precision inputs and output are rounded, sqrt(2) * 2.1e-4 together; a stored profile only once.
        assert error < (1e-4 if dtype is None else 2.6e-4 if stored else 3.7e-4), entry
        assert dtype is not None or not stored or error == 0
        assert found.header["ema"] == f"{entry['std']:.3f}" and found.header["nimg"] // 1000 == report["kimg"]
    assert max(entry["fit_error"] for entry in files) < (5e-3 if kind == "ours" else 0.02)


def constant(folder, name, value, nimg, std, width=8, **header):
    net = MLPDenoiser(hidden_dim=width, num_layers=1)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
        net.freqs.fill_(value)
    path = folder / f"{name}-{nimg // 1000:07d}-{std:.3f}.safetensors"
    save_snapshot(path, net, nimg=nimg, ema=f"{std:.3f}", **header)


def test_constant_weights_stay_and_buffers_are_the_last(tmp_path):
    """Coefficients sum to one; a combination of constants is known in closed form."""
    values = {(1, 0.05): 1.0, (1, 0.1): 2.0, (2, 0.05): 3.0, (2, 0.1): 4.0, (3, 0.1): 100.0}
    for (k, std), value in values.items():
        constant(tmp_path, "network-snapshot", value, k * STEP, std)
    stored = phema.stored_profiles(tmp_path)
    (found,) = phema.reconstruct(stored, [0.08], 2 * STEP)
    x = phema.solve_posthoc_coefficients([STEP, STEP, 2 * STEP, 2 * STEP], [0.05, 0.1] * 2, 2 * STEP, [0.08])[:, 0]
    assert found.snapshot.net.out.bias[0].item() == pytest.approx(float(x @ [1, 2, 3, 4]), rel=1e-6)
    assert found.snapshot.net.freqs[0] == 4  # of the last input
    with pytest.raises(ValueError, match="there are: 65, 131, 196"):
        list(phema.reconstruct(stored, [0.08], 4 * STEP))


def test_several_targets_in_one_pass_and_skip(tmp_path, monkeypatch):
    for k in (1, 2):
        for std in (0.05, 0.1):
            constant(tmp_path, "network-snapshot", float(k), k * STEP, std)
    reads = []
    original = persistence.read_snapshot
    monkeypatch.setattr(persistence, "read_snapshot", lambda path: reads.append(path) or original(path))
    options = [f"--indir={tmp_path}", f"--outdir={tmp_path / 'out'}"]
    run(reconstruct_phema.main, *options, "--outstd=0.04,0.05,...,0.1")
    assert len(reads) == 4 and len(list((tmp_path / "out").iterdir())) == 7
    reads.clear()
    run(reconstruct_phema.main, *options, "--outstd=0.04,0.05,...,0.11", "--skip", "--batch=1")
    assert len(reads) == 4 and len(list((tmp_path / "out").iterdir())) == 8
    reads.clear()
    assert json.loads(run(reconstruct_phema.main, *options, "--outstd=0.04", "--skip").stdout)["outputs"] == []
    assert reads == []
    run(reconstruct_phema.main, *options, "--outstd=0.2", "--outkimg=65", "--instd=0.100", "--outprefix=x", "--batch=1")
    assert len(reads) == 1 and (tmp_path / "out" / "x-0000065-0.200.safetensors").is_file()


def peak_of(folder, count, queue):
    """Runs in a child: MiB that a reconstruction from `count` pairs of files takes beyond what the process had."""
    high = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    stored = phema.stored_profiles(folder)
    for _ in phema.reconstruct(stored[:2], [0.07]):  # what the first use takes
        pass
    before = high()
    for _ in phema.reconstruct(stored[: 2 * count], [0.07, 0.12]):
        pass
    queue.put(high() - before)


def test_memory_does_not_grow_with_the_number_of_snapshots(tmp_path):
    net = MLPDenoiser(hidden_dim=1024, num_layers=1)
    size = sum(p.numel() for p in net.parameters()) * 4 / 2**20
    path = tmp_path / f"network-snapshot-{STEP // 1000:07d}-0.050.safetensors"
    save_snapshot(path, net)  # says nothing of its time: it stands for all of them
    for k in range(1, 33):
        for std in ("0.050", "0.100"):
            if (k, std) != (1, "0.050"):
                os.link(path, tmp_path / f"network-snapshot-{k * STEP // 1000:07d}-{std}.safetensors")
    fork = multiprocessing.get_context("fork")  # with torch in it already, and one thread
    queue, peaks = fork.Queue(), {}
    for count in (2, 32):  # 4 and 64 files
        child = fork.Process(target=peak_of, args=(tmp_path, count, queue))
        child.start()
        peaks[count] = queue.get(timeout=120)
        child.join(60)
        assert child.exitcode == 0
    print({2 * count: f"{peak:.0f} MiB" for count, peak in peaks.items()}, f"of files of {size:.0f} MiB")
    assert peaks[32] < peaks[2] + 4 * size and size > 4  # 60 more files


@pytest.mark.parametrize(
    "text, values",
    [
        ("0.1", [0.1]),
        ("0.1,0.05,0.1", [0.05, 0.1]),
        ("0.010,0.015,...,0.040", [0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04]),
        ("0.1,0.08,...,0.02,0.2", [0.02, 0.04, 0.06, 0.08, 0.1, 0.2]),
    ],
)
def test_lists_of_stds(text, values):
    assert phema.parse_stds(text) == values


def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch):
    for k in (1, 2):
        constant(tmp_path, "network-snapshot", float(k), k * STEP, 0.1)
    out = tmp_path / "out"

    def mistake(says, *more, indir=tmp_path):
        given = {"--indir": indir, "--outdir": out, "--outstd": "0.1"} | dict(o.split("=", 1) for o in more)
        one_line(reconstruct_phema.main, *(f"{k}={v}" for k, v in given.items()), says=says)
        assert not out.exists()

    for bad in (
        "0",
        "0.3",
        "x",
        "0.1,...,0.2",
        "0.1,0.1,...,0.2",
        "0.1,0.11,...,0.125",
        "0.1,0.12,...",
        "nan",
        "0.0001",
        "0.2886",
    ):
        mistake(bad.rpartition(",")[2][:4] if bad == "x" else "0", f"--outstd={bad}")
    mistake("there are: 65, 131", "--outkimg=70")
    mistake("no snapshots", "--inprefix=other")
    mistake("no snapshots", "--instd=0.05")
    mistake("--outprefix=../x", "--outprefix=../x")
    mistake("--indir", f"--outdir={tmp_path}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    mistake("one process")
    monkeypatch.delenv("WORLD_SIZE")
    constant(tmp_path, "other", 1.0, STEP, 0.2)
    mistake("--inprefix")
    taken = tmp_path / "taken"
    taken.mkdir()
    constant(taken, "other", 1.0, STEP, 0.1)
    (taken / "phema-0000131-0.100.safetensors").write_text("notes")
    mistake("--outdir", "--inprefix=network-snapshot", f"--outdir={taken}")
    assert (taken / "phema-0000131-0.100.safetensors").read_text() == "notes"
    (taken / "phema-0000131-0.100.safetensors").unlink()
    (taken / "phema-0000131-0.100.safetensors").symlink_to(tmp_path / "network-snapshot-0000131-0.100.safetensors")
    mistake("--indir", "--inprefix=network-snapshot", f"--outdir={taken}")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    constant(mixed, "a", 1.0, STEP, 0.1)
    constant(mixed, "a", 1.0, 2 * STEP, 0.1, width=12)
    mistake("another network", indir=mixed)
    for header, says in (
        (dict(options=dict(seed=1)), "--seed: 0 -> 1"),
        (dict(options=dict(data="other.zip", data_content="b")), "--data"),
        (dict(sources=[0]), "sources"),
        (dict(encoder=StandardRGBEncoder()), "encoder"),
        (dict(process=PFGMpp(64)), "process"),
    ):
        constant(mixed, "a", 1.0, 2 * STEP, 0.1, **header)
        mistake(["another run", says], indir=mixed)
    constant(mixed, "a", 1.0, 2 * STEP, 0.1, options=dict(total_nimg=1024))  # what a resumed run may change
    assert len(list(phema.reconstruct(phema.stored_profiles(mixed), [0.1]))) == 1
    constant(mixed, "a", float("nan"), 2 * STEP, 0.1)
    mistake("not finite", indir=mixed)
    constant(mixed, "a", 1.0, 2 * STEP, 0.1)
    for name, says in (("a-0000196-0.100", "131072"), ("a-0000131-0.200", "0.1 by its header")):
        os.rename(mixed / "a-0000131-0.100.safetensors", mixed / f"{name}.safetensors")
        mistake(["by its name", says], indir=mixed)
        os.rename(mixed / f"{name}.safetensors", mixed / "a-0000131-0.100.safetensors")
    (mixed / "a-0000042-0.100.safetensors").write_bytes(b"")
    mistake("multiple of 1024", indir=mixed)
