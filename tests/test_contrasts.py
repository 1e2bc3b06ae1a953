"""Declared contrasts against scipy on made-up scores whose truth is known."""

import json

import numpy as np
import pytest
import scipy.stats
from small_runs import ROOT, one_line, run

import calculate_metrics
from dnnlib import experiment
from metrics import contrasts, report_contrasts, results
from metrics.alike import energy_distance
from metrics.contrasts import Contrast
from metrics.table import read_csv

SEEDS, SOURCES = range(5), range(5)


def write(folder, name, tags, numbers, detector="likelihood"):
    """A score file: numbers {source: {name: value}}."""
    folder.mkdir(exist_ok=True)
    content = {"tags": {"arm": "x", **{k: str(v) for k, v in tags.items()}}, "images": None}
    content["metrics"] = {detector: {"sources": {str(k): v for k, v in numbers.items()}}}
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(glob of score files, gain [seed, K, source], pair gains and distances [seed, i, j])."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("made")
    base = rng.normal(3, 0.3, [5, 5])
    gain = 0.1 * np.log2([1, 2, 5])[:, None] + rng.normal(0, 0.05, [5, 3, 5])
    gain[:, 0] = 0
    for s in SEEDS:
        for i, k in enumerate((1, 2, 5)):
            levels = {"loss_sigma0.5": 2 - 0.1 * i, "loss_sigma2": 1 + 0.1 * i * (s - 2)}
            values = {j: {"bits_per_dim": base[s, j] - gain[s, i, j]} | levels for j in SOURCES}
            write(folder, f"k{k}-{s}", dict(group="real", design="partition", k=k, n=25, seed=s, set=f"k{k}"), values)
    apart = rng.uniform(1, 2, [5, 5, 5])
    apart = apart + apart.transpose(0, 2, 1)
    pair = -0.1 * apart + rng.normal(0, 0.03, apart.shape)
    for s in SEEDS:
        far = {i: {f"energy_{j}": apart[s, i, j] for j in SOURCES if j != i} for i in SOURCES}
        write(folder, f"energy-{s}", dict(group="data", n=25, seed=s), far, "energy")
        for i in SOURCES:
            for j in range(i):
                values = {a: {"bits_per_dim": base[s, a] - pair[s, a, b]} for a, b in ((i, j), (j, i))}
                write(
                    folder,
                    f"pair-{i}-{j}-{s}",
                    dict(group="real", design="pairs", k=2, n=25, seed=s, set=f"{j}-{i}"),
                    values,
                )
    return folder / "*.json", gain, pair, apart


SLOPE = Contrast("more", {"design": "partition"}, {"k": 1, "design": "partition"}, over="k")
RANK = Contrast("alike", {"design": "pairs"}, {"k": 1}, rank="energy")


def test_slopes_and_means_are_those_of_scipy(made):
    scores, gain, _, _ = made
    rows = results.read_scores(scores)
    slopes = [
        np.mean([scipy.stats.linregress(np.log2([1, 2, 5]), gain[s, :, j]).slope for j in SOURCES]) for s in SEEDS
    ]
    for contrast, values in (
        (SLOPE, slopes),
        (Contrast("five", {"k": 5}, {"k": 1}), gain[:, 2].mean(axis=1)),
        (Contrast("any", {"k": [2, 5], "design": "partition"}, {"k": 1}), gain[:, 1:].mean(axis=(1, 2))),
    ):
        found, truth = contrasts.examine(rows, contrast), scipy.stats.ttest_1samp(values, 0)
        assert list(found.seeds.values()) == pytest.approx(list(values))
        assert found.p == pytest.approx(truth.pvalue) and found.effect == pytest.approx(np.mean(values))
        assert (found.low, found.high) == pytest.approx(tuple(truth.confidence_interval(0.95)))


def test_rank_correlation_and_its_permutations(made):
    scores, _, pair, apart = made
    found = contrasts.examine(results.read_scores(scores), RANK)
    others = lambda s, i, table: [table[s, i, j] for j in SOURCES if j != i]
    per_seed = [
        np.mean([scipy.stats.spearmanr(others(s, i, pair), others(s, i, -apart)).statistic for i in SOURCES])
        for s in SEEDS
    ]
    assert list(found.seeds.values()) == pytest.approx(per_seed)
    assert 1 / 10000 <= found.p < 0.03  # of 120 relabellings of five sources, the one that was made is by far the best


