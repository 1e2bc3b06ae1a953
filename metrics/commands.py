"""The bodies behind calculate_metrics.py: open the inputs, refuse early, measure, write the JSON.

`o` holds the options under their names on the command line. Heavy imports happen inside, so that a command's help costs
nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from dnnlib import outputs
from dnnlib.util import EasyDict, one_of, write_json

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
FEATURES = outputs.Kind("a file of features of ours", REFERENCE.holds)
_TRAINED = outputs.Kind("a detector file", outputs.safetensors_with("classifier-detector-"))
_FITTED = outputs.Kind("a class order", outputs.json_with("order"))


def detector_kind(o: dict) -> outputs.Kind:
    """What `detector` writes, by its options."""
    return _TRAINED if o["of"] is None else _FITTED


SWEEP = outputs.written("a sweep", ".md", ".csv", ".png", ".svg")


def report_kind(o: dict) -> outputs.Kind:
    """What `report` writes, by its options."""
    if o["against"] is not None:
        return outputs.written("a report", ".md", ".csv", ".png", ".svg")
    names = ["table.md", "table.csv", "contrasts.csv", "cells.csv", "comparison.png", "comparison.svg"]
    return outputs.written("a report", *names, folder=True)


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


def open_detectors(
    metrics: str,
    device: torch.device,
    weights: dict[str, str] | None = None,
    option: str = "--metrics",
    precision: str = "fp32",
) -> dict[str, object]:
    """{identity: detector} of the comma-separated specs `metrics` of an option, which a ValueError names.

    weights: of --weights, {name: file} for the specs that name none. precision: of --detector-precision.
    """
    from metrics.detectors import Detector, get_detectors, split_specs

    if stray := sorted({*(weights or {})} - {*split_specs(metrics)}):
        raise ValueError(f"--weights={stray[0]}={weights[stray[0]]}: {option}={metrics} names no detector '{stray[0]}'")
    try:
        found = get_detectors(metrics, device, weights)
    except ValueError as error:
        raise ValueError(f"{option}={metrics}: {error}") from None
    for key, detector in found.items() if precision != "fp32" else ():
        if not isinstance(detector, Detector) or detector.net is None:
            raise ValueError(f"--detector-precision={precision}: {key} computes in fp32 alone; leave the option out")
        detector.precision = precision
    return found


SMALLEST = 32  # pixels per side from which on published detectors are the default: CIFAR-10's


def default_metrics(o: EasyDict, samples: Side, references: dict[str, FeatureSet] | None = None) -> str:
    """The detectors where --metrics is not given; says which, where weights decide.

    Those of the reference file, else those of --weights, else the published ones whose weights are at hand, for images
    that are not tiny, else pixel.
    """
    from metrics.detectors import DETECTORS, at_hand

    if references is not None:
        name = lambda identity: identity.partition(":")[0]
        known = [name(key) for key in references if key in DETECTORS or name(key) in (o.weights or {})]
        if not known:
            held = ", ".join(references)
            raise ValueError(f"--ref={o.ref} holds statistics of {held}: name the detector, --metrics=NAME:FILE")
        return ",".join(known)
    sides = [int(n) for n in re.findall(r"\d+", str(samples.img_resolution))]
    found = list(o.weights or ()) or (at_hand() if sides and min(sides) >= SMALLEST else [])
    if found:
        click.echo(f"--metrics={','.join(found)}, whose weights are at hand", err=True)
    return ",".join(found) or "pixel"


def parse_pairs(context: click.Context, option: click.Parameter, words: Sequence[str]) -> dict[str, str]:
    """Callback of --tag, --weights: {name: value} from NAME=VALUE words."""
    pairs = {}
    for word in words:
        name, equals, pairs[name] = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{option.opts[0]}={word}: give NAME=VALUE")
    return pairs


def print_json(result: dict) -> None:
    """Strict JSON on stdout, from rank 0. Raises ValueError that names a number that is not finite."""
    from metrics.results import finite
    from torch_utils import distributed

    finite(result, "the result")
    distributed.print0(json.dumps(result, indent=2, allow_nan=False))


def finish(result: dict | None, dest: str | None) -> None:
    """Print the JSON, and write it to `dest` where one is given; nothing on the ranks that have none."""
    if result is None:
        return
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


def look_once(
    dataset: Dataset, detectors: dict[str, object], what: str, o: EasyDict, **options: object
) -> dict[str, FeatureSet]:
    """`look`, or what it found before: features in the file --features, which is made where it is not there.

    Raises ValueError for a file of other images or labels, another size of them, or other detectors.
    """
    from metrics.features import choose
    from metrics.references import load_references, require_same_features, save_references
    from torch_utils import distributed

    if o.features is None:
        return look(dataset, detectors, what, o, **options)
    if os.path.exists(o.features) and os.path.getsize(o.features):
        chosen = dataset.subset(choose(dataset, options.get("num"), options.get("seed", 0)))
        return require_same_features(load_references(o.features), detectors, chosen, f"--features={o.features}")
    found = look(dataset, detectors, what, o, **options)
    if distributed.get_rank() == 0:
        save_references(o.features, found)
    return found


OVERLAP = {"images": "samples", "reference": "reference", "training": "training data"}


class Prepared(NamedTuple):
    """What samples are compared with, by identity of the detector."""

    detectors: dict[str, object]
    references: dict[str, FeatureSet]
    training: dict[str, FeatureSet] | None
    sides: tuple[Side, ...]  # of the images of both

    def require(self, samples: Side) -> None:
        """Raises ValueError for samples of another size, colour or numbering of sources."""
        from training import fit

        for side in self.sides:
            fit.check(side, samples)


def compared(**given: object) -> EasyDict:
    """Options of `prepare` and `scores`, those that are not given as the command line has them."""
    from metrics.evaluate import MEASURES

    defaults = dict(
        ref=None, data=None, train=None, metrics=None, weights={}, per_source=True, batch=64, workers=2, seed=0
    )
    defaults |= {"distances": [*MEASURES], "splits": 4, "tags": {}, "blocks": 1, "detector_precision": "fp32"}
    return EasyDict(defaults | given)


def side_of(name: str, dataset: Dataset) -> Side:
    """What is compared of a data set of images."""
    from training import fit

    return fit.of_images(name, dataset.image_shape, dataset.declared_classes, dataset.class_names)


def prepare(o: EasyDict, device: torch.device, samples: Side, images: Dataset | None = None) -> Prepared:
    """Open what calc and gen compare `samples` with; refuses before any long work.

    images: the samples, where they are there already: o.num becomes how many of them are scored, see `number_of`.
    """
    from metrics.evaluate import MEASURES
    from metrics.references import load_references, require_detectors

    if (o.ref is None) == (o.data is None):
        raise ValueError("give either --ref=FILE or --data=ZIP as the reference")
    if unknown := [name for name in o.distances if name not in MEASURES]:
        raise ValueError(f"--distances={','.join(o.distances)}: '{unknown[0]}' {one_of(unknown[0], MEASURES)}")
    references = None if o.ref is None else load_references(o.ref)
    metrics = o.metrics or default_metrics(o, samples, references)
    detectors = open_detectors(metrics, device, o.weights, precision=o.detector_precision)
    if images is not None:
        o.num = number_of(o, detectors, images)
    opened = {option: open_images(o[option], f"--{option}") for option in ("data", "train") if o[option]}
    sides = [side_of(f"--{option}={o[option]}", dataset) for option, dataset in opened.items()]
    if references is not None:
        require_detectors(references, detectors, o.ref)
        sides += [references[key].side(f"--ref={o.ref}") for key in detectors]
    prepared = Prepared(detectors, references, None, tuple(sides))
    prepared.require(samples)
    if references is None:
        prepared = prepared._replace(references=look(opened["data"], detectors, "data", o))
    return prepared._replace(training=look(opened["train"], detectors, "train", o) if o.train else None)


def scores(
    name: str, samples: dict[str, FeatureSet], prepared: Prepared, o: EasyDict, trained: Sequence[int] | None
) -> dict | None:
    """What a score file holds, on rank 0, else None; says where images were seen before. trained: see `compare`."""
    from metrics.evaluate import compare, literature_name
    from metrics.features import class_titles
    from metrics.results import finite
    from torch_utils import distributed

    if distributed.get_rank() != 0:
        return None
    options = {"seed": o.seed, "per_source": o.per_source, "splits": o.splits, "measures": o.distances}
    options["trained"] = trained
    result = {"images": name, "seed": o.seed, "tags": o.tags, "overlap": overlaps(samples, prepared)}
    result |= class_titles(samples, prepared.sides) | {"scores": {}, "metrics": {}}
    for key, detector in prepared.detectors.items():
        reference = prepared.references[key]
        train = prepared.training and prepared.training[key]
        found = compare(samples[key], reference, detector=detector, train=train, **options)
        for warning in found["warnings"]:
            click.echo(f"Warning: {key}: {warning}", err=True)
        if left := found.get("left_out"):
            notice = (
                f"sources {', '.join(left)}, which the reference or the training data lack, are left out of the overall"
            )
            click.echo(f"Warning: {key}: {sum(left.values())} images of {notice} numbers", err=True)
        if (error := getattr(detector, "precision_error", None)) is not None:
            found["precision_error"] = error
            click.echo(f"{key}: features in {detector.precision} are off by {error:.2g} of those in fp32", err=True)
        result["metrics"][key] = found | {"reference": reference.provenance}
        named = {literature_name(key, measure): found["overall"].get(measure) for measure in ("fd", "kid")}
        result["scores"] |= {name: value for name, value in named.items() if value is not None}
    return finite(result, "the result")


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
    dataset = open_images(o.data, "--data")
    metrics = o.metrics or default_metrics(o, side_of("--data", dataset))
    detectors = open_detectors(metrics, device, o.weights, precision=o.detector_precision)
    sets = look_once(dataset, detectors, "ref", o, per_source=o.per_source)
    if distributed.get_rank() != 0:
        return
    save_references(dest, sets, keep_features=not o.no_features)
    first = next(iter(sets.values()))
    counts, content = first.statistics.n.tolist(), first.provenance["content_hash"]
    result = {"dest": dest, "data": o.data, "content_hash": content, "detectors": list(sets)}
    print_json(result | {"num_images": counts[0], "source_counts": counts[1:]})


PUBLISHED_NUM = 50000  # images that the literature's distances are about


def number_of(o: EasyDict, detectors: dict[str, object], dataset: Dataset) -> int | None:
    """How many of the images are scored; None: all. Raises ValueError for more than there are."""
    from metrics.evaluate import PUBLISHED

    published = [key for key in detectors if key.partition(":")[0] in PUBLISHED]
    if o.num is None and not published:
        return None
    num, size = o.num or PUBLISHED_NUM, len(dataset)
    if num > size:
        why = "" if o.num else f" ({published[0]} is published for so many, and falls with more)"
        remedy = f"generate more, or give --num={size} and compare only with scores of {size} images"
        raise ValueError(f"--num={num}{why}: {o.images} holds {size} images; {remedy}")
    return num


def calc(o: EasyDict) -> None:
    """Score a folder or zip of images."""
    dataset = open_images(o.images, "--images")
    prepared = prepare(o, start(o.device), side_of(f"--images={o.images}", dataset), dataset)
    samples = look_once(dataset, prepared.detectors, "images", o, num=o.num, seed=o.seed)
    trained = range(dataset.num_classes)  # whatever made them was asked for these
    finish(scores(o.images, samples, prepared, o, trained), o.dest)


def _labelled(path, option):
    dataset = open_images(path, option)
    if not dataset.has_onehot_labels:
        raise ValueError(f"{option}={path}: images have no labels that are classes; a classifier needs them")
    return dataset


def _fit_classes(o, device):
    """Fit the class order of a published classifier; accuracy on held-out images, as for one that is trained."""
    from metrics.classifier import source_agreement, stratified_split
    from metrics.detectors.classifiers import ImageClassifier, fit_class_order, save_order

    ((identity, judge),) = open_detectors(o.of, device, o.weights, "--of").items()
    if not isinstance(judge, ImageClassifier):
        raise ValueError(f"--of={o.of}: is no published classifier; give swin_l or hf:FOLDER")
    parts = []
    for option in ("data", "holdout") if o.holdout else ("data",):
        dataset = _labelled(o[option], f"--{option}")
        found = look(dataset, {identity: judge}, option, EasyDict(batch=64, workers=0), per_source=False)[identity]
        if found.features is None:
            raise ValueError(f"--{option}={o[option]}: too many images to fit {judge.width} classes to; give a part")
        parts.append((found.features, found.labels, dataset.label_dim))
    (features, labels, num_labels), (held, truth, _) = parts[0], parts[-1]
    if not o.holdout:
        kept, rest = stratified_split(labels, 0.2, o.seed)
        held, truth, features, labels = features[rest], labels[rest], features[kept], labels[kept]
    judge.order = fit_class_order(features.argmax(1), labels, judge.width, num_labels)
    scores = source_agreement(judge.classify(held).numpy(), truth)
    report = {"accuracy": scores.pop("overall"), "source_accuracy": {str(k): v for k, v in scores.items()}}
    report |= {"num_train": len(labels), "num_holdout": len(truth)}
    save_order(o.dest, f"{o.of}:{o.weights[o.of]}" if o.of in o.weights else o.of, judge, **report)
    print_json({"dest": o.dest, "data": o.data, "detector": judge.identity} | report)


def detector(o: EasyDict) -> None:
    """Train a small classifier, or fit the class order of a published one."""
    import tqdm

    from metrics.classifier import train_classifier
    from training.dataset import load_raw

    device = start(o.device, alone="the detector is trained")
    if o.of is not None:
        _fit_classes(o, device)
        return
    data = _labelled(o.data, "--data")
    images, labels, num_classes = *load_raw(data), data.label_dim
    held = load_raw(_labelled(o.holdout, "--holdout")) if o.holdout else None
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
    levels = {k: {f"loss_sigma{s}": x for s, x in of.items()} for k, of in found.pop("source_levels", {}).items()}
    found["sources"] = {str(k): {"denoising_loss": v} | levels[k] for k, v in found.get("sources", {}).items()}
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
    of_method = {"ode": ("probe", "hutch_probes", "rtol", "atol")}.get(o.method, ("num_samples",))
    names = ("num", "seed", "batch", "per_source", "prior", "t_min", "sigma_min", "sigma_max", *of_method)
    options = {name: o[name] for name in names if o[name] is not None}
    with progress_bar(min(o.num or len(dataset), len(dataset)), "likelihood") as progress:
        result = bits_per_dim(snapshot.net, dataset, process, encoder, o.method, progress=progress, **options)
    about = {"net": o.net, "data": o.data, "seed": o.seed, "tags": o.tags, "method": o.method}
    about |= {"process": named(process), "encoder": repr(encoder)}
    finish(about | {"metrics": {"likelihood": result}}, o.dest)


def report(o: EasyDict) -> None:
    """Put score files together: two arms; with --against any number of arms; with --contrasts what is declared."""
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
