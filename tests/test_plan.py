"""The planner on Gaussians whose learning curves are known in closed form, and on made-up score files."""

import itertools
import json

import numpy as np
import pytest
import scipy.optimize
from small_runs import one_line, run
from test_contrasts import write

import plan as plan_script
from metrics import contrasts, plan
from metrics.results import read_scores
from metrics.table import read_csv
from simulations.gaussian_exact import expected_tv_given_counts, expected_tv_student, tv_unit_gaussians

K, D, OWN, SIZES, SEEDS = 10, 10, 5, (25, 50, 100, 200), 5  # OWN: entries of the mean that are a source's own


def pilot(rng, sizes=SIZES, seeds=SEEDS, apart=0.0):
    """|delta| [seeds, (alone, together), sizes, K] of fitted means: as many new images at every size, as the theory has it.

    apart: how far the entries that are treated as shared truly lie from their mean, in every source.
    """
    found = np.zeros([seeds, 2, len(sizes), K])
    for s in range(seeds):
        draws = rng.normal(size=[K, max(sizes), D])
        for i, n in enumerate(sizes):
            alone = draws[:, :n].mean(axis=1)
            together = np.concatenate([alone[:, :OWN], np.tile(alone[:, OWN:].mean(axis=0) + apart, [K, 1])], axis=1)
            found[s, 0, i], found[s, 1, i] = (np.linalg.norm(d, axis=1) for d in (alone, together))
    return found


def truth_in_tv(n):
    """m with E TV of m n images alone equal to that of n of each source together."""
    shared = float(expected_tv_given_counts(n, K * n, D, OWN))
    return scipy.optimize.brentq(lambda m: float(expected_tv_student(m * n, D)) - shared, 0.1, 20)


TRUTH_IN_KL = D / (OWN + (D - OWN) / K)  # E KL = D / 2 n alone, (OWN + (D - OWN) / K) / 2 n together


def covered(seed, excess, truth, n=50, sizes=SIZES):
    """Whether the interval of the multiplier at n holds the truth; losses are excess plus a seed's and a common constant."""
    rng = np.random.default_rng([7, seed])
    values = excess(pilot(rng, sizes)).mean(axis=-1)
    values += 3 + rng.normal(0, 0.2, [SEEDS, 1, 1])  # test sets differ in difficulty
    made = plan.Plan(sizes, values)
    found, gain = made.multiplier(n), made.gain(n)
    assert (found.low > 1, found.high < 1) == (gain.low > 0, gain.high < 0)  # one question, one answer
    return found.low <= truth <= found.high


@pytest.mark.parametrize(("measure", "sizes"), [("kl", SIZES), ("tv", SIZES), ("kl", SIZES[:3])])
def test_the_true_multiplier_is_in_the_interval(measure, sizes):
    """In 100 pilots of five seeds and four sizes, or three; 95 % intervals."""
    excess, truth = (lambda d: d**2 / 2, TRUTH_IN_KL) if measure == "kl" else (tv_unit_gaussians, truth_in_tv(50))
    found = sum(covered(seed, excess, truth, sizes=sizes) for seed in range(100))
    assert found >= 90, found


def test_the_sign_turns_where_it_should():
    """Sources that are treated as equal and are not: E KL crosses at n = (1 - 1/K) / apart^2 = 90."""
    hits, rates, rng = 0, [], np.random.default_rng(1)
    for _ in range(40):
        made = plan.Plan(SIZES, (pilot(rng, apart=0.1) ** 2 / 2).mean(axis=-1))
        turn = made.turn()
        hits += turn is not None and turn.low <= 90 <= turn.high
        assert made.gain(25).value > 0 > made.gain(200).value
        assert made.multiplier(200).value < 1
        rates.append(made.curves.rate)
    assert hits >= 34  # of 40 at 95 %: fewer with probability .01
    assert np.median(rates) == pytest.approx(1, abs=0.15)  # KL falls as 1 / n


def test_curves_are_found_exactly():
    n = np.array([10, 30, 90.0])
    mean = np.stack([2 + 3 * n**-0.6, 2.1 + 1.5 * n**-0.6])
    c = plan.fit(n, mean)
    assert (c.floor, c.scale, c.floor_together, c.scale_together, c.rate) == pytest.approx(
        (2, 3, 2.1, 1.5, 0.6), abs=1e-4
    )
    assert plan.fit(n[:2], np.stack([2 + 3 / n[:2], 2 + 1 / n[:2]])).scale_together == pytest.approx(1)
    values = np.stack([mean + e for e in (0, 0.5)])  # seeds that differ by a constant alone: no uncertainty
    m = plan.Plan(n, values).multiplier(10)
    ratio = (2.1 + 1.5 * 10**-0.6 - 2) / (3 * 10**-0.6)
    assert plan.Plan(n, values).excess_ratio(10).value == pytest.approx(ratio, rel=1e-3)
    assert m.value == pytest.approx(ratio ** (-1 / 0.6), rel=1e-3) and m.high - m.low < 0.02 * m.value


