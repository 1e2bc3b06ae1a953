"""Networks of the whole state in all that runs can be: on several processes, compiled, selecting, guided, other precisions."""

from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from small_runs import ROOT, final_state, one_line, python, run, small_command, small_config

import generate_images
import train_edm2
from dnnlib.util import read_stats
from metrics.contrasts import detectable
from metrics.table import read_csv
from torch_utils.persistence import load_snapshot
from training import hooks, setup
from training.guidance import guided
from training.processes.score import make_score
from training.training_loop import TrainingFailed

QUIET = ("--snapshot=0", "--checkpoint=0")
JOINT = ("--process=cld", "--parameterization=joint")
LEARNED = (
    *("--process=learned", "--process-options=V=2", "--parameterization=joint", "--objective=elbo", "--duration=1Ki"),
    *("--process-lr-scale=1", "--rampup=0.0005"),
)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """{name: run folder} of a denoiser, a network of the state of CLD, and one of a learned process with its bound."""
    out = tmp_path_factory.mktemp("joint")
    for name, options in (("reduced", ["--duration=1Ki"]), ("joint", [*JOINT, "--duration=1Ki"]), ("learned", LEARNED)):
        run(train_edm2.main, *small_command(digits, out / name, *options))
    return out


def test_two_processes_learn_the_same(digits, trained, tmp_path):
    """Weights and learned matrices agree to rounding."""
    python("train_edm2.py", *small_command(digits, tmp_path / "two", *LEARNED), processes=2)
    one, two = (final_state(path, 1)["objective"] for path in (trained / "learned", tmp_path / "two"))
    start = dict(
        setup.build(
            small_config(digits, process="learned", parameterization="joint", objective="elbo")
        ).objective.named_parameters()
    )
    for name, value in one.items():
        moved = float((value - start[name].detach()).abs().max()) if name in start else 0
        assert float((value - two[name]).abs().max()) <= 1e-3 * moved + 1e-6, name
    assert float((one["loss.process.q"] - start["loss.process.q"]).abs().max()) > 1e-2


@pytest.mark.slow
def test_compiled(digits, trained, tmp_path, monkeypatch):
    """The body goes through dynamo as one graph, whatever of the state is around it (backend eager: no code is made)."""
    original, compiled = torch.nn.Module.compile, []

    def compile(self, **options):
        compiled.append((type(self).__name__, options["fullgraph"]))
        original(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    run(train_edm2.main, *small_command(digits, tmp_path / "c", *JOINT, "--duration=1Ki", "--compile=True"))
    assert compiled == [("UNet", True)]
    plain, same = (final_state(path, 1)["objective"] for path in (trained / "joint", tmp_path / "c"))
    for name, value in plain.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-4)


def test_selection_with_a_reference(digits, trained, tmp_path):
    """Learner and reference are scored by the noise that they predict on the same draws; other networks have none."""
    select = ["--select=jest", "--chunks=2", "--filter-ratio=0.5", "--duration=256", "--snapshot=0", "--checkpoint=0"]
    command = lambda name, *more: small_command(digits, tmp_path / name, *select, *more, "--status=256")
    run(train_edm2.main, *command("own", *JOINT, f"--reference={trained / 'joint'}"))
    run(train_edm2.main, *command("ema", *JOINT, "--reference=ema"))
    denoiser = ["--process=cld", "--parameterization=joint-denoiser"]
    for name in ("joint", "reduced"):
        run(train_edm2.main, *command(f"denoiser-{name}", *denoiser, f"--reference={trained / name}"))
    for name, more in (("reduced", []), ("joint", ["--predict=all"])):
        one_line(
            train_edm2.main, *command("no", *JOINT, *more, f"--reference={trained / name}"), says="the same variables"
        )
    assert not (tmp_path / "no").exists()


def test_guided_by_another_kind(trained, tmp_path):
    """Scores are mixed at the same state, so a denoiser guides a network of the whole state."""
    net, guide = (load_snapshot(trained / name) for name in ("joint", "reduced"))
    process, u = net.process, torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    t, labels = torch.tensor(0.4).double(), torch.eye(net.net.label_dim)[:2]
    main, other = (make_score(s.net, process, labels)(u, t) for s in (net, guide))
    mixed = make_score(guided(net.net, guide.net, 2.5, process=process), process, labels)(u, t)
    torch.testing.assert_close(mixed, other + 2.5 * (main - other), rtol=1e-5, atol=1e-5)
    words = [f"--net={trained / 'joint'}", "--seeds=0-1", "--process=cld", "--solver=sscs", "--steps=3", "--device=cpu"]
    run(generate_images.main, *words, f"--outdir={tmp_path / 'a'}")
    run(generate_images.main, *words, f"--outdir={tmp_path / 'b'}", f"--gnet={trained / 'reduced'}", "--guidance=2.5")
    pixels = [(tmp_path / name / "000000.png").read_bytes() for name in "ab"]
    assert pixels[0] != pixels[1]


