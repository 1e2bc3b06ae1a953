"""Images from a network: seeds in, batches of uint8 pixels out, and files with their labels beside them."""

import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dnnlib import EasyDict
from dnnlib.reading import MOST_BYTES, require_file
from torch_utils import distributed as dist
from torch_utils import persistence
from torch_utils.precision import precise
from torch_utils.precision import use as use_precision
from torch_utils.random import StackedRandomGenerator
from training import ablation, choices, fit, processes, samplers
from training.dataset import ImageFolderDataset, label_rows
from training.dataset.labels import check_labels, parse_meta
from training.encoders import StandardRGBEncoder, use_vae
from training.guidance import NullLabels, guided
from training.images import save_grid
from training.processes.options import make_process, require_gaussian
from training.quantize import quantize_weights
from training.sample_folder import SampleFolder, distinct, provenance
from training.sampling import Sampling

GRID_COLUMNS = 16
NULL_GUIDES = {"null": "zero", "null-last": "last"}  # --gnet for classifier-free guidance: which label means none


def generate_images(
    net: Any,  # denoiser, snapshot, or path of one
    seeds: Sequence[int] = range(16, 24),  # one image each
    outdir: str | Path | None = None,  # write images and dataset.json here; None: yield only
    gnet: Any = None,  # likewise, for guidance; None: none
    encoder: Any = None,  # None: the snapshot's own, else pixels
    kernel: Any = None,  # noise of the prior; None: what the snapshot was trained with, else Gaussian
    class_idx: Any = None,  # class id, "balanced", label vectors [M, K] to draw from, or None: uniform per seed
    sources: Sequence[int] | None = None,  # ids that these two choose from; None: those of the training data
    subdirs: bool = False,  # a folder for every 1000 seeds
    max_batch_size: int = 32,
    process: Any = None,  # EDM or a linear process to sample through; None: heun in noise levels, as EDM2
    device: str | torch.device = "cpu",
    **sampling: Any,  # see below
) -> Iterator[EasyDict]:
    """Iterator of batches with images uint8 [N, C, H, W], labels [N, K] or None, class_ids, noise, seeds, batch_idx.

    Labels are one-hot, with their class_ids, or drawn from label vectors: those given, or in the snapshot of a network that
    was trained on such.

    sampling: `sampler`, without process a callable like samplers.heun, with one a solver of training/samplers.py; its
    options num_steps, sigma_min, sigma_max, rho, S_churn, grid, t_min, denoise, ...; `guidance` and `guidance_interval`;
    `prior` of the process, "matched" to the data at that time or "stationary"; and `compiled`: by torch.compile.

    Every process of a group gets the same number of batches, some possibly empty (images None). Noise, labels and the
    sampler's draws of a seed do not depend on batch size or process count. With `outdir`, files named by seed
    (SSSSSS.png) are written as in EDM2, and dataset.json with the labels at the end. With a process, noise is the state
    [N, V, C, H, W] that its solver starts from. Raises ValueError for classes out of range, a guide that does not fit, a
    process for a network that was not trained with Gaussian noise, seeds that mean the same image, and an `outdir` with
    images made otherwise (see sample_folder).
    """
    snapshot = _open(net, device)
    snapshot = replace(snapshot, encoder=encoder or snapshot.encoder, process=kernel or snapshot.process)
    net, encoder, kernel = snapshot.net, snapshot.encoder or StandardRGBEncoder(), snapshot.kernel
    if gnet is not None:
        guide = _open(gnet, device)
        fit.check(fit.of_snapshot("--net", snapshot), fit.of_snapshot("--gnet", guide))
        gnet = guide.net
    encoder.init(torch.device(device))
    start, run = _way_back(net, gnet, kernel, process, device, **sampling)
    vectors = _vectors(class_idx, snapshot, device)
    sources = _sources(net.label_dim, class_idx, sources, snapshot.sources) if vectors is None else None
    seeds, folder = distinct(seeds), None
    if outdir is not None:
        how = dict(
            encoder=encoder,
            vae=getattr(encoder, "given", None),
            noise=processes.noise_law(kernel),
            process=process,
            **sampling,
        )
        if vectors is not None:
            classes = "vectors " + hashlib.sha256(vectors.cpu().numpy().tobytes()).hexdigest()
        else:
            classes = [class_idx, sources] if isinstance(class_idx, (str, type(None))) else class_idx
        folder = SampleFolder(outdir, provenance(net, gnet, **how), classes, seeds, subdirs)

    def batches():
        for index, chosen in enumerate(dist.split_batches(seeds, max_batch_size)):
            batch = EasyDict(images=None, labels=None, class_ids=None, noise=None, seeds=chosen, batch_idx=index)
            if chosen:
                generator = StackedRandomGenerator(device, chosen)
                size = [len(chosen), net.img_channels, net.img_resolution, net.img_resolution]
                batch.noise = start(size, generator)
                if vectors is not None:
                    batch.labels = vectors[generator.randint(len(vectors), size=[len(chosen)], device=device)]
                elif net.label_dim:
                    batch.class_ids = _class_ids(chosen, class_idx, sources, generator, device)
                    batch.labels = label_rows(batch.class_ids, net.label_dim)
                with torch.no_grad():
                    latents = run(batch.noise, batch.labels, randn_like=generator.randn_like)
                    batch.images = encoder.decode(_finite(latents, chosen))
                if folder is not None:
                    folder.write(batch)
            yield batch
        if folder is not None:
            folder.finish(net.label_dim, fit.class_names_of(snapshot))

    return batches()


