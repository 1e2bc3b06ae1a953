"""The bodies behind calculate_metrics.py: open the inputs, refuse early, measure, write the JSON.

Options arrive under their names on the command line. Heavy imports happen inside, so that a command's help costs nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from metrics import results

if TYPE_CHECKING:
    import torch

    from metrics.features import FeatureSet
    from training.dataset import ImageFolderDataset


def start(device: str | None, alone: str | None = None) -> torch.device:
    """Join the process group, if there is one, until the command ends; returns the device.

    alone: what happens in one process only, for the message of the ValueError where there are several.
    """
    import torch

    from torch_utils import distributed

    if device is not None:
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f"--device={device}: no such device; use cpu or cuda") from None
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device={device}: no GPU is available; use --device=cpu")
    click.get_current_context().call_on_close(distributed.shutdown)
    found = distributed.init(device)
    if alone is not None and distributed.get_world_size() > 1:
        raise ValueError(f"{alone} by one process: run it without torchrun")
    return found


def open_images(path: str, option: str) -> ImageFolderDataset:
    """The data set at `path`; a ValueError names the option."""
    from training.dataset import ImageFolderDataset

    try:
        return ImageFolderDataset(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from None


def open_detectors(metrics: str, device: torch.device) -> dict[str, object]:
    """{identity: detector} of the comma-separated specs `metrics`; a ValueError names the option."""
    from metrics.detectors import get_detectors

    try:
        return get_detectors(metrics, device)
    except ValueError as error:
        raise ValueError(f"--metrics={metrics}: {error}") from None


def check_writable(path: str | None) -> None:
    """Fail before the work, not after it."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--dest={path}: {error.strerror}; give a file in a writable folder") from None
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(f"--dest={path}: cannot write there; give a file in a writable folder")


def parse_tags(tags: Sequence[str]) -> dict[str, str]:
    """{name: value} from NAME=VALUE words."""
    pairs = [tag.partition("=") for tag in tags]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ValueError(f"--tag={name}: give NAME=VALUE")
    return {name: value for name, _, value in pairs}


def print_json(result: dict) -> None:
    """Strict JSON on stdout, from rank 0."""
    from torch_utils import distributed

    distributed.print0(json.dumps(result, indent=2, allow_nan=False))


def finish(result: dict, dest: str | None) -> None:
    """Print the JSON, and write it to `dest` where one is given."""
    print_json(result)
    if dest is not None:
        results.write_scores(dest, result)


class Prepared(NamedTuple):
    """What samples are compared with, by identity of the detector."""

    detectors: dict[str, object]
    references: dict[str, FeatureSet]
    training: dict[str, FeatureSet] | None
    device: torch.device


def prepare(
    *,
    metrics: str,
    ref: str | None,
    data: str | None,
    train: str | None,
    batch: int,
    distances: str,
    workers: int,
    device: str | None,
    dest: str | None,
    tags: Sequence[str],
    **rest: object,
) -> Prepared:
    """Open everything; refuses before any long work."""
    from metrics.evaluate import check_measures
    from metrics.features import collect_dataset, progress_bar
    from metrics.references import load_references, require_detectors

    if (ref is None) == (data is None):
        raise ValueError("give either --ref=FILE or --data=ZIP as the reference")
    try:
        check_measures(distances.split(","))
    except ValueError as error:
        raise ValueError(f"--distances={distances}: {error}") from None
    parse_tags(tags)
    check_writable(dest)
    device = start(device)
    detectors = open_detectors(metrics, device)

    def collect(path, option):
        dataset = open_images(path, option)
        with progress_bar(len(dataset), option.strip("-")) as progress:
            return collect_dataset(dataset, detectors, batch_size=batch, workers=workers, progress=progress)

    references = collect(data, "--data") if ref is None else require_detectors(load_references(ref), detectors, ref)
    return Prepared(detectors, references, collect(train, "--train") if train else None, device)