def test_p_values_are_uniform_where_nothing_is(monkeypatch):
    """Gains that know nothing of the distances: p below 0.1 in a tenth of the draws."""
    monkeypatch.setattr(contrasts, "PERMUTATIONS", 199)
    rng, hits = np.random.default_rng(0), 0
    make = lambda s, i, detector, numbers: results.Row(
        {"seed": str(s), "k": "1" if detector == "one" else "2"}, "energy" if detector == "energy" else "likelihood", str(i),
        numbers, None, f"{detector}-{s}",
    )  # fmt: skip
    for _ in range(60):
        rows, apart = [], rng.uniform(1, 2, [6, 6])
        for s in range(2):
            rows += [
                make(s, i, "energy", {f"energy_{j}": apart[i, j] + apart[j, i] for j in range(6)}) for i in range(6)
            ]
            rows += [make(s, i, "one", {"bits_per_dim": 3.0}) for i in range(6)]
            for i in range(6):
                rows += [make(s, a, f"{i}-{j}", {"bits_per_dim": rng.normal()}) for j in range(i) for a in (i, j)]
        hits += contrasts.examine(rows, Contrast("null", {"k": 2}, {"k": 1}, rank="energy")).p < 0.1
    assert 1 <= hits <= 14  # binomial(60, .1) leaves this with probability .003


def test_detectable_is_found_four_times_out_of_five():
    rng = np.random.default_rng(1)
    shift = contrasts.detectable(1 / np.sqrt(5), 5)
    p = scipy.stats.ttest_1samp(rng.normal(shift, 1, [4000, 5]), 0, axis=1).pvalue
    # The error is estimated here and known there: the t-test of the noncentral t has it estimated, too.
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)


def test_holm():
    """Holm (1979), by hand: .01 * 4, then max(.., .02 * 3), .03 * 2, .04."""
    assert contrasts.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert contrasts.holm([0.5, 0.9]) == [1.0, 1.0]


def test_energy_distance_is_scipys_in_one_dimension():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 1)), rng.normal(1, 2, size=(20, 1))
    assert energy_distance(a, b) == pytest.approx(scipy.stats.energy_distance(a[:, 0], b[:, 0]))
    assert energy_distance(a, a) == 0


def test_command(made, tmp_path):
    scores, *_ = made
    file = tmp_path / "x.yaml"
    declared = [
        {"name": c.name, "of": c.of, "against": c.against, "over": c.over, "rank": c.rank} for c in (SLOPE, RANK)
    ]
    file.write_text(json.dumps({"steps": [], "contrasts": declared}))
    text = run(
        calculate_metrics.cmdline, "report", f"--scores={scores}", f"--contrasts={file}", f"--dest={tmp_path}/out"
    ).stdout
    rows = read_csv(tmp_path / "out" / "contrasts.csv")
    expected = contrasts.examine_all(results.read_scores(scores), [SLOPE, RANK])
    for row, result in zip(rows, expected, strict=True):
        assert (row["effect"], row["p"], row["holm"]) == pytest.approx((result.effect, result.p, result.holm))
        assert f"| {result.contrast.name} | {result.effect:+.4f}" in text
    width = scipy.stats.t.ppf(0.975, 4) * np.std(20 * np.arange(5), ddof=1) / np.sqrt(5)  # K = 5 at noise level 2
    spread = f"+0.0 % ({-width:+.1f} to {width:+.1f})"
    assert "| 0.5 | 2 |" in text
    assert f"| real | partition | 25 | 5 | +10.0 % (+10.0 to +10.0) | {spread} |" in text
    seeds = read_csv(tmp_path / "out" / "seeds.csv")
    assert len(seeds) == 5 * (3 * 5 + 20) and (tmp_path / "out" / "comparison.png").stat().st_size > 10000


