"""Scores images against a reference: Fréchet distance, KID, precision/recall, agreement; overall and per source.

JSON goes to stdout, progress to stderr. Runs plain or under torchrun.
"""

import functools

import click

from dnnlib import EasyDict, cli
from dnnlib.options import options as fields
from metrics import commands, results, snapshots
from training.sampling import ProcessChoice, Sampling, listings


def _int(name, help, default=None, at_least=0):
    return _text(name, help, "INT", default, type=click.IntRange(min=at_least))


NUM = "--num --num-images"  # torchrun takes a bare --num for an abbreviation of an option of its own


def _text(name, help, metavar, default=None, **options):
    if default is not None:  # an explicit None would satisfy `required`
        options["default"] = default
    return click.option(*name.split(), help=help, metavar=metavar, **options)


def _dest(help, writes, metavar="FILE", **options):
    return _text("--dest", help, metavar, cls=cli.Output, writes=writes, **options)


def _options(*decorators):
    return lambda function: functools.reduce(lambda made, decorate: decorate(made), reversed(decorators), function)


def _choice(name, help, *values):
    return _text(name, help, None, values[0], type=cli.Choice(values))


def _pairs(name, help, metavar):
    return _text(name, help, metavar, multiple=True, callback=commands.parse_pairs)


DETECTORS = cli.listing(
    "--list-detectors", cli.names_in("metrics.detectors", "DETECTORS"), "Print the values of --metrics"
)
DEVICE = _options(cli.under("Running", cli.device_option), cli.plugin_option)
DEST = cli.under(
    "Result",
    _dest("Also write the JSON to this file", commands.SCORES),
    _pairs("--tag tags", "Note in the JSON, repeatable", "NAME=VALUE"),
)
WEIGHTS = _pairs(
    "--weights",
    "Weights of a detector: a file, its folder, a URL, or `download`; FILE@any: others than the published. Repeatable",
    "NAME=FILE",
)
EXTRACT = cli.under(
    "Features",
    _text(
        "--metrics",
        "Detectors: pixel, classifier:FILE, fid, fd_dinov2, swin_l, hf:FOLDER; default: what image size and weights allow",
        "LIST",
    ),
    WEIGHTS,
    _choice(
        "--detector-precision", "Of the detectors' networks; scores say what a lower one does", "fp32", "bf16", "fp16"
    ),
    click.option("--per-source/--no-per-source", help="Also per source", default=True),
    cli.under(
        "Running",
        _int("--batch", "Images per batch and process", 64, at_least=1),
        click.option(
            "--workers", help="Processes that decode images ahead", metavar="INT", type=cli.WORKERS, default=2
        ),
    ),
    DEVICE,
    DETECTORS,
)

FEATURES = cli.under(
    "Features",
    _text(
        "--features",
        "Keep the features of these images here; read them, if they are there and of the same images and detectors",
        "NPZ",
        cls=cli.Output,
        writes=commands.FEATURES,
    ),
)

COMPARE = cli.under(
    "Reference and distances",
    _text("--ref", "Reference file (ours, EDM's .npz, EDM2's .pkl)", "FILE"),
    _text("--data", "Reference images, instead of --ref", "DIR|ZIP"),
    EXTRACT,
    _text("--train", "Training images: adds nearest-neighbour distances", "DIR|ZIP"),
    _text("--distances", "Some of fd, kid, mmd, prdc, is", "LIST", "fd,kid,mmd,prdc,is", type=cli.STRINGS),
    _int("--splits", "Half-against-half splits of the floor", 4),
    _int("--seed", "calc: of the subset; gen: of the first image; also of the floor's splits", 0),
    DEST,
)


@cli.group()
def cmdline():
    """Score images against a reference, overall and per source.

    Examples:

    \b
    # Train a small classifier on real images: a detector that also judges labels
    python calculate_metrics.py detector --data=datasets/digits.zip --dest=detector.safetensors

    \b
    # Reference statistics, then score generated images (labels from their dataset.json)
    python calculate_metrics.py ref --data=datasets/holdout.zip --dest=refs/digits.npz \\
        --metrics=pixel,classifier:detector.safetensors
    python calculate_metrics.py calc --images=out --ref=refs/digits.npz --train=datasets/train.zip \\
        --metrics=pixel,classifier:detector.safetensors

    \b
    # Generate on the fly and score, nothing written
    torchrun --standalone --nproc_per_node=2 calculate_metrics.py gen --net=SNAPSHOT --ref=refs/digits.npz --num-images=1000

    \b
    # Every snapshot of a run from 100 million images on, each on three blocks of seeds; the same command resumes
    python calculate_metrics.py gen --net='RUN/*.safetensors' --min-kimg=100000 --blocks=3 --ref=refs/cifar10.npz
    """