def score(
    name: str,
    samples: dict[str, FeatureSet],
    prepared: Prepared,
    *,
    seed: int,
    per_source: bool,
    distances: str,
    splits: int,
    dest: str | None,
    tags: Sequence[str],
    **rest: object,
) -> None:
    """Compare on rank 0, print the JSON and write it to `dest`."""
    from metrics.evaluate import compare
    from torch_utils import distributed

    if distributed.get_rank() != 0:
        return
    options = {"seed": seed, "per_source": per_source, "splits": splits, "measures": distances.split(",")}
    result = {"images": name, "seed": seed, "tags": parse_tags(tags), "metrics": {}}
    for key, detector in prepared.detectors.items():
        seen, reference = samples[key].statistics, prepared.references[key]
        if seen.count() <= seen.width:
            notice = "covariances are singular, read distances beside their floor"
            click.echo(f"{key}: {seen.count()} images, {seen.width} features: {notice}", err=True)
        train = prepared.training and prepared.training[key]
        scores = compare(samples[key], reference, detector=detector, train=train, **options)
        result["metrics"][key] = scores | {"reference": reference.provenance}
    finish(result, dest)


def ref(data: str, dest: str, features: bool, metrics: str, device: str | None, **options: object) -> None:
    """Reference statistics of a data set into an npz file."""
    from metrics.features import collect_dataset, dataset_hash, progress_bar
    from metrics.references import save_references
    from torch_utils import distributed

    device = start(device)
    root, suffix = os.path.splitext(dest)
    if suffix != ".npz":
        dest = (root if suffix == ".pkl" else dest) + ".npz"
        click.echo(f"Statistics are stored as npz: writing {dest}", err=True)
    check_writable(dest)
    detectors, dataset = open_detectors(metrics, device), open_images(data, "--data")
    options["batch_size"] = options.pop("batch")
    with progress_bar(len(dataset), "ref") as progress:
        sets = collect_dataset(dataset, detectors, progress=progress, **options)
    content = dataset_hash(dataset)
    for feature_set in sets.values():
        feature_set.provenance["content_hash"] = content
    if distributed.get_rank() == 0:
        save_references(dest, sets, **({} if features else {"feature_limit": 0}))
    counts = next(iter(sets.values())).statistics.n.tolist()
    result = {"dest": dest, "data": data, "content_hash": content, "detectors": list(sets)}
    print_json(result | {"num_images": counts[0], "source_counts": counts[1:]})


def calc(images: str, num: int | None, **options: object) -> None:
    """Score a folder or zip of images."""
    from metrics.features import collect_dataset, progress_bar

    dataset = open_images(images, "--images")
    if num is not None and num > len(dataset):
        raise ValueError(f"--num={num}: {images} holds {len(dataset)} images; generate more or lower --num")
    prepared = prepare(**options)
    extract = {"batch_size": options["batch"], "workers": options["workers"], "seed": options["seed"]}
    with progress_bar(num or len(dataset), "images") as progress:
        samples = collect_dataset(dataset, prepared.detectors, num=num, progress=progress, **extract)
    score(images, samples, prepared, **options)


def gen(
    net: str,
    num: int,
    sources: Sequence[int] | None,
    steps: int,
    gnet: str | None,
    guidance: float,
    **options: object,
) -> None:
    """Generate images from a snapshot and score them."""
    from metrics.features import collect, generated_batches, progress_bar
    from training.generation import generate_images

    for option, path in (("--net", net), ("--gnet", gnet)):
        if path is not None and "://" not in path and not os.path.exists(path):
            raise ValueError(f"{option}={path}: no such file; give a snapshot")
    if (guidance == 1) != (gnet is None):
        raise ValueError(f"--guidance={guidance:g} and --gnet go together: give both or none")
    sampler = {"num_steps": steps} | ({} if gnet is None else {"gnet": gnet, "guidance": guidance})
    class_idx = options.pop("class")
    if sources and class_idx != "balanced":
        raise ValueError(f"--sources={','.join(map(str, sources))} needs --class=balanced")
    prepared = prepare(**options)
    seeds = range(options["seed"], options["seed"] + num)
    sampler |= {"class_idx": class_idx, "sources": sources, "max_batch_size": options["batch"]}
    batches = generated_batches(generate_images(net, seeds, device=prepared.device, **sampler))
    num_sources = max(reference.num_sources for reference in prepared.references.values())
    with progress_bar(num, "gen") as progress:
        samples = collect(batches, prepared.detectors, num_sources=num_sources, num_images=num, progress=progress)
    score(net, samples, prepared, **options)


