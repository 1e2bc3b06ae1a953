"""The report: spreads, advantage and interval against plain formulas; what it refuses."""

import json
from collections import defaultdict

import numpy as np
import pytest
import scipy.stats
from small_runs import one_line, run

import calculate_metrics
from metrics import report, results, table


def write_scores(folder, values, **extra):
    """values: {(arm, source, seed, sampling): fd} -> score files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, ((arm, source, seed, sampling), fd) in enumerate(values.items()):
        tags = {"arm": arm, "source": str(source), "seed": str(seed), "sampling": str(sampling), **extra.get(arm, {})}
        section = {"fd": fd, "agreement": 0.9, "fd_floor": 1.0, "agreement_reference": 0.99}
        content = {"images": None, "tags": tags, "metrics": {"pixel": {"sources": {str(source): section}}}}
        (folder / f"{arm}-{source}-{seed}-{sampling}-{i}.json").write_text(json.dumps(content))
    return str(folder / "*.json")


@pytest.fixture
def noisy():
    """Two sources, three training seeds, two sampling seeds per arm; the shared arm is about 20 % better."""
    rng = np.random.default_rng(0)
    return {
        (arm, source, seed, sampling): level * (1 + 0.5 * source) + rng.normal(0, 0.3)
        for arm, level in (("multi", 8.0), ("single", 10.0))
        for source in (0, 1)
        for seed in (0, 1, 2)
        for sampling in (0, 1)
    }


def test_verdict_against_plain_formulas(tmp_path, noisy):
    rows = results.of_sources(results.read_scores(write_scores(tmp_path, noisy)))
    got = table.verdict(table.collect(rows), ["0", "1"])
    means = np.array(
        [
            [[np.mean([noisy[a, s, t, q] for q in (0, 1)]) for t in (0, 1, 2)] for s in (0, 1)]
            for a in ("multi", "single")
        ]
    )  # [arm, source, training seed]
    base = means[1].mean(axis=1)
    relative = (means / base[None, :, None]).mean(axis=1)  # [arm, training seed]
    advantage = 1 - relative[0].mean()
    differences = relative[1] - relative[0]
    error = differences.std(ddof=1) / np.sqrt(3)
    interval = scipy.stats.ttest_rel(relative[1], relative[0]).confidence_interval(0.95)
    assert got.advantage == pytest.approx(advantage, abs=1e-12)
    assert got.standard_error == pytest.approx(error, rel=1e-12)
    assert got.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (got.wins, len(got.per_source)) == (2, 2)
    assert "clear of zero" in str(got)


def test_arms_without_a_common_seed_are_paired_in_order():
    cells = defaultdict(table.Cell)
    values = {"multi": [8.0, 9.0, 8.5], "single": [10.0, 11.5, 9.5]}
    for (arm, found), first in zip(values.items(), (0, 100), strict=True):
        for i, value in enumerate(found):
            cells[arm, "0", "fd"].values[str(first + i), "0"] = value
    got = table.verdict(cells, ["0"])
    base = np.mean(values["single"])
    truth = scipy.stats.ttest_rel(np.array(values["single"]) / base, np.array(values["multi"]) / base)
    assert got.interval == pytest.approx(tuple(truth.confidence_interval(0.95)), rel=1e-9)
    power = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, 2), 2, got.detectable / got.standard_error)
    assert power == pytest.approx(0.8, abs=1e-6)
    low, high = (f"{v:.1%}" for v in got.interval)
    nothing = f"{low} to {high}: zero is inside; {got.detectable:.1%} would have been seen four times in five)"
    assert got.interval[0] < 0 < got.interval[1] and str(got).endswith(nothing)


def test_interval_covers_zero_for_equal_arms_at_its_rate():
    """200 experiments in which both arms are the same: the 95 % interval misses zero in about 5 % of them."""
    rng = np.random.default_rng(1)
    misses = 0
    for _ in range(200):
        cells = defaultdict(table.Cell)
        for arm in ("multi", "single"):
            for source in ("0", "1", "2"):
                for seed in range(4):
                    cells[arm, source, "fd"].values[str(seed), "0"] = 10 + rng.normal()
        low, high = table.verdict(cells, ["0", "1", "2"]).interval
        misses += low > 0 or high < 0
    assert misses <= scipy.stats.binom.ppf(0.9999, 200, 0.05)
    assert misses >= scipy.stats.binom.ppf(0.0001, 200, 0.05)


def test_files(tmp_path, noisy):
    text = report.write_report(write_scores(tmp_path / "scores", noisy), tmp_path / "out")
    assert "multi better than single in 2 of 2 sources" in text
    lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert lines[0].startswith("source,arm,fd,fd_sd_training,fd_sd_sampling,fd_half95,")
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    means = [np.mean([noisy["multi", 0, t, q] for q in (0, 1)]) for t in range(3)]
    assert float(first["fd"]) == pytest.approx(np.mean(means), rel=1e-5)
    assert float(first["fd_sd_training"]) == pytest.approx(np.std(means, ddof=1), rel=1e-5)
    within = [np.var([noisy["multi", 0, t, q] for q in (0, 1)], ddof=1) for t in range(3)]
    assert float(first["fd_sd_sampling"]) == pytest.approx(np.sqrt(np.mean(within)), rel=1e-5)
    interval = lambda values: scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert float(first["fd_half95"]) == pytest.approx(np.mean(means) - interval(means).low, rel=1e-5)
    assert f"| {np.mean(means):.2f} +- {float(first['fd_half95']):.2f} |" in text and "95 % interval" in text
    last = dict(zip(lines[0].split(","), lines[-2].split(","), strict=True))
    both = np.mean([[np.mean([noisy["multi", s, t, q] for q in (0, 1)]) for t in range(3)] for s in (0, 1)], axis=0)
    assert (last["source"], last["arm"]) == ("mean", "multi")
    assert float(last["fd_half95"]) == pytest.approx(both.mean() - interval(both).low, rel=1e-4)
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    seeds = table.read_csv(tmp_path / "out" / "seeds.csv")
    assert [(r["arm"], r["source"], r["seed"]) for r in seeds][:4] == [("multi", 0, t) for t in range(3)] + [
        ("multi", 1, 0)
    ]
    assert [r["fd"] for r in seeds[:3]] == pytest.approx(means, rel=1e-12)


def test_one_training_seed_has_no_uncertainty(tmp_path):
    values = {(arm, s, 0, 0): fd for (arm, s), fd in {("multi", 0): 4.0, ("single", 0): 5.0}.items()}
    scores = write_scores(tmp_path / "scores", values)
    text = report.write_report(scores, tmp_path / "out")
    assert "mean advantage 20.0% (one training seed per arm: no uncertainty known)" in text and "| 4.00 |" in text
    for path in (tmp_path / "scores").iterdir():
        path.write_text(path.read_text().replace('"agreement": 0.9', '"fd_se": 0.5, "agreement": 0.9'))
    assert "| 4.00 +- 0.98 |" in report.write_report(scores, tmp_path / "out")


@pytest.mark.parametrize("share, error, shown", [(1.0, 0.0, "100.0 %"), (0.98, 0.02, "98.0 +- 3.9 %")])
def test_no_interval_of_width_zero(tmp_path, share, error, shown):
    """That all of 50 images agree with their label does not say that all images do."""
    scores = write_scores(tmp_path / "scores", {("multi", 0, 0, 0): 4.0, ("single", 0, 0, 0): 5.0})
    for path in (tmp_path / "scores").iterdir():
        given = f'"agreement_se": {error}, "agreement": {share}'
        path.write_text(path.read_text().replace('"agreement": 0.9', given))
    assert f"| {shown} | {shown} |" in report.write_report(scores, tmp_path / "out")


def test_scores_of_networks_whose_images_were_not_kept(tmp_path, noisy):
    """`gen` names a network, and folders of images may be gone: the report says so, and is whole."""
    scores = write_scores(tmp_path / "scores", noisy)
    for path in (tmp_path / "scores").glob("multi-*"):
        path.write_text(path.read_text().replace('"images": null', '"images": "run/network-snapshot.safetensors"'))
    text = report.write_report(scores, tmp_path / "out")
    assert text.count("No images to show of multi: run/network-snapshot.safetensors is no data set") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"table.md", "table.csv", "comparison.png"}
    with pytest.raises(ValueError, match="gone"):  # asked for: refused, before anything is written
        report.write_report(scores, tmp_path / "new", real=str(tmp_path / "gone"))
    assert not (tmp_path / "new").exists()


def test_refusals(tmp_path, noisy):
    with pytest.raises(ValueError, match="no score files"):
        report.write_report(str(tmp_path / "*.json"), tmp_path / "out")
    only = {key: value for key, value in noisy.items() if key[0] == "multi"}
    with pytest.raises(ValueError, match="'single' has no 'fd'"):
        report.write_report(write_scores(tmp_path / "a", only), tmp_path / "out")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="not a score file"):
        report.write_report(str(tmp_path / "b" / "*.json"), tmp_path / "out")


def test_theory_ratio():
    from training.networks_edm2 import Precond

    net = Precond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    own = net.unet.emb_label.weight.shape[0]
    total = sum(p.numel() for p in net.parameters())
    got = results.theory_ratio(net, 3)
    beta = (total - 3 * own) / (total - 2 * own)
    assert got["per_source"] == own
    assert got["beta_sim"] == pytest.approx(beta)
    assert got["ratio"] == pytest.approx(np.sqrt(1 - 2 / 3 * beta))


def add_detector(folder, name, factor):
    """Every score file of a folder also holds the numbers of another detector."""
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        sections = content["metrics"]["pixel"]["sources"]
        other = {source: {**values, "fd": values["fd"] * factor} for source, values in sections.items()}
        path.write_text(json.dumps({**content, "metrics": {"pixel": {"sources": sections}, name: {"sources": other}}}))


def test_two_detectors_need_a_choice(tmp_path, noisy):
    """What stood last in the files used to be shown as if it were all."""
    scores = write_scores(tmp_path / "scores", noisy)
    first = report.write_report(scores, tmp_path / "one")
    add_detector(tmp_path / "scores", "classifier:abc", 100)
    command = (calculate_metrics.cmdline, "report", f"--scores={scores}", f"--dest={tmp_path}/out")
    one_line(*command, says=["pixel, classifier:abc", "--metric=NAME"])
    assert not (tmp_path / "out").exists()
    assert report.write_report(scores, tmp_path / "pixel", metric="pixel") == first
    for name in ("classifier", "classifier:abc"):
        other = report.write_report(scores, tmp_path / "other", metric=name)
        fd = float(first.splitlines()[2].split("|")[2].split()[0])
        assert float(other.splitlines()[2].split("|")[2].split()[0]) == pytest.approx(100 * fd, abs=1)
    with pytest.raises(ValueError, match="--metric=kid: the score files hold pixel, classifier:abc"):
        report.write_report(scores, tmp_path / "out", metric="kid")


def test_files_of_different_detectors_need_a_choice(tmp_path, noisy):
    """A retrained classifier is another detector, also where every file holds one alone."""
    scores = write_scores(tmp_path / "scores", noisy)
    path = next((tmp_path / "scores").glob("single-*.json"))
    path.write_text(path.read_text().replace('"pixel"', '"classifier:abc"'))
    with pytest.raises(ValueError, match="classifier:abc.*choose one"):
        report.write_report(scores, tmp_path / "out")


def test_loss_and_likelihood_join_the_table(tmp_path, noisy):
    """They need no detector, so they stand beside the numbers of whichever is shown."""
    scores = write_scores(tmp_path / "scores", noisy)
    for arm in ("multi", "single"):
        for seed in ("0", "1", "2"):
            sections = {s: {"denoising_loss": 0.25, "standard_error": 0.1} for s in ("0", "1")}
            bits = {s: {"bits_per_dim": 3.5, "standard_error": 0.1, "num": 7} for s in ("0", "1")}
            for name, found in (("denoising", sections), ("likelihood", bits)):
                content = {"tags": {"arm": arm, "seed": seed}, "metrics": {name: {"sources": found}}}
                (tmp_path / "scores" / f"{name}-{arm}-{seed}.json").write_text(json.dumps(content))
    report.write_report(scores, tmp_path / "out")
    row = table.read_csv(tmp_path / "out" / "table.csv")[0]
    assert (row["denoising_loss"], row["bits_per_dim"], row["bits_per_dim_sd_training"]) == (0.25, 3.5, 0)
    assert "standard_error" not in row and "num" not in row


def test_one_number_twice_is_refused(tmp_path, noisy):
    scores = write_scores(tmp_path / "scores", noisy)
    path = next((tmp_path / "scores").glob("multi-*.json"))
    path.with_name("copy.json").write_text(path.read_text())
    with pytest.raises(ValueError, match="another score file has fd of arm multi"):
        report.write_report(scores, tmp_path / "out")


def edit(path, change):
    """Change the content of a score file in place."""
    content = json.loads(path.read_text())
    change(content["metrics"]["pixel"])
    path.write_text(json.dumps(content))


def of_first(name, value):
    return lambda result: next(iter(result["sources"].values())).update({name: value})


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r.update(reference_hashes=dict.fromkeys("01", "b" * 16)), ["reference images", "a" * 16, "b" * 16]),
        (lambda r: r.update(reference={"content_hash": "b" * 16}, reference_hashes={}), ["reference images", "b" * 16]),
        (lambda r: r.update(reference_hashes={}), ["reference images", "unknown"]),
        (of_first("reference_count", 40), ["number of reference images", "50", "40"]),
        (of_first("count", 99), ["number of images", "100", "99"]),
        (of_first("fd", float("nan")), ["pixel, ", "fd is nan"]),
        (of_first("agreement", float("-inf")), ["agreement is -inf"]),
        (of_first("fd", 10**400), ["not a score file"]),
    ],
)
def test_only_the_comparable_is_compared(tmp_path, noisy, change, says):
    """Other reference images, other numbers of them, no numbers at all: refused in one line that names the file."""
    scores = write_scores(tmp_path / "scores", noisy)
    files = sorted((tmp_path / "scores").glob("*.json"))
    for path in files:
        edit(path, lambda r: r.update(reference_hashes=dict.fromkeys("01", "a" * 16)))
        edit(path, of_first("count", 100)), edit(path, of_first("reference_count", 50))
    command = (calculate_metrics.cmdline, "report", f"--scores={scores}", f"--dest={tmp_path}/out")
    text = report.write_report(scores, tmp_path / "whole")
    assert "advantage" in text
    edit(files[5], change)
    one_line(*command, says=[str(files[5]), *says])
    assert not (tmp_path / "out").exists()


def test_missing_scores_are_named(tmp_path, noisy):
    """A mean over what happens to be there would compare other seeds with other sources."""
    missing = [("single", 1, 2, 0), ("single", 0, 1, 1)]
    some = {key: value for key, value in noisy.items() if key not in missing}
    scores = write_scores(tmp_path / "a", some)
    command = (calculate_metrics.cmdline, "report", f"--dest={tmp_path}/out")
    says = ["arm single", "source 0, seed 1, sampling 1; source 1, seed 2, sampling 0"]
    one_line(*command, f"--scores={scores}", says=says)
    none = {key: value for key, value in noisy.items() if key[:2] != ("single", 1)}
    one_line(*command, f"--scores={write_scores(tmp_path / 'b', none)}", says="'single' has no 'fd' for source 1:")
    twice = next((tmp_path / "b").glob("multi-1-2-*.json"))
    twice.with_name("other.json").write_text(twice.read_text())
    one_line(*command, f"--scores={tmp_path}/b/*.json", says=["other.json", twice.name, "arm multi, 1, seed 2"])


def test_the_best_checkpoint_is_chosen_among_the_comparable(tmp_path):
    for name, count in (("a", 100), ("b", 100), ("c", 50)):
        section = {"fd": 3.0, "count": count, "reference_count": 10}
        content = {"tags": {"checkpoint": name}, "metrics": {"pixel": {"overall": section}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    best = (calculate_metrics.cmdline, "best")
    one_line(*best, f"--scores={tmp_path}/*.json", says=["c.json", "number of images", "100", "50"])
    assert json.loads(run(*best, f"--scores={tmp_path}/[ab].json").stdout)["min"] == 3
