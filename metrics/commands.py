"""The bodies behind calculate_metrics.py: open the inputs, refuse early, measure, write the JSON.

`o` holds the options under their names on the command line. Heavy imports happen inside, so that a command's help costs
nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from dnnlib import outputs
from dnnlib.util import EasyDict, write_json

if TYPE_CHECKING:
    import torch

    from metrics.features import FeatureSet
    from torch_utils.persistence import Snapshot
    from training.dataset import Dataset
    from training.fit import Side


def _npz(dest):
    """Where `ref` writes: statistics are stored as npz, whatever the name."""
    return Path(f"{dest.with_suffix('') if dest.suffix in ('.npz', '.pkl') else dest}.npz")


SCORES = outputs.Kind("a score file", outputs.json_with("metrics"))
REFERENCE = outputs.Kind(
    "a reference file of ours",
    outputs.zip_with("header.npy", "feature-reference".encode("utf-32-le")),
    files=lambda dest: [_npz(dest)],
)
DETECTOR = outputs.Kind("a detector file", outputs.safetensors_with("classifier-detector-"))

SWEEP = outputs.written("a sweep", ".md", ".csv", ".png", ".svg")


def report_kind(o: dict) -> outputs.Kind:
    """What `report` writes, by its options."""
    if o["against"] is not None:
        return outputs.written("a report", ".md", ".csv", ".png", ".svg")
    return outputs.written("a report", "table.md", "table.csv", "comparison.png", "comparison.svg", folder=True)


def start(device: str | None, alone: str | None = None) -> torch.device:
    """Join the process group, if there is one, until the command ends; returns the device.

    alone: what happens in one process only, for the message of the ValueError where there are several.
    """
    from torch_utils import distributed

    click.get_current_context().call_on_close(distributed.shutdown)
    found = distributed.init(device)
    if alone is not None and distributed.get_world_size() > 1:
        raise ValueError(f"{alone} by one process: run it without torchrun")
    return found


def open_images(path: str, option: str) -> Dataset:
    """The data set at `path`, also a .npz or .npy of images (guided-diffusion); a ValueError names the option."""
    from training.dataset import ImageFolderDataset, open_stack

    try:
        return open_stack(path) if Path(path).suffix.lower() in (".npz", ".npy") else ImageFolderDataset(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from None


def open_detectors(metrics: str, device: torch.device) -> dict[str, object]:
    """{identity: detector} of the comma-separated specs `metrics`; a ValueError names the option."""
    from metrics.detectors import get_detectors

    try:
        return get_detectors(metrics, device)
    except ValueError as error:
        raise ValueError(f"--metrics={metrics}: {error}") from None


def parse_tags(context: click.Context, option: click.Parameter, words: Sequence[str]) -> dict[str, str]:
    """Callback of --tag: {name: value} from NAME=VALUE words."""
    tags = {}
    for word in words:
        name, equals, tags[name] = word.partition("=")
        if not (name and equals):
            raise ValueError(f"--tag={name}: give NAME=VALUE")
    return tags


def print_json(result: dict) -> None:
    """Strict JSON on stdout, from rank 0. Raises ValueError that names a number that is not finite."""
    from metrics.results import finite
    from torch_utils import distributed

    finite(result, "the result")
    distributed.print0(json.dumps(result, indent=2, allow_nan=False))


def finish(result: dict, dest: str | None) -> None:
    """Print the JSON, and write it to `dest` where one is given."""
    print_json(result)
    if dest is not None:
        write_json(dest, result)


def look(
    dataset: Dataset, detectors: dict[str, object], what: str, o: EasyDict, **options: object
) -> dict[str, FeatureSet]:
    """What the detectors see in a data set, with a bar that is called `what`; options of `features.collect_dataset`."""
    from metrics.features import collect_dataset, progress_bar

    options |= {"batch_size": o.batch, "workers": o.workers}
    with progress_bar(options.get("num") or len(dataset), what) as progress:
        return collect_dataset(dataset, detectors, progress=progress, **options)


OVERLAP = {"images": "samples", "reference": "reference", "training": "training data"}


class Prepared(NamedTuple):
    """What samples are compared with, by identity of the detector."""

    detectors: dict[str, object]
    references: dict[str, FeatureSet]
    training: dict[str, FeatureSet] | None


def side_of(name: str, dataset: Dataset) -> Side:
    """What is compared of a data set of images."""
    from training import fit

    return fit.of_images(name, dataset.image_shape, dataset.declared_classes)


def prepare(o: EasyDict, device: torch.device, samples: Side) -> Prepared:
    """Open what calc and gen compare `samples` with; refuses before any long work."""
    from metrics.evaluate import MEASURES
    from metrics.references import load_references, require_detectors
    from training import fit

    if (o.ref is None) == (o.data is None):
        raise ValueError("give either --ref=FILE or --data=ZIP as the reference")
    if unknown := [name for name in o.distances if name not in MEASURES]:
        known = ", ".join(MEASURES)
        raise ValueError(f"--distances={','.join(o.distances)}: unknown distance '{unknown[0]}'; known: {known}")
    detectors = open_detectors(o.metrics, device)
    opened = {option: open_images(o[option], f"--{option}") for option in ("data", "train") if o[option]}
    for option, dataset in opened.items():
        fit.check(side_of(f"--{option}={o[option]}", dataset), samples)
    if o.ref is None:
        references = look(opened["data"], detectors, "data", o)
    else:
        references = require_detectors(load_references(o.ref), detectors, o.ref)
        for key in detectors:
            fit.check(references[key].side(f"--ref={o.ref}"), samples)
    training = look(opened["train"], detectors, "train", o) if o.train else None
    return Prepared(detectors, references, training)


def score(
    name: str, samples: dict[str, FeatureSet], prepared: Prepared, o: EasyDict, trained: Sequence[int] | None
) -> None:
    """Compare on rank 0, print the JSON and write it to --dest; says where images were seen before. trained: see `compare`."""
    from metrics.evaluate import compare
    from torch_utils import distributed

    if distributed.get_rank() != 0:
        return
    options = {"seed": o.seed, "per_source": o.per_source, "splits": o.splits, "measures": o.distances}
    options["trained"] = trained
    result = {"images": name, "seed": o.seed, "tags": o.tags, "overlap": overlaps(samples, prepared), "metrics": {}}
    for key, detector in prepared.detectors.items():
        seen, reference = samples[key].statistics, prepared.references[key]
        if seen.count() <= seen.width:
            notice = "covariances are singular, read distances beside their floor"
            click.echo(f"{key}: {seen.count()} images, {seen.width} features: {notice}", err=True)
        train = prepared.training and prepared.training[key]
        scores = compare(samples[key], reference, detector=detector, train=train, **options)
        if left := scores.get("left_out"):
            notice = (
                f"sources {', '.join(left)}, which the reference or the training data lack, are left out of the overall"
            )
            click.echo(f"Warning: {key}: {sum(left.values())} images of {notice} numbers", err=True)
        result["metrics"][key] = scores | {"reference": reference.provenance}
    finish(result, o.dest)


def overlaps(samples: dict[str, FeatureSet], prepared: Prepared) -> dict[str, int]:
    """Images that two of samples, reference and training data share, where the hashes are known; each warned of."""
    key = next(iter(samples))
    sets = {"images": samples[key], "reference": prepared.references[key]}
    if prepared.training:
        sets["training"] = prepared.training[key]
    found = {}
    for (a, first), (b, second) in itertools.combinations(sets.items(), 2):
        if (shared := first.shared_with(second)) is not None:
            found[f"{a}_in_{b}"] = shared
        if shared:
            note = f"Warning: {shared} of {first.count()} images of the {OVERLAP[a]} are in the {OVERLAP[b]} too"
            click.echo(f"{note}: their scores say nothing about new images", err=True)
    return found


def ref(o: EasyDict) -> None:
    """Reference statistics of a data set into an npz file."""
    from metrics.references import save_references
    from torch_utils import distributed

    device = start(o.device)
    dest = str(_npz(Path(o.dest)))
    if Path(dest) != Path(o.dest):
        click.echo(f"Statistics are stored as npz: writing {dest}", err=True)
    detectors, dataset = open_detectors(o.metrics, device), open_images(o.data, "--data")
    sets = look(dataset, detectors, "ref", o, per_source=o.per_source)
    if distributed.get_rank() != 0:
        return
    save_references(dest, sets, **({} if o.features else {"feature_limit": 0}))
    first = next(iter(sets.values()))
    counts, content = first.statistics.n.tolist(), first.provenance["content_hash"]
    result = {"dest": dest, "data": o.data, "content_hash": content, "detectors": list(sets)}
    print_json(result | {"num_images": counts[0], "source_counts": counts[1:]})


def calc(o: EasyDict) -> None:
    """Score a folder or zip of images."""
    dataset = open_images(o.images, "--images")
    if o.num is not None and o.num > len(dataset):
        raise ValueError(f"--num={o.num}: {o.images} holds {len(dataset)} images; generate more or lower --num")
    prepared = prepare(o, start(o.device), side_of(f"--images={o.images}", dataset))
    samples = look(dataset, prepared.detectors, "images", o, num=o.num, seed=o.seed)
    score(o.images, samples, prepared, o, range(dataset.num_classes))  # whatever made them was asked for these


def gen(o: EasyDict) -> None:
    """Generate images from a snapshot and score them."""
    from metrics.features import collect, generated_batches, progress_bar
    from torch_utils.persistence import load_snapshot
    from training import fit, generation, sampling

    chosen = sampling.take(o)
    chosen.max_batch_size = o.batch
    for option, path in (("--net", chosen.net), ("--gnet", chosen.gnet)):
        if not (path is None or path in generation.NULL_GUIDES or "://" in path or os.path.exists(path)):
            raise ValueError(f"{option}={path}: no such file; give a snapshot")
    device = start(o.device)
    snapshot = load_snapshot(chosen.net, device)
    batches = generated_batches(generation.batches(chosen, range(o.seed, o.seed + o.num), device, net=snapshot))
    prepared = prepare(o, device, fit.of_samples("--net", snapshot))
    num_sources = max(reference.num_sources for reference in prepared.references.values())
    with progress_bar(o.num, "gen") as progress:
        samples = collect(batches, prepared.detectors, num_sources=num_sources, num_images=o.num, progress=progress)
    score(chosen.net, samples, prepared, o, snapshot.sources)


def detector(o: EasyDict) -> None:
    """Train a small classifier."""
    import tqdm

    from metrics.classifier import train_classifier
    from training.dataset import load_raw

    device = start(o.device, alone="the detector is trained")

    def labelled(path, option):
        dataset = open_images(path, option)
        if not dataset.has_onehot_labels:
            raise ValueError(f"{option}={path}: images have no labels that are classes; a classifier needs them")
        return (*load_raw(dataset), dataset.label_dim)

    images, labels, num_classes = labelled(o.data, "--data")
    held = labelled(o.holdout, "--holdout")[:2] if o.holdout else None
    options = {"num_classes": num_classes, "epochs": o.epochs, "seed": o.seed, "device": device}
    options["progress"] = lambda epochs: tqdm.tqdm(epochs, desc="detector", unit="epoch", file=sys.stderr)
    judge = train_classifier(images, labels, holdout=held, **options)
    judge.save(o.dest)
    report = {name: judge.header[name] for name in ("accuracy", "source_accuracy", "num_train", "num_holdout")}
    print_json({"dest": o.dest, "data": o.data, "detector": judge.identity} | report)


def open_both(o: EasyDict, device: torch.device) -> tuple[Snapshot, Dataset]:
    """The network --net and the data set --data (its --sources) that it is measured on; refuses what does not fit."""
    from torch_utils.persistence import load_snapshot
    from training import fit
    from training.encoders import StandardRGBEncoder

    snapshot, dataset = load_snapshot(o.net, device), open_images(o.data, "--data")
    snapshot.encoder = snapshot.encoder or StandardRGBEncoder()
    dropout = bool(snapshot.options.get("label_dropout"))
    fit.check_data(f"--data={o.data}", dataset, fit.of_snapshot("--net", snapshot), unlabelled=dropout)
    if o.get("sources") is not None:
        chosen = [i for source in o.sources for i in dataset.indices_of(source)]
        if not chosen:
            raise ValueError(f"--sources={','.join(map(str, o.sources))}: {o.data} holds no image of these")
        dataset = dataset.subset(chosen)
    trained, held = snapshot.sources, dataset.sources
    if unseen := sorted(set(held) - set(trained)) if trained and held else []:
        known = ",".join(map(str, trained))
        notice = f"sources {','.join(map(str, unseen))}, of which the network saw none: it was trained on {known}"
        click.echo(f"Warning: --data={o.data} holds images of {notice}; overall numbers are about these too", err=True)
    return snapshot, dataset


def loss(o: EasyDict) -> None:
    """Denoising loss on held-out images."""
    from metrics.features import content_hashes
    from training.validation import HeldOut

    snapshot, dataset = open_both(o, start(o.device, alone="the denoising loss is computed"))
    held = HeldOut(dataset, o.seed, o.num)
    found = held.denoising_loss(snapshot.net, snapshot.encoder, snapshot.kernel)
    found["sources"] = {str(k): {"denoising_loss": v} for k, v in found.get("sources", {}).items()}
    found |= {"num": len(held.images), "reference_hashes": content_hashes(held.images, held.labels)}
    finish({"net": o.net, "seed": o.seed, "tags": o.tags, "metrics": {"denoising": found}}, o.dest)


def likelihood(o: EasyDict) -> None:
    """Bits per dimension under any process."""
    from metrics.evaluate import bits_per_dim, choose_encoder
    from metrics.features import progress_bar
    from training.processes.options import make_process, named, require_gaussian

    snapshot, dataset = open_both(o, start(o.device, alone="likelihoods are computed"))
    process = make_process(o.process or "edm", o.process_options, trained=snapshot.process)
    require_gaussian(snapshot.process, process)
    encoder = choose_encoder(o.encoder, snapshot.encoder)
    of_method = {"elbo": ("num_samples",), "ode": ("probe", "hutch_probes", "rtol", "atol")}[o.method]
    names = ("num", "seed", "batch", "per_source", "prior", "t_min", "sigma_min", "sigma_max", *of_method)
    options = {name: o[name] for name in names if o[name] is not None}
    with progress_bar(min(o.num or len(dataset), len(dataset)), "likelihood") as progress:
        result = bits_per_dim(snapshot.net, dataset, process, encoder, o.method, progress=progress, **options)
    about = {"net": o.net, "data": o.data, "seed": o.seed, "tags": o.tags, "method": o.method}
    about |= {"process": named(process), "encoder": repr(encoder)}
    finish(about | {"metrics": {"likelihood": result}}, o.dest)


def report(o: EasyDict) -> None:
    """Put score files together: two arms or a grid of them, or with --against any number of arms."""
    from metrics.report import write_report
    from metrics.report_arms import write_arms_report

    if o.against is not None:
        files = write_arms_report(o.scores, o.dest, o.against, o.arms, o.section, o.metric)
        print_json({"files": [str(file) for file in files]})
        return
    arms = o.arms or ["multi", "single"]
    if len(arms) != 2:
        raise ValueError(f"--arms={','.join(arms)}: give two names, such as multi,single")
    names = ("metric", "measure", "train_multi", "train_single", "real", "net", "detector", "notes")
    print(write_report(o.scores, o.dest, arms, **{name: o[name] for name in names}))


def sweep(o: EasyDict) -> None:
    """A number against a swept option."""
    from metrics.report_sweep import write_sweep

    print_json(write_sweep(o.scores, o.dest, o.over, o.measure, o.section, o.metric, o.label))