def detector(data: str, holdout: str | None, dest: str, epochs: int, seed: int, device: str | None) -> None:
    """Train a small classifier."""
    import tqdm

    from metrics.classifier import train_classifier
    from metrics.features import load_labelled

    device = start(device, alone="the detector is trained")
    check_writable(dest)
    images, labels, num_classes = load_labelled(open_images(data, "--data"))
    held = load_labelled(open_images(holdout, "--holdout"))[:2] if holdout else None
    options = {"num_classes": num_classes, "epochs": epochs, "seed": seed, "device": device}
    options["progress"] = lambda epochs: tqdm.tqdm(epochs, desc="detector", unit="epoch", file=sys.stderr)
    judge = train_classifier(images, labels, holdout=held, **options)
    judge.save(dest)
    report = {name: judge.header[name] for name in ("accuracy", "source_accuracy", "num_train", "num_holdout")}
    print_json({"dest": dest, "data": data, "detector": judge.identity} | report)


def loss(
    net: str,
    data: str,
    sources: Sequence[int] | None,
    num: int,
    seed: int,
    device: str | None,
    dest: str | None,
    tags: Sequence[str],
) -> None:
    """Denoising loss on held-out images."""
    from torch_utils.persistence import load_snapshot
    from training.validation import HeldOut

    check_writable(dest)
    tags = parse_tags(tags)
    snapshot = load_snapshot(net, start(device, alone="the denoising loss is computed"))
    dataset = open_images(data, "--data")
    if sources is not None:
        dataset = dataset.subset([i for source in sources for i in dataset.indices_of(source)])
    result = HeldOut(dataset, seed, num).denoising_loss(snapshot.net, snapshot.encoder)
    by_source = {str(k): {"denoising_loss": v} for k, v in result.pop("sources", {}).items()}
    finish({"net": net, "seed": seed, "tags": tags, "metrics": {"denoising": {**result, "sources": by_source}}}, dest)


def likelihood(
    net: str,
    data: str,
    process: str | None,
    process_options: str | dict | None,
    encoder: str | None,
    method: str,
    num: int | None,
    seed: int,
    device: str | None,
    dest: str | None,
    tags: Sequence[str],
    **options: object,
) -> None:
    """Bits per dimension under any process. options: of `metrics.evaluate.bits_per_dim`; None: not given."""
    from metrics.evaluate import bits_per_dim, choose_encoder
    from metrics.features import progress_bar
    from torch_utils.persistence import load_snapshot
    from training.processes.options import make_process, named, require_gaussian

    check_writable(dest)
    tags = parse_tags(tags)
    snapshot = load_snapshot(net, start(device, alone="likelihoods are computed"))
    chosen = make_process(process or "edm", process_options, trained=snapshot.process)
    require_gaussian(snapshot.process, chosen)
    transform = choose_encoder(encoder, snapshot.encoder)
    samples = options.pop("samples")
    solver = {name: options.pop(name) for name in ("probe", "hutch_probes", "rtol", "atol")}
    options |= {"num_samples": samples} if method == "elbo" else solver
    options = {name: value for name, value in options.items() if value is not None}
    dataset = open_images(data, "--data")
    with progress_bar(min(num or len(dataset), len(dataset)), "likelihood") as progress:
        options |= {"num": num, "seed": seed, "progress": progress}
        result = bits_per_dim(snapshot.net, dataset, chosen, transform, method, **options)
    about = {"net": net, "data": data, "seed": seed, "tags": tags, "method": method}
    about |= {"process": named(chosen), "encoder": repr(transform)}
    finish(about | {"metrics": {"likelihood": result}}, dest)


def report(
    scores: str,
    dest: str,
    arms: Sequence[str] | None,
    metric: str | None,
    against: str | None,
    section: str,
    **options: object,
) -> None:
    """Put score files together: two arms or a grid of them, or with `against` any number of arms."""
    if against is not None:
        from metrics.report_arms import write_arms_report

        files = write_arms_report(scores, dest, against, arms, section, metric)
        print_json({"files": [str(file) for file in files]})
        return
    from metrics.report import write_report

    arms = arms or ["multi", "single"]
    if len(arms) != 2:
        raise ValueError(f"--arms={','.join(arms)}: give two names, such as multi,single")
    print(write_report(scores, dest, arms, metric=metric, **options))


def best(scores: str, distance: str, detector: str | None, top: int) -> None:
    """The best of many checkpoints."""
    print_json(results.best_of(results.read_scores(scores, ["checkpoint"]), distance, detector, top))