def _finite(latents, seeds):
    """The latents themselves. ValueError where they are not finite: as pixels they would look like any other image."""
    if bool(latents.isfinite().all()):
        return latents
    bad = [seed for seed, image in zip(seeds, latents, strict=True) if not bool(image.isfinite().all())]
    raise ValueError(
        f"the images of {len(bad)} of {len(seeds)} seeds, the first {bad[0]}, hold NaN or infinity: the network diverged "
        f"(take an earlier snapshot), or guidance and solver drive it beyond what it knows"
    )


def _way_back(
    net, gnet, kernel, process, device, sampler=None, prior="matched", guidance=1.0, guidance_interval=None,
    precision=None, compiled=False, **options,
):  # fmt: skip
    """(size, generator -> noise; noise, labels, randn_like -> latents): all that is found once for all batches."""
    if precision is not None:
        use_precision(precision, device)
        net = precise(net, precision)
        if isinstance(gnet, NullLabels):
            gnet = NullLabels(net, gnet.null)
        elif gnet is not None:
            gnet = precise(gnet, precision)
    with torch.no_grad():  # no gradients of parameters are asked for
        net = guided(net, gnet, guidance, guidance_interval, process, compiled)
    if process is None:
        sampler = sampler or samplers.heun
        options = _known_levels(net, sampler, options)
        if options.get("S_churn") and processes.aug_dim(kernel) != math.inf:
            warnings.warn("churn adds Gaussian noise, which is not derived for finite D of PFGM++", stacklevel=3)
        unit_noise = (kernel or processes.GaussianKernel()).unit_noise
        return lambda *draw: unit_noise(*draw).to(device), functools.partial(sampler, net, **options)
    require_gaussian(kernel, process)
    options = _known_levels(net, samplers.heun, options)
    sampler = sampler or samplers.SOLVERS["heun"]
    if isinstance(sampler, samplers.Solver):
        run = sampler.plan(net, process, **options)
        run.dtype = run.dtype or run.net_dtype
        times = run.times
    else:
        run = functools.partial(sampler, net, process, **options)
        ends = {name: options[name] for name in samplers.ENDPOINT_OPTIONS if name in options}
        times = options.get("times", samplers.endpoints(net, process, **ends))
    return functools.partial(samplers.start_state, net, process, prior=prior, device=device, times=times), run


def _known_levels(net, sampler: Callable, options):
    """The options with noise levels narrowed to what the network was made for, as in EDM's sampler."""
    known, options = inspect.signature(sampler).parameters, dict(options)
    for name, narrow in (("sigma_min", max), ("sigma_max", min)):
        if name in known:
            options[name] = narrow(options.get(name, known[name].default), getattr(net, name))
    return options


def _sources(label_dim, class_idx, sources, trained):
    """The ids to draw from: those given, else those trained, else all; a word about classes without training images."""
    if class_idx is not None and label_dim == 0:
        warnings.warn(f"--class={class_idx} has no effect: the network is unconditional", stacklevel=3)
        return []
    asked = sources or [] if class_idx in ("balanced", None) else [class_idx]
    if unknown := [k for k in asked if not 0 <= k < label_dim]:
        raise ValueError(f"class {unknown[0]} is out of range: the network knows classes 0 to {label_dim - 1}")
    if untrained := sorted({*asked} - {*(trained or asked)}):
        what = f"class {untrained[0]} had" if len(untrained) == 1 else f"classes {', '.join(map(str, untrained))} had"
        known = ",".join(map(str, trained))
        warnings.warn(f"--class: {what} no training images, the network was trained on {known}", stacklevel=3)
    return [*(sources or trained or range(label_dim))]


def _class_ids(seeds, class_idx, sources, generator, device):
    """Class ids int64 [N]. The uniform draw always happens, so that later draws do not depend on the choice."""
    known = torch.as_tensor(sources, device=device)
    ids = known[generator.randint(len(known), size=[len(seeds)], device=device)]
    if class_idx == "balanced":
        return known[torch.as_tensor(seeds, device=device, dtype=torch.int64) % len(known)]
    return ids if class_idx is None else torch.full_like(ids, class_idx)


def label_vectors(path: str, label_dim: int) -> torch.Tensor:
    """The label vectors float32 [M, K] of a data set, or of its dataset.json alone. Raises ValueError (--labels)."""
    if Path(path).suffix == ".json":
        labels = parse_meta(require_file(path, MOST_BYTES).read_bytes(), path)["labels"] or {}
        vectors = check_labels([*labels.values()], len(labels), where=path, names=[*labels])
    else:
        vectors = ImageFolderDataset(path).raw_labels
    if vectors.ndim != 2 or vectors.shape[1] != label_dim or not len(vectors):
        found = f"{vectors.shape[1]} numbers per image" if vectors.ndim == 2 else "class indices"
        raise ValueError(f"--labels={path}: holds {found}, but the network takes label vectors of length {label_dim}")
    return torch.from_numpy(vectors)