@cmdline.command()
@_text("--data", "Reference images", "DIR|ZIP", required=True)
@_dest("Where to write the statistics (.npz)", commands.REFERENCE, required=True)
@EXTRACT
@click.option("--no-features", is_flag=True, help="Leave features out of --dest: no floors, KID, precision against it")
@FEATURES
def ref(**options):
    """Write reference statistics, overall and per source, with their provenance."""
    commands.ref(EasyDict(options))


@cmdline.command()
@_text("--images", "Images to score, labels in dataset.json", "DIR|ZIP", required=True)
@_int(NUM, "Seeded subset of so many; default: 50000 for fid and fd_dinov2, all for other detectors", at_least=2)
@COMPARE
@FEATURES
def calc(**options):
    """Score a folder or zip of images."""
    commands.calc(EasyDict(options))


@cmdline.command()
@cli.under(
    "What to generate",
    _int(NUM, "Images to generate, with seeds SEED to SEED + NUM - 1", 50000, at_least=2),
    _int("--blocks", "Score so many times NUM images, of seeds that follow: minimum, mean, spread", 1, at_least=1),
    _int("--min-kimg", "Of the snapshots that --net matches, those from so many thousand images on"),
    _int("--max-kimg", "Of the snapshots that --net matches, those up to so many thousand images"),
)
@cli.under(
    "Result",
    _text(
        "--outdir",
        "Folder of metrics.jsonl, curve and finished scores, to resume; default: metrics beside what a pattern matches",
        "DIR",
        cls=cli.Output,
        writes=snapshots.FOLDER,
    ),
)
@COMPARE
@fields(Sampling, skip=["max_batch_size"])
@listings
def gen(**options):
    """Generate images and score them: of one snapshot, or of all that the pattern --net='RUN/*.safetensors' matches."""
    snapshots.gen(EasyDict(options))


@cmdline.command()
@_text("--data", "Labelled images to train on", "DIR|ZIP", required=True)
@_text("--holdout", "Images to measure accuracy on; default: a fifth of --data", "DIR|ZIP")
@_text("--of", "Train nothing: fit which class of this published classifier each label is", "SPEC")
@WEIGHTS
@_dest("Where to write the detector (.safetensors; --of: .json)", commands.detector_kind, required=True)
@_int("--epochs", "Passes over the data", 20, at_least=1)
@_int("--seed", "Of initialisation, order and split", 0)
@DEVICE
def detector(**options):
    """Train a small classifier, or fit the labels of a published one (--of): the detector `classifier:FILE`."""
    commands.detector(EasyDict(options))


@cmdline.command()
@_text("--net", "Network snapshot, or a run folder (its newest)", "FILE|DIR", required=True)
@_text("--data", "Held-out images", "DIR|ZIP", required=True)
@_text("--sources", "Only images of these source ids", "LIST", type=cli.INTS)
@_int(NUM, "Use at most so many images", 1024, at_least=1)
@_int("--seed", "Of the noise", 0)
@DEVICE
@DEST
def loss(**options):
    """Denoising loss on held-out images at fixed noise levels, per source: a yardstick less noisy than samples."""
    commands.loss(EasyDict(options))


@cmdline.command()
@_text("--net", "Network snapshot, or a run folder (its newest)", "FILE|DIR", required=True)
@_text("--data", "Images", "DIR|ZIP", required=True)
@fields(ProcessChoice)
@_choice("--method", "elbo, ism (MDM's, a check of it), or ode (probability flow)", "elbo", "ism", "ode")
@_text("--encoder", "center, logit or discrete (probability of the levels); default: the snapshot's", "NAME")
@_int("--samples num_samples", "elbo, ism: network evaluations per image", 8, at_least=1)
@_choice("--probe", "ode: of the divergence", "rademacher", "gaussian", "exact")
@_int("--hutch-probes", "ode: probes per image", 1, at_least=1)
@_text("--rtol", "ode: relative tolerance", "FLOAT", 1e-5, type=cli.Float(min=0, min_open=True))
@_text("--atol", "ode: absolute tolerance", "FLOAT", 1e-5, type=cli.Float(min=0, min_open=True))
@_choice("--prior", "stationary, or matched to the data", "stationary", "matched")
@_text("--t-min", "Lowest time; or give --sigma-min", "FLOAT", type=cli.Float(min=0, min_open=True))
@_text("--sigma-min", "Lowest noise level; default 0.002", "FLOAT", type=cli.Float(min=0, min_open=True))
@_text("--sigma-max", "Highest noise level; default: the process's own", "FLOAT", type=cli.Float(min=0, min_open=True))
@_int(NUM, "A seeded subset of so many images; default: all", at_least=1)
@_int("--seed", "Of the subset and all draws", 0)
@_int("--batch", "Images per batch", 256, at_least=1)
@click.option("--per-source/--no-per-source", help="Also per source", default=True)
@_text("--sources", "Only images of these source ids", "LIST", type=cli.INTS)
@DEVICE
@DEST
def likelihood(**options):
    """Bits per dimension under any process: mean and standard error, overall and per source."""
    commands.likelihood(EasyDict(options))