@pytest.mark.parametrize(
    "text", ["25:10Ki,25:20Ki", "10Ki,20Ki", "25:10Ki:20Ki", "n=25:10Ki", "025:10Ki", "25:0", "25:", ""]
)
def test_readings_that_are_refused(made, tmp_path, text):
    command = ["report", f"--scores={made[0]}", "--contrasts=x.yaml", f"--dest={tmp_path}/out", f"--reading={text}"]
    one_line(calculate_metrics.cmdline, *command, says="--reading")
    assert not (tmp_path / "out").exists()


def test_readings_of_sizes_that_no_model_has(made, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps({"steps": [], "contrasts": [{"name": "a", "of": {"k": 2}, "against": {"k": 1}}]}))
    command = ["report", f"--scores={made[0]}", f"--contrasts={file}", f"--dest={tmp_path}/out"]
    one_line(
        calculate_metrics.cmdline, *command, "--reading=50:1Ki,100:1Ki", says="no scores have the tag n = 50 or 100"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"of": {"k": 7}}, "no scores with bits_per_dim have the tags {'k': 7}"),
        ({"against": {"k": 7}}, "has no counterpart"),
        ({"measure": "fd"}, "no scores with fd"),
        ({"over": "n"}, "a slope over n needs scores of two values of it"),
        ({"rank": "energy"}, "is not about a pair of sources"),
        ({"off": 1}, "contrast 0: give name, of and against"),
        ({"of": 3}, "of and against map tags to values"),
        (None, "declares no contrasts"),
    ],
)
def test_mistakes(made, tmp_path, change, says):
    file = tmp_path / "x.yaml"
    entry = {"name": "a", "of": {"design": "partition"}, "against": {"k": 1}}
    file.write_text(json.dumps({"steps": [], "contrasts": [] if change is None else [entry | change]}))
    command = ["report", f"--scores={made[0]}", f"--contrasts={file}", f"--dest={tmp_path}/out"]
    one_line(calculate_metrics.cmdline, *command, says=says)
    assert not (tmp_path / "out").exists()


def test_the_experiment_declares_what_it_tests():
    found = contrasts.read_contrasts(str(ROOT / "experiments" / "multi-vs-single.yaml"))
    assert [(c.over, c.rank) for c in found] == [("k", None), ("n", None), (None, "energy"), (None, None), (None, None)]
    settings, steps = experiment.load(ROOT / "experiments" / "multi-vs-single.yaml")
    assert len(settings["seeds"]) >= 5 and sum(step.name.startswith("nll-real-") for step in steps) == 5 * (
        10 + 45 + 2 + 1 + 11
    )


def test_readings_at_fixed_numbers_of_images(tmp_path):
    """A model says something where it was looked at just then: not before its first look, and not when it had ended."""
    looks = {"single": (1, [0, 10, 20, 30, 40]), "short": (1, [0, 10, 20]), "shared": (10, [0, 30, 60, 300, 330])}
    rows = []
    for name, (k, kimg) in looks.items():
        (tmp_path / name).mkdir()
        lines = [
            {"Progress/kimg": float(v), "Loss/validation": 9.0, "Loss/validation_source3": 2 - v / 400} for v in kimg
        ]
        (tmp_path / name / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        for n in ("25", "100"):
            tags = {"group": "real", "set": name, "k": str(k), "n": n, "seed": "0"}
            net = f"{tmp_path}/{name}/x.safetensors"
            rows.append(results.Row(tags, "denoising", "3", {"denoising_loss": 1.0}, None, f"{name}{n}", net=net))
    found = {
        (line["set"], line["n"]): (line.get("loss_equal_per_model"), line.get("loss_equal_total"))
        for line in report_contrasts.seed_rows(rows, {"25": 10_000, "100": 30_000})
    }
    loss = lambda kimg: pytest.approx(2 - kimg / 400)
    assert found["single", "25"] == (loss(10), loss(10)) and found["single", "100"] == (loss(30), loss(30))
    assert found["short", "25"] == (loss(10), loss(10)) and found["short", "100"] == ("", "")
    assert found["shared", "25"] == ("", "") and found["shared", "100"] == (loss(30), loss(300))
    (anywhere,) = {line["loss_equal_total"] for line in report_contrasts.seed_rows(rows[:1], {"": 20_000})}
    assert anywhere == loss(20)
    assert report_contrasts.seed_rows(rows, None)[0].keys().isdisjoint(report_contrasts.READINGS)
