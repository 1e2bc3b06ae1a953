"""Scores images against a reference: Frechet distance, KID, precision/recall, agreement; overall and per source.

JSON goes to stdout, progress to stderr. Runs plain or under torchrun.
"""

import os
import sys

import click

from dnnlib import cli
from generate_images import process_options
from metrics import commands


def _int(name, help, default=None, at_least=0):
    options = {} if default is None else {"default": default}
    return click.option(*name.split(), help=help, metavar="INT", type=click.IntRange(min=at_least), **options)


NUM = "--num --num-images"  # torchrun takes a bare --num for an abbreviation of an option of its own


def _text(name, help, metavar, default=None, **options):
    if default is not None:  # an explicit None would satisfy `required`
        options["default"] = default
    return click.option(name, help=help, metavar=metavar, **options)


def _options(*decorators):
    def apply(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


EXTRACT = _options(
    _text("--metrics", "Detectors: pixel, classifier:FILE", "LIST", "pixel"),
    click.option("--per-source/--no-per-source", help="Also per source", default=True),
    _int("--batch", "Images per batch and process", 64, at_least=1),
    click.option("--workers", help="Processes that decode images", metavar="INT", type=cli.WORKERS, default=0),
    _text("--device", "cpu, cuda, ...; default: cuda where there is one", "STR"),
)

COMPARE = _options(
    _text("--ref", "Reference file (ours, EDM's .npz, EDM2's .pkl)", "FILE"),
    _text("--data", "Reference images, instead of --ref", "DIR|ZIP"),
    EXTRACT,
    _int("--seed", "calc: of the subset; gen: of the first image; also of the floor's splits", 0),
    _text("--train", "Training images: adds nearest-neighbour distances", "DIR|ZIP"),
    _text("--distances", "Some of fd, kid, prdc", "LIST", "fd,kid,prdc"),
    _int("--splits", "Half-against-half splits of the floor", 4),
    _text("--dest", "Also write the JSON to this file", "FILE"),
    click.option("--tag", "tags", metavar="NAME=VALUE", multiple=True, help="Note in the JSON, for report; repeatable"),
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
    """


@cmdline.command()
@_text("--data", "Reference images", "DIR|ZIP", required=True)
@_text("--dest", "Where to write the statistics (.npz)", "FILE", required=True)
@EXTRACT
@click.option("--features/--no-features", help="Keep features, for floors, KID, precision", default=True)
def ref(data, dest, metrics, per_source, batch, workers, device, features):
    """Write reference statistics, overall and per source, with their provenance."""
    from metrics.features import collect_dataset, dataset_hash, progress_bar
    from metrics.references import save_references
    from torch_utils import distributed

    device = commands.start(device)
    root, suffix = os.path.splitext(dest)
    if suffix != ".npz":
        dest = (root if suffix == ".pkl" else dest) + ".npz"
        click.echo(f"Statistics are stored as npz: writing {dest}", err=True)
    commands.check_writable(dest)
    detectors, dataset = commands.open_detectors(metrics, device), commands.open_images(data, "--data")
    with progress_bar(len(dataset), "ref") as progress:
        sets = collect_dataset(
            dataset, detectors, per_source=per_source, batch_size=batch, workers=workers, progress=progress
        )
    content = dataset_hash(dataset)
    for feature_set in sets.values():
        feature_set.provenance["content_hash"] = content
    if distributed.get_rank() == 0:
        save_references(dest, sets, **({} if features else {"feature_limit": 0}))
    counts = next(iter(sets.values())).statistics.n.tolist()
    result = {"dest": dest, "data": data, "content_hash": content, "detectors": list(sets)}
    commands.print_json(result | {"num_images": counts[0], "source_counts": counts[1:]})


@cmdline.command()
@_text("--images", "Images to score, labels in dataset.json", "DIR|ZIP", required=True)
@_int(NUM, "Seeded subset of so many; default: all", at_least=2)
@COMPARE
def calc(images, num, **options):
    """Score a folder or zip of images."""
    from metrics.features import collect_dataset, progress_bar

    dataset = commands.open_images(images, "--images")
    if num is not None and num > len(dataset):
        raise ValueError(f"--num={num}: {images} holds {len(dataset)} images; generate more or lower --num")
    prepared = commands.prepare(**options)
    extract = {"batch_size": options["batch"], "workers": options["workers"], "seed": options["seed"]}
    with progress_bar(num or len(dataset), "images") as progress:
        samples = collect_dataset(dataset, prepared[0], num=num, progress=progress, **extract)
    commands.score(images, samples, prepared, **options)


def _parse_class(ctx, param, value):
    if value is None or value == "balanced":
        return value
    if not value.isdigit():
        raise click.BadParameter(f"'{value}': give a source id (0, 1, ...) or balanced")
    return int(value)


@cmdline.command()
@_text("--net", "Network snapshot, or a run folder (its newest)", "FILE|DIR", required=True)
@_int(NUM, "Images to generate, with seeds SEED to SEED + NUM - 1", 50000, at_least=2)
@_text("--class", "Source id, or balanced; default: random per seed", "INT|balanced", callback=_parse_class)
@_text("--sources", "With --class=balanced: cycle through these ids only", "LIST", type=cli.INTS)
@_int("--steps", "Sampling steps", 32, at_least=1)
@_text("--gnet", "Guiding network", "FILE")
@_text("--guidance", "Guidance strength; 1: none", "FLOAT", 1.0, type=cli.Float())
@COMPARE
def gen(net, num, sources, steps, gnet, guidance, **options):
    """Generate images from a snapshot and score them; nothing is written."""
    from generate_images import generate_images
    from metrics.features import collect, generated_batches, progress_bar

    for option, path in (("--net", net), ("--gnet", gnet)):
        if path is not None and "://" not in path and not os.path.exists(path):
            raise ValueError(f"{option}={path}: no such file; give a snapshot")
    if (guidance == 1) != (gnet is None):
        raise ValueError(f"--guidance={guidance:g} and --gnet go together: give both or none")
    sampler = {"num_steps": steps} | ({} if gnet is None else {"gnet": gnet, "guidance": guidance})
    class_idx = options.pop("class")
    if sources and class_idx != "balanced":
        raise ValueError(f"--sources={','.join(map(str, sources))} needs --class=balanced")
    prepared = commands.prepare(**options)
    detectors, references, _, device = prepared
    seeds = range(options["seed"], options["seed"] + num)
    images = generate_images(
        net, seeds, class_idx=class_idx, sources=sources, max_batch_size=options["batch"], device=device, **sampler
    )
    num_sources = max(reference.num_sources for reference in references.values())
    with progress_bar(num, "gen") as progress:
        batches = generated_batches(images)
        samples = collect(batches, detectors, num_sources=num_sources, num_images=num, progress=progress)
    commands.score(net, samples, prepared, **options)


@cmdline.command()
@_text("--data", "Labelled images to train on", "DIR|ZIP", required=True)
@_text("--holdout", "Images to measure accuracy on; default: a fifth of --data", "DIR|ZIP")
@_text("--dest", "Where to write the detector (.safetensors)", "FILE", required=True)
@_int("--epochs", "Passes over the data", 20, at_least=1)
@_int("--seed", "Of initialisation, order and split", 0)
@_text("--device", "cpu, cuda, ...; default: cuda where there is one", "STR")
def detector(data, holdout, dest, epochs, seed, device):
    """Train a small classifier: the detector `classifier:FILE`."""
    import tqdm

    from metrics.classifier import train_classifier
    from metrics.features import load_labelled
    from torch_utils import distributed

    device = commands.start(device)
    if distributed.get_world_size() > 1:
        raise ValueError("the detector is trained by one process: run it without torchrun")
    commands.check_writable(dest)
    images, labels, num_classes = load_labelled(commands.open_images(data, "--data"))
    held = load_labelled(commands.open_images(holdout, "--holdout"))[:2] if holdout else (None, None)
    options = {"num_classes": num_classes, "epochs": epochs, "seed": seed, "device": device}
    options["progress"] = lambda epochs: tqdm.tqdm(epochs, desc="detector", unit="epoch", file=sys.stderr)
    judge = train_classifier(images, labels, holdout_images=held[0], holdout_labels=held[1], **options)
    judge.save(dest)
    report = {name: judge.header[name] for name in ("accuracy", "source_accuracy", "num_train", "num_holdout")}
    commands.print_json({"dest": dest, "data": data, "detector": judge.identity} | report)


@cmdline.command()
@_text("--net", "Network snapshot, or a run folder (its newest)", "FILE|DIR", required=True)
@_text("--data", "Held-out images", "DIR|ZIP", required=True)
@_text("--sources", "Only images of these source ids", "LIST", type=cli.INTS)
@_int(NUM, "Use at most so many images", 1024, at_least=1)
@_int("--seed", "Of the noise", 0)
@_text("--device", "cpu, cuda, ...; default: cuda where there is one", "STR")
@_text("--dest", "Also write the JSON to this file", "FILE")
@click.option("--tag", "tags", metavar="NAME=VALUE", multiple=True, help="Note in the JSON, for report; repeatable")
def loss(net, data, sources, num, seed, device, dest, tags):
    """Denoising loss on held-out images at fixed noise levels, per source: a yardstick less noisy than samples."""
    from torch_utils import distributed
    from torch_utils.persistence import load_snapshot
    from training.validation import HeldOut

    if dest is not None:
        commands.check_writable(dest)
    tags = commands.parse_tags(tags)
    device = commands.start(device)
    if distributed.get_world_size() > 1:
        raise ValueError("the denoising loss is computed by one process: run it without torchrun")
    snapshot = load_snapshot(net, device)
    dataset = commands.open_images(data, "--data")
    if sources is not None:
        dataset = dataset.subset([i for source in sources for i in dataset.indices_of(source)])
    result = HeldOut(dataset, seed, num).denoising_loss(snapshot.net, snapshot.encoder)
    sources = {str(k): {"denoising_loss": v} for k, v in result.pop("sources", {}).items()}
    commands.finish(
        {"net": net, "seed": seed, "tags": tags, "metrics": {"denoising": {**result, "sources": sources}}}, dest
    )


@cmdline.command()
@_text("--net", "Network snapshot, or a run folder (its newest)", "FILE|DIR", required=True)
@_text("--data", "Images", "DIR|ZIP", required=True)
@process_options
@_text("--method", "elbo, or ode (probability flow)", "NAME", "elbo", type=click.Choice(["elbo", "ode"]))
@_text("--encoder", "center, logit or discrete (probability of the levels); default: the snapshot's", "NAME")
@_int("--samples", "elbo: network evaluations per image", 8, at_least=1)
@_text(
    "--probe", "ode: of the divergence", "NAME", "rademacher", type=click.Choice(["rademacher", "gaussian", "exact"])
)
@_int("--hutch-probes", "ode: probes per image", 1, at_least=1)
@_text("--rtol", "ode: relative tolerance", "FLOAT", 1e-5, type=cli.Float(min=0, min_open=True))
@_text("--atol", "ode: absolute tolerance", "FLOAT", 1e-5, type=cli.Float(min=0, min_open=True))
@_text(
    "--prior", "stationary, or matched to the data", "NAME", "stationary", type=click.Choice(["stationary", "matched"])
)
@_text("--t-min", "Lowest time; or give --sigma-min", "FLOAT", type=cli.Float(min=0, min_open=True))
@_text("--sigma-min", "Lowest noise level; default 0.002", "FLOAT", type=cli.Float(min=0, min_open=True))
@_text("--sigma-max", "Highest noise level; default: the process's own", "FLOAT", type=cli.Float(min=0, min_open=True))
@_int(NUM, "A seeded subset of so many images; default: all", at_least=1)
@_int("--seed", "Of the subset and all draws", 0)
@_int("--batch", "Images per batch", 256, at_least=1)
@click.option("--per-source/--no-per-source", help="Also per source", default=True)
@_text("--device", "cpu, cuda, ...; default: cuda where there is one", "STR")
@_text("--dest", "Also write the JSON to this file", "FILE")
@click.option("--tag", "tags", metavar="NAME=VALUE", multiple=True, help="Note in the JSON, for report; repeatable")
def likelihood(
    net, data, process, process_options, encoder, samples, method, num, seed, device, dest, tags, t_min, sigma_min,
    sigma_max, **options,
):  # fmt: skip
    """Bits per dimension under any process: mean and standard error, overall and per source."""
    from metrics.features import progress_bar
    from metrics.likelihood_report import choose_encoder, likelihood_report
    from torch_utils import distributed
    from torch_utils.persistence import load_snapshot
    from training.processes.options import make_process, require_gaussian

    if dest is not None:
        commands.check_writable(dest)
    tags = commands.parse_tags(tags)
    device = commands.start(device)
    if distributed.get_world_size() > 1:
        raise ValueError("likelihoods are computed by one process: run it without torchrun")
    snapshot = load_snapshot(net, device)
    chosen = make_process(process or "edm", process_options, trained=snapshot.process)
    require_gaussian(snapshot.process, chosen)
    transform = choose_encoder(encoder, snapshot.encoder)
    ends = {"t_min": t_min, "sigma_min": sigma_min, "sigma_max": sigma_max}
    options.update({name: value for name, value in ends.items() if value is not None})
    dataset = commands.open_images(data, "--data")
    with progress_bar(min(num or len(dataset), len(dataset)), "likelihood") as progress:
        result = likelihood_report(
            snapshot.net,
            dataset,
            chosen,
            transform,
            method,
            num,
            seed,
            num_samples=samples,
            progress=progress,
            **options,
        )
    about = {"net": net, "data": data, "seed": seed, "tags": tags, "method": method}
    about |= {"process": chosen.spec(), "encoder": repr(transform)}
    commands.finish(about | {"metrics": {"likelihood": result}}, dest)


@cmdline.command()
@_text("--scores", "Score files of calc --dest, with the tags arm, source, seed, sampling", "GLOB", required=True)
@_text("--dest", "Folder for table.csv, table.md and comparison.png", "DIR", required=True)
@_text("--arms", "The arm that should win, and the one it is held against", "A,B", "multi,single", type=cli.STRINGS)
@_text("--train-multi", "Training data of the shared model: proves that both arms saw the same images", "ZIP")
@_text("--train-single", "Training data of the separate models, %s standing for the source id", "ZIP")
@_text("--real", "Real images to show in the figure", "DIR|ZIP")
@_text("--net", "Snapshot of the shared model: adds the theory's prediction", "FILE|DIR")
@_text("--detector", "Detector file: its own held-out accuracy goes under the table", "FILE")
@click.option("--note", "notes", metavar="TEXT", multiple=True, help="Line under the table; repeatable")
def report(scores, dest, arms, train_multi, train_single, real, net, detector, notes):
    """Put score files together: one table, a verdict with its uncertainty, one figure."""
    from metrics.report import write_report

    if len(arms) != 2:
        raise ValueError(f"--arms={','.join(arms)}: give two names, such as multi,single")
    print(write_report(scores, dest, arms, train_multi, train_single, real, net, detector, notes))


@cmdline.command()
@_text("--scores", "Score files of calc --dest, with the tag checkpoint", "GLOB", required=True)
@_text("--distance", "Which number: fd or kid", "NAME", "fd")
@_text("--detector", "Of which detector; default: the only one", "NAME")
@_int("--top", "How many of the best to average", 3, at_least=1)
def best(scores, distance, detector, top):
    """Minimum and top-3 mean over checkpoints, each with its lowest score over blocks of images."""
    from metrics.checkpoints import best_of, read_checkpoint_scores

    commands.print_json(best_of(read_checkpoint_scores(scores, distance, detector), top))


if __name__ == "__main__":
    cmdline()