def test_what_no_number_of_images_alone_reaches():
    n = np.array([10, 30, 90.0])
    for floors, ends in (((3, 2), (plan.FARTHEST, np.inf)), ((2, 1e4), (0, 1 / plan.FARTHEST))):
        mean = np.stack([floor + 5 / n for floor in floors])
        found = plan.Plan(n, np.stack([mean + e for e in (-0.001, 0.001)])).multiplier(30)
        assert (found.low, found.high) == pytest.approx(ends)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Score files of a pilot: four sources at 20, 40, 80 images, gains that halve with n; 2 is harmed by 0."""
    folder, rng = tmp_path_factory.mktemp("scores"), np.random.default_rng(0)
    noise = lambda: rng.normal(0, 0.002)
    for seed in range(4):
        for n in (20, 40, 80):
            alone = {k: {"bits_per_dim": 3 + 4 / n + k + noise()} for k in range(4)}
            together = {k: {"bits_per_dim": 3 + 2 / n + k + noise()} for k in range(4)}
            for k, numbers in alone.items():
                write(folder, f"one-{k}-{n}-{seed}", dict(group="real", k=1, n=n, seed=seed), {k: numbers})
            write(folder, f"all-{n}-{seed}", dict(group="real", k=4, n=n, seed=seed), together)
        for i, j in itertools.combinations(range(4), 2):
            pair = {
                a: {"bits_per_dim": 3 + 4 / 20 + a + (0.05 if (a, b) == (2, 0) else -0.05) + noise()}
                for a, b in ((i, j), (j, i))
            }
            write(folder, f"pair-{i}-{j}-{seed}", dict(group="real", k=2, n=20, seed=seed), pair)
        far = {i: {f"energy_{j}": abs(i - j) for j in range(4) if j != i} for i in range(4)}
        write(folder, f"energy-{seed}", dict(group="data", n=20, seed=seed), far, "energy")
    return folder / "*.json"


def test_command(scores, tmp_path):
    text = run(plan_script.main, f"--scores={scores}", f"--dest={tmp_path}").stdout
    rows = {row["n"]: row for row in read_csv(tmp_path / "multiplier.csv")}
    assert all(row["multiplier_low"] < 2 < row["multiplier_high"] for row in rows.values())  # 2 / n against 4 / n
    assert rows[20]["gain"] == pytest.approx(0.1, abs=0.01) and "**20 images of each: better together.**" in text
    pairs = {(row["target"], row["partner"]): row for row in read_csv(tmp_path / "transfer.csv")}
    assert [key for key, row in pairs.items() if row["negative"]] == [(2, 0)] and "2 from 0" in text
    assert pairs[2, 0]["gain"] == pytest.approx(-0.05, abs=0.01) and pairs[0, 2]["distance"] == 2
    assert all((tmp_path / name).stat().st_size > 10000 for name in ("curves.png", "transfer.png"))
    near = contrasts.examine(read_scores(scores), plan.of_pairs(read_scores(scores)))
    assert f"rank correlation {near.effect:.3g} (95 % interval" in text and f"p = {near.p:.4f}" in text


def test_pairs_that_were_not_all_trained(scores, tmp_path):
    rows = [row for row in read_scores(scores) if "pair-1-3" not in row.file]
    assert "Whether nearer partners help more is not said" in plan.write_plan(rows, tmp_path)
    assert (tmp_path / "plan.md").is_file()


@pytest.mark.parametrize(
    "tags, says",
    [
        (dict(k=1, n=20), "no scores with bits_per_dim of single and of shared models"),
        (dict(k=3, n=20), "no score of single models at n = 20, seed 0"),
    ],
)
def test_mistakes(tmp_path, tags, says):
    write(tmp_path / "s", "a", dict(tags, group="real", seed=0), {0: {"bits_per_dim": 3.0}})
    one_line(plan_script.main, f"--scores={tmp_path}/s/*.json", f"--dest={tmp_path}/out", says=says)
    assert not (tmp_path / "out").exists()


def test_needs_scores_or_data(tmp_path):
    one_line(plan_script.main, f"--dest={tmp_path}/out", says="give either --data=ZIP or --scores=GLOB")


def test_pilot(digits, tmp_path):
    """From a data set to an answer in words, at smoke size."""
    more = ["--sizes=4,6", "--budget=smoke", "--jobs=1"]
    text = run(plan_script.main, f"--data={digits}", f"--dest={tmp_path}/out", *more).stdout
    assert "6 images of each" in text and "Two sizes only" in text and (tmp_path / "out" / "curves.png").is_file()
    assert "22 models of preset digits8 at 8x8 (--sigma-data=0.5 --batch=16" in text
    assert "rank correlation" not in text  # of three sources: no
    options = lambda name: json.loads((tmp_path / "out" / "runs" / name / "training_options.json").read_text())
    assert [options(name)["lr"] for name in ("0-n4-seed0", "0-1-n4-seed0", "all-n4-seed0")] == [0.16, 0.08, 0.08]
    assert [options(name)["patience"] for name in ("0-n4-seed0", "all-n4-seed0")] == [30, 12]
