"""Several arms of an experiment side by side: means over training seeds, differences to one arm of the same seed, a figure."""

import csv
import glob
import json
import math
import sys
from pathlib import Path

import click

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import atomic_write, cli  # noqa: E402
from dnnlib.util import natural_key  # noqa: E402

COLUMNS = ["agreement", "fd", "precision", "recall", "density", "coverage"]


def read(paths, section="overall"):
    """{arm: {seed: {column: value}}} of score files (calculate_metrics.py calc --dest --tag arm= --tag seed=), arms in natural
    order. Raises ValueError for a file that is none, or where an arm lacks a seed that others have."""
    arms = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            ((_, result),) = content["metrics"].items()
            values = {name: result[section][name] for name in COLUMNS if result[section].get(name) is not None}
            if not values:
                raise ValueError(f"section {section!r} holds none of {', '.join(COLUMNS)}")
            arms.setdefault(content["tags"]["arm"], {})[content["tags"]["seed"]] = values
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(
                f"{path}: no scores of one detector with the tags arm and seed ({type(err).__name__}: {err})"
            ) from err
    if not arms:
        raise ValueError("no score files: run calculate_metrics.py calc with --dest and --tag first")
    seeds = {seed for found in arms.values() for seed in found}
    for arm, found in arms.items():
        if set(found) != seeds:
            raise ValueError(f"arm {arm} lacks the seeds {', '.join(sorted(seeds - set(found)))}, which others have")
    return {arm: dict(sorted(arms[arm].items())) for arm in sorted(arms, key=natural_key)}


def mean_sd(values):
    """(mean, standard deviation); NaN deviation for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def tables(arms, against):
    """Markdown: means ± standard deviations over seeds, and mean ± standard error of the differences to the arm `against`."""
    columns = [c for c in COLUMNS if all(c in row for found in arms.values() for row in found.values())]
    count = len(next(iter(arms.values())))
    head = [f"| arm | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines = [f"Mean ± standard deviation of {count} training seeds\n", *head]
    for arm, found in arms.items():
        cells = [mean_sd([row[c] for row in found.values()]) for c in columns]
        lines.append(f"| {arm} | {' | '.join(f'{m:.4f} ± {s:.4f}' for m, s in cells)} |")
    lines += ["", f"Difference to {against} of the same seed, mean ± standard error\n", *head]
    for arm, found in arms.items():
        if arm != against:
            cells = [mean_sd([found[s][c] - arms[against][s][c] for s in found]) for c in columns]
            lines.append(f"| {arm} | {' | '.join(f'{m:+.4f} ± {s / math.sqrt(count):.4f}' for m, s in cells)} |")
    return "\n".join(lines) + "\n"


def figure(arms, columns=("agreement", "fd", "recall")):
    """A panel per column, a point with its standard deviation per arm, single seeds as small dots."""
    from metrics import figures

    columns = [c for c in columns if all(c in row for found in arms.values() for row in found.values())]
    fig, axes = figures.figure(columns=len(columns), width=3.4, height=3.0, squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for i, found in enumerate(arms.values()):
            values = [row[column] for row in found.values()]
            mean, sd = mean_sd(values)
            axis.errorbar([i], [mean], yerr=[0 if math.isnan(sd) else sd], marker="o", color="#222222", capsize=3, lw=1)
            axis.scatter([i + 0.18] * len(values), values, s=8, color="#888888", lw=0)
        axis.set_xticks(range(len(arms)), list(arms), rotation=35, ha="right", fontsize=8)
        axis.set_title({"fd": "Fréchet distance"}.get(column, column), fontsize=10)
    return fig


# fmt: off  (one option a line)
@cli.command()
@click.option("--scores", metavar="GLOB", required=True, help="Score files of calculate_metrics.py calc --dest --tag")
@click.option("--against", metavar="ARM", required=True, help="The arm that others are held against")
@click.option("--arms", type=cli.STRINGS, help="Which arms, in this order; default: --against, then all")
@click.option(
    "--section", type=click.Choice(["overall", "mean"]), default="overall", help="All samples, or mean of the sources"
)
@click.option("--dest", metavar="STEM", required=True, help="Writes STEM.md, STEM.csv, STEM.png and STEM.svg")
# fmt: on
def main(scores, against, arms, section, dest):
    """Tabulate and draw the arms of an experiment, from the score files alone.

    \b
    Example:
      python simulations/compare_arms.py --scores='results/guidance-digits/scores/*.json' --against=cfg-1 \\
          --dest=results/guidance-digits/arms
    """
    found = read(sorted(glob.glob(scores)), section)
    unknown = {against, *(arms or ())} - set(found)
    if unknown:
        raise ValueError(f"arm {sorted(unknown)[0]!r} is in no score file; there are: {', '.join(found)}")
    chosen = {arm: found[arm] for arm in dict.fromkeys(arms or (against, *found))}
    chosen.setdefault(against, found[against])
    from metrics import figures

    stem = Path(dest)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(f"{stem}.md", "w") as file:
        file.write(tables(chosen, against))
    with atomic_write(f"{stem}.csv", "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", *COLUMNS])
        for arm, rows in chosen.items():
            writer.writerows([arm, seed, *(row.get(c, "") for c in COLUMNS)] for seed, row in rows.items())
    paths = [f"{stem}.md", f"{stem}.csv", *figures.save(figure(chosen), stem, dpi=130)]
    print(json.dumps({"files": [str(path) for path in paths]}))


if __name__ == "__main__":
    main()