def _vectors(class_idx, snapshot, device):
    """The label vectors to draw from: those given, else those in the snapshot; None where labels are classes."""
    label_dim, known = snapshot.net.label_dim, (snapshot.header.get("dataset") or {}).get("label_vectors")
    if torch.is_tensor(class_idx):
        vectors = class_idx
    elif known is None:
        return None
    elif class_idx is not None:
        raise ValueError(f"--class={class_idx}: the network was trained on label vectors, not classes: leave it out")
    else:
        vectors = torch.from_numpy(check_labels(known, len(known), where=f"{snapshot.path}: label_vectors"))
        text = f"labels are drawn from {len(known)} label vectors of the training data; give --labels=DATA for others"
        warnings.warn(text, stacklevel=3)
    if vectors.ndim != 2 or vectors.shape[1] != label_dim or not len(vectors):
        raise ValueError(f"label vectors {list(vectors.shape)} do not fit a network with label_dim={label_dim}")
    return vectors.to(device)


def _open(net, device):
    """The Snapshot that `net` is or names; of a denoiser one of which nothing else is known."""
    if isinstance(net, (str, Path)):
        return persistence.load_snapshot(net, device)
    return net if isinstance(net, persistence.Snapshot) else persistence.Snapshot(net)


def batches(
    given: Sampling, seeds: Sequence[int], device: str | torch.device = "cpu", net: Any = None, **output: Any
) -> Iterator[EasyDict]:
    """The batches of `generate_images` that a command's options mean; net: the open --net; output: its outdir and subdirs.

    Opens the snapshots, rounds their weights, makes guide and process. Raises ValueError for what does not fit together.
    """
    sampler = choices.choose(samplers.SOLVERS, "solver", given.solver or "heun")
    net, gnet = _open(net or given.net, device), given.gnet
    use_vae(net.encoder, given.vae)
    trained = processes.aug_dim(net.kernel)
    if given.aug_dim not in (None, trained):
        raise ValueError(
            f"--aug-dim={given.aug_dim:g} contradicts the snapshot, trained with D={trained:g}: leave it out"
        )
    rounded = lambda snapshot: replace(
        snapshot, net=quantize_weights(snapshot.net, given.quantize_bits, given.quantize_policy)
    )
    net = rounded(net)
    if gnet in NULL_GUIDES:
        gnet = NullLabels(net.net, NULL_GUIDES[gnet])
    elif gnet is not None:
        gnet = rounded(_open(gnet, device))
    if given.plain:
        process = None
        sampler = ablation.ablation if given.solver == "ablation" else samplers.noisy_heun(given.inject_noise)
    elif given.process in (None, "edm") and not given.process_options:
        process = processes.EDM(sigma_max=given.sigma_max)
    else:
        process = make_process(given.process or "edm", given.process_options, trained=net.process)
    same = ("class_idx", "sources", "max_batch_size", "guidance", "guidance_interval", "prior")
    options = {name: getattr(given, name) for name in same} | given.solver_options() | output
    options |= dict(gnet=gnet, process=process, sampler=sampler) | choices.given(precision=given.precision)
    options |= {"compiled": True} if given.compile else {}
    if given.labels is not None:
        options["class_idx"] = label_vectors(given.labels, net.net.label_dim)
    return generate_images(net, seeds, device=device, **options)


def run(given: Sampling, seeds: Sequence[int], outdir: str, subdirs: bool, grid: bool, device: str | None) -> None:
    """What generate_images.py does: generate, write images, labels and the grid."""
    device, seeds = dist.init(device), distinct(seeds)
    net = _open(given.net, device)
    made = batches(given, seeds, device, net, outdir=outdir, subdirs=subdirs)
    dist.print0(f"Generating {len(seeds)} images to {outdir} ...")
    shown = {}
    total = sum(map(len, dist.split_batches(seeds, given.max_batch_size)))
    with tqdm(total=total, unit="img", disable=dist.get_rank() != 0) as bar:
        for batch in made:
            bar.update(len(batch.seeds))
            ids = [None] * len(batch.seeds) if batch.class_ids is None else batch.class_ids.tolist()
            for i, k in enumerate(ids):
                row = shown.setdefault(k, [])
                if grid and len(row) < GRID_COLUMNS:
                    row.append(batch.images[i].cpu())
    if grid and dist.get_rank() == 0:
        keys = sorted(shown, key=lambda k: -1 if k is None else k)
        titles = None if keys == [None] else [fit.title(k, fit.class_names_of(net)) for k in keys]
        # Beside the folder, not in it: the folder is a data set.
        save_grid(f"{str(outdir).rstrip('/')}-grid.png", [shown[k] for k in keys], titles)
    dist.shutdown()
