"""What the commands of calculate_metrics.py share: opening inputs, refusing early, scoring, writing the JSON.

Heavy imports happen inside, so that a command's help costs nothing.
"""

import json
import os

import click

from dnnlib import atomic_write


def start(device):
    """Join the process group, if there is one, until the command ends; returns the device. ValueError for unknown ones."""
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
    return distributed.init(device)


def open_images(path, option):
    """The data set at `path`; a ValueError names the option."""
    from training.dataset import ImageFolderDataset

    try:
        return ImageFolderDataset(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from None


def open_detectors(metrics, device):
    """{identity: detector} of the comma-separated specs `metrics`; a ValueError names the option."""
    from metrics.detectors import get_detectors

    try:
        return get_detectors(metrics, device)
    except ValueError as error:
        raise ValueError(f"--metrics={metrics}: {error}") from None


def check_writable(path):
    """Fail before the work, not after it."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--dest={path}: {error.strerror}; give a file in a writable folder") from None
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(f"--dest={path}: cannot write there; give a file in a writable folder")


def print_json(result):
    """Strict JSON on stdout, from rank 0."""
    from torch_utils import distributed

    distributed.print0(json.dumps(result, indent=2, allow_nan=False))


def prepare(metrics, ref, data, train, batch, distances, workers, device, dest, tags, **rest):
    """(detectors, {identity: reference}, {identity: training images} or None, device); refuses before any long work."""
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
    if dest is not None:
        check_writable(dest)
    device = start(device)
    detectors = open_detectors(metrics, device)

    def collect(path, option):
        dataset = open_images(path, option)
        with progress_bar(len(dataset), option.strip("-")) as progress:
            return collect_dataset(dataset, detectors, batch_size=batch, workers=workers, progress=progress)

    references = collect(data, "--data") if ref is None else require_detectors(load_references(ref), detectors, ref)
    return detectors, references, collect(train, "--train") if train else None, device


def score(name, samples, prepared, seed, per_source, distances, splits, dest, tags, **rest):
    """Compare on rank 0, print the JSON and write it to `dest`."""
    from metrics.evaluate import compare
    from torch_utils import distributed

    detectors, references, training, _ = prepared
    if distributed.get_rank() != 0:
        return
    options = {"seed": seed, "per_source": per_source, "splits": splits}
    options["measures"] = distances.split(",")
    result = {"images": name, "seed": seed, "tags": parse_tags(tags), "metrics": {}}
    for key, detector in detectors.items():
        seen = samples[key].statistics
        if seen.count() <= seen.width:
            notice = "covariances are singular, read distances beside their floor"
            click.echo(f"{key}: {seen.count()} images, {seen.width} features: {notice}", err=True)
        scores = compare(samples[key], references[key], detector=detector, train=training and training[key], **options)
        result["metrics"][key] = scores | {"reference": references[key].provenance}
    finish(result, dest)


def finish(result, dest):
    """Print the JSON, and write it to `dest` where one is given."""
    print_json(result)
    if dest is not None:
        with atomic_write(dest, "w") as file:
            json.dump(result, file, indent=2, allow_nan=False)


def parse_tags(tags):
    """{name: value} from NAME=VALUE words."""
    pairs = [tag.partition("=") for tag in tags]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ValueError(f"--tag={name}: give NAME=VALUE")
    return {name: value for name, _, value in pairs}
