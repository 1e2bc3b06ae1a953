"""Should your sources be trained together? A pilot on your data, or scores that are there already, and the answer in words."""

import os
import sys

import click

from dnnlib import cli, outputs

EXAMPLES = """
\b
Examples:
  # From a data set (dataset_tool.py) to learning curves, the worth of a companion's images, and who helps whom:
  python plan.py --data=datasets/mine.zip --outdir=plans/mine
\b
  # The same from the scores of an experiment:
  python plan.py --scores='results/multi-vs-single/scores/*.json' --outdir=plans/digits
"""
PLAN = outputs.written("a plan", "plan.md", "multiplier.csv", "curves.png", "curves.svg", folder=True)
FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "experiments", "plan.yaml")


def pilot(data, dest, sizes, settings):
    """Settings of the pilot for a data set; all but the numbers of images are those of the experiment file."""
    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(data)
    sources = dataset.sources or []
    if len(sources) < 2:
        raise ValueError(f"--data={data}: give a data set with labels of two sources or more")
    least = min(len(dataset.indices_of(k)) for k in sources)
    sizes = sizes or sorted({max(2, least // (2 * 4)), max(3, least // 4), max(4, least // 2)})
    spare = (least - max(sizes)) // 2
    if spare < 2 or len(sizes) < 2:
        raise ValueError(
            f"--sizes={','.join(map(str, sizes))}: give two numbers or more that leave 4 images of the smallest source's "
            f"{least} to judge by"
        )

    def kind(sets):
        """Models of these sets of sources {name: ids}, all of one size."""
        k = len(next(iter(sets.values())))
        how = {name: settings[f"{name}_{'alone' if k == 1 else 'shared'}"] for name in ("lr", "patience")}
        named = [{"set": name, "members": members} for name, members in sets.items()]
        return {"k": k, "look": settings["look"] * k, **how, "names": list(sets), "sets": named}

    kinds = [kind({k: [k] for k in sources}), kind({"all": sources})]
    groups = [{"n": n, "kinds": kinds} for n in sizes]
    if len(sources) > 2:
        pairs = {f"{a}-{b}": [a, b] for i, a in enumerate(sources) for b in sources[i + 1 :]}
        groups.append({"n": min(sizes), "kinds": [kind(pairs)]})
    return {
        "data": data,
        "out": dest,
        "kept": max(sizes),
        "validated": min(spare, 50),
        "least": min(sizes),
        "groups": groups,
    }


@cli.command(epilog=EXAMPLES)
@click.option("--data", metavar="ZIP|DIR", help="Labelled images: a pilot is trained on them")
@click.option("--scores", metavar="GLOB", help="Score files with the tags k, n, seed, instead")
@cli.output("--outdir --dest outdir", PLAN, metavar="DIR", required=True, help="Folder of the answer, and of the pilot")
@click.option("--measure", metavar="NAME", default="bits_per_dim", help="What is to be small")
@click.option(
    "--sizes", metavar="LIST", type=cli.INTS, help="Images of each source; default: 1/8, 1/4, 1/2 of the smallest"
)
@click.option("--budget", metavar="NAME", help="Of experiments/plan.yaml, e.g. smoke")
@click.option("--jobs", metavar="INT", type=cli.COUNT, default=1, help="Steps side by side")
def main(data, scores, outdir, measure, sizes, budget, jobs):
    """Say whether sources should be trained together: learning curves of single and of shared models, what an image of a
    companion is worth, where the answer turns, and who helps whom."""
    if (data is None) == (scores is None):
        raise ValueError("give either --data=ZIP or --scores=GLOB")
    from pathlib import Path

    from metrics.plan import write_plan
    from metrics.results import read_scores

    about = ""
    if data is not None:
        from dnnlib import experiment
        from run_experiment import load_scripts

        settings, _ = experiment.load(FILE, budget, {"data": data})
        settings, steps = experiment.load(FILE, budget, pilot(data, outdir, sizes, settings))
        count = sum(len(kind["names"]) for group in settings["groups"] for kind in group["kinds"])
        seeds = len(settings["seeds"])
        models = (
            f"{count * seeds} models of preset {settings['preset']} at {settings['resolution']} ({settings['options']})"
        )
        about = (
            f"Pilot: {models}, {seeds} seeds, each model at its own lowest validation loss. Other networks and resolutions may "
            "give another answer."
        )
        print(f"{about} The same command again resumes.", file=sys.stderr)
        experiment.run(steps, outdir, load_scripts, jobs)
        scores = os.path.join(outdir, "scores", "*.json")
    print(write_plan(read_scores(scores), Path(outdir), measure, about))


if __name__ == "__main__":
    main()