@pytest.mark.parametrize("form", ["joint", "joint-denoiser"])
def test_precision(form, digits, tmp_path):
    """Networks of the whole state compute in float32: others are refused, in training and in sampling."""
    for precision in ("bf16", "fp16"):
        words = ["--process=cld", f"--parameterization={form}", f"--precision={precision}"]
        one_line(train_edm2.main, *small_command(digits, tmp_path / "r", *words), says=["--precision", "fp32"])
    assert not (tmp_path / "r").exists()


def test_precision_of_sampling(trained, tmp_path):
    words = [f"--net={trained / 'joint'}", f"--outdir={tmp_path / 'x'}", "--seeds=0", "--process=cld", "--solver=em"]
    one_line(generate_images.main, *words, "--precision=bf16", "--device=cpu", says="float32")


@pytest.mark.parametrize("full", [False, True])
def test_learned_matrices_stay_a_process_after_every_step(full, digits, tmp_path):
    """A status line per step of training, at rates that move the matrices by ones: D positive definite, speed V."""
    rates = (
        "--objective=elbo",
        "--process-lr-scale=30",
        "--rampup=0",
        "--batch=32",
        "--duration=320",
        "--status=32",
        *QUIET,
    )
    words = ["--process=learned", f"--process-options=V=3,full={full}", "--parameterization=joint", *rates]
    run(train_edm2.main, *small_command(digits, tmp_path / "run", *words))
    lines = read_stats(tmp_path / "run")
    assert len(lines) == 11
    for line in lines:
        D = torch.tensor([[line.get(f"Process/D{min(i, j)}{max(i, j)}", 0.0) for j in range(3)] for i in range(3)])
        assert float(torch.linalg.eigvalsh(D.double())[0]) > 0 < line["Process/min_eigenvalue"]
        assert float(D.trace()) == pytest.approx(3, abs=1e-5)
    moved = [abs(line["Process/Q01"] - lines[0]["Process/Q01"]) for line in lines]
    assert max(moved) > 0.3


def test_a_run_ends_where_its_matrices_are_no_process():
    noise = SimpleNamespace(Q=torch.zeros(2, 2), D=torch.diag(torch.tensor([1.0, -0.5])), V=2)
    with pytest.raises(TrainingFailed, match="eigenvalue -0.5 at 3 kimg"):
        hooks.with_matrices()(SimpleNamespace(objective=SimpleNamespace(noise=noise), kimg=3))


def test_learned_matrices_against_their_start():
    """docs/linear.md's gain, what of it is the ends, and the matrices, by scipy from docs/data/learned-start.csv."""
    rows = {(row["arm"], row["seed"]): row for row in read_csv(ROOT / "docs" / "data" / "learned-start.csv")}
    text = " ".join((ROOT / "docs" / "linear.md").read_text(encoding="utf-8").split())

    def gain(number):
        values = [float(rows["held", s][number]) - float(rows["learned", s][number]) for s in range(5)]
        return sum(values) / 5, scipy.stats.ttest_1samp(values, 0), detectable(scipy.stats.sem(values), 5)

    (mean, test, seen), (ends, other, _) = gain("bits_per_dim"), gain("ends_bits_per_dim")
    low, high = test.confidence_interval()
    said = f"lower by {mean:.3f} bits/dim ({low:.3f} to {high:.3f}; p = {test.pvalue:.3f}".replace("= 0.", "= .")
    assert f"{said}): not seen, where {seen:.3f} would have been" in text
    low, high = other.confidence_interval()
    assert f"worse by {-ends:.3f} ({-high:.3f} to {-low:.3f})" in text
    assert f"{100 * ends / mean:.0f} % of the gain" in text
    fell = [abs(float(rows["held", s]["Q01"])) - abs(float(rows["learned", s]["Q01"])) for s in range(5)]
    assert f"fell (p = {scipy.stats.ttest_1samp(fell, 0).pvalue:.3f})".replace("= 0.", "= .") in text
    for arm, name, words in (
        ("held", "Q01", "from {} to"),
        ("learned", "Q01", "to {}: the"),
        ("learned", "least_eigenvalue_after_any_step", "smallest {})"),
    ):
        *values, last = (f"{abs(float(rows[arm, s][name])):.2f}" for s in range(5))
        assert words.format(f"{', '.join(values)} and {last}") in text
    assert {row["steps"] for row in rows.values()} == {128}