@cmdline.command("energy")
@_text("--data", "Labelled images", "DIR|ZIP", required=True)
@DEST
def energy_command(**options):
    """Energy distance between the pixels of every two sources: how alike the data say they are, before any training."""
    from metrics.alike import energy

    energy(EasyDict(options))


@cmdline.command()
@_text("--scores", "Score files of calc --dest, with the tags arm, source, seed, sampling", "GLOB", required=True)
@_dest(
    "Folder of table.csv, table.md, comparison.png; --against: what .md, .csv, .png follow",
    commands.report_kind,
    "DIR",
    required=True,
)
@_text(
    "--arms", "Which should win, and against which; default: multi,single (--against: all)", "LIST", type=cli.STRINGS
)
@_text("--metric", "Of which detector, where score files hold several: its identity, or pixel, classifier, ...", "NAME")
@_choice("--measure", "What decides between the two arms", "fd", "denoising_loss")
@_text("--against", "Compare any number of arms with this one, by training seed", "ARM")
@_choice("--section", "--against: all samples, or mean of sources", "overall", "mean")
@_text("--contrasts", "Test what this experiment file declares under `contrasts`", "FILE")
@_text(
    "--reading",
    "--contrasts: also the validation loss after so many images; by tag n: 25:10Ki,100:30Ki",
    "NIMG|N:NIMG,...",
    type=cli.NIMG_BY_SIZE,
)
@click.option("--cells", is_flag=True, help="The lead paper's table: by the tags sim, k, n, its numbers beside ours")
@_text("--train-multi", "Training data of the shared model: proves that both arms saw the same images", "ZIP")
@_text(
    "--train-single",
    "Training data of the separate models, %s standing for the source id (--cells: %sim, %k, %n, %class)",
    "ZIP",
)
@_text("--real", "Real images to show in the figure", "DIR|ZIP")
@_text("--net", "Snapshot of the shared model: adds the theory's prediction", "FILE|DIR")
@_text("--detector", "Detector file: its own held-out accuracy goes under the table", "FILE")
@click.option("--note", "notes", metavar="TEXT", multiple=True, help="Line under the table; repeatable")
def report(**options):
    """Put score files together: one table, a verdict with its uncertainty, one figure.

    With --contrasts, the gain of every kind of model, and the declared contrasts by paired t over training seeds with Holm's p.
    With --against, any number of arms: means over training seeds, and differences to that arm of the same seed.
    """
    if options["cells"]:
        from metrics.report_cells import write_cells

        names = ("scores", "dest", "train_multi", "train_single", "notes")
        print(write_cells(**{name: options[name] for name in names}))
        return
    if options["contrasts"] is not None:
        from metrics.report_contrasts import report_command

        report_command(EasyDict(options))
        return
    commands.report(EasyDict(options))


@cmdline.command()
@_text("--scores", "Score files of --dest, with the tags seed and --over, perhaps arm", "GLOB", required=True)
@_dest("What .md, .csv, .png and .svg follow", commands.SWEEP, "STEM", required=True)
@_text("--over", "Tag whose values were swept", "NAME", "ema")
@_text("--measure", "Which number: denoising_loss, fd, kid, ...", "NAME", "denoising_loss")
@_text("--metric", "Of which detector, where score files hold several", "NAME")
@_choice("--section", "All samples, or mean of sources", "overall", "mean")
@_text("--label", "Of the x axis; default: the tag", "TEXT")
def sweep(**options):
    """Draw a number against a swept option, such as the EMA length: every seed, the mean, the optimum with its interval."""
    commands.sweep(EasyDict(options))


@cmdline.command()
@_text("--scores", "Score files of calc --dest, with the tag checkpoint", "GLOB", required=True)
@_text("--distance", "Which number: fd or kid", "NAME", "fd")
@_text("--detector", "Of which detector; default: the only one", "NAME")
@_int("--top", "How many of the best to average", 3, at_least=1)
def best(scores, distance, detector, top):
    """Minimum and top-3 mean over checkpoints, each with its lowest score over blocks of images."""
    commands.print_json(results.best_of(results.read_scores(scores, ["checkpoint"]), distance, detector, top))


if __name__ == "__main__":
    cmdline()
