"""Images from a network: seeds in, batches of uint8 pixels out, and files with their labels beside them."""

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dnnlib import EasyDict, atomic_write
from torch_utils import distributed as dist
from torch_utils import persistence
from torch_utils.random import StackedRandomGenerator
from training import choices, processes, samplers
from training.encoders import StandardRGBEncoder, use_vae
from training.guidance import NullLabels, guided
from training.images import png_bytes, save_grid
from training.processes.options import make_process, require_gaussian
from training.quantize import quantize_weights
from training.sampling import Sampling

GRID_COLUMNS = 16
NULL_GUIDES = {"null": "zero", "null-last": "last"}  # --gnet for classifier-free guidance: which label means none


def generate_images(
    net: Any,  # denoiser, or path of a snapshot
    seeds: Sequence[int] = range(16, 24),  # one image each
    outdir: str | Path | None = None,  # write images and dataset.json here; None: yield only
    gnet: Any = None,  # guiding denoiser or path; None: no guidance
    encoder: Any = None,  # None: the snapshot's own, else pixels
    kernel: Any = None,  # noise of the prior; None: what the snapshot was trained with, else Gaussian
    class_idx: int | str | None = None,  # class id, "balanced", or None: uniform per seed
    sources: Sequence[int] | None = None,  # ids that "balanced" cycles through; None: all
    subdirs: bool = False,  # a folder for every 1000 seeds
    max_batch_size: int = 32,
    process: Any = None,  # EDM or a linear process to sample through; None: heun in noise levels, as EDM2
    device: str | torch.device = "cpu",
    **sampling: Any,  # see below
) -> Iterator[EasyDict]:
    """Iterator of batches with images uint8 [N, C, H, W], labels [N, K] one-hot or None, class_ids, noise, seeds, batch_idx.

    sampling: `sampler`, without process a callable like samplers.heun, with one a solver of training/samplers.py; its
    options num_steps, sigma_min, sigma_max, rho, S_churn, grid, t_min, denoise, ...; `guidance` and `guidance_interval`;
    and `prior` of the process, "matched" to the data at that time or "stationary".

    Every process of a group gets the same number of batches, some possibly empty (images None). Noise, labels and the
    sampler's draws of a seed do not depend on batch size or process count. With `outdir`, files named by seed
    (SSSSSS.png) are written as in EDM2, and dataset.json with the labels at the end. With a process, noise is the state
    [N, V, C, H, W] that its solver starts from. Raises ValueError for classes out of range, a guide that does not fit, or
    a process for a network that was not trained with Gaussian noise.
    """
    net, encoder, kernel = _open(net, device, encoder, kernel)
    gnet = None if gnet is None else _open(gnet, device)[0]
    encoder = StandardRGBEncoder() if encoder is None else encoder
    encoder.init(torch.device(device))
    start, run = _way_back(net, gnet, kernel, process, device, **sampling)
    _check_classes(net.label_dim, class_idx, sources)

    def batches():
        records = []
        for index, chosen in enumerate(dist.split_batches(seeds, max_batch_size)):
            batch = EasyDict(images=None, labels=None, class_ids=None, noise=None, seeds=chosen, batch_idx=index)
            if chosen:
                generator = StackedRandomGenerator(device, chosen)
                size = [len(chosen), net.img_channels, net.img_resolution, net.img_resolution]
                batch.noise = start(size, generator)
                if net.label_dim:
                    batch.class_ids = _class_ids(net.label_dim, chosen, class_idx, sources, generator, device)
                    batch.labels = torch.eye(net.label_dim, device=device)[batch.class_ids]
                with torch.no_grad():
                    latents = run(batch.noise, batch.labels, randn_like=generator.randn_like)
                    batch.images = encoder.decode(_finite(latents, chosen))
                if outdir is not None:
                    records.extend(_write(Path(outdir), batch, subdirs))
            yield batch
        if outdir is not None:
            _write_labels(Path(outdir), records, net.label_dim)

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
    net, gnet, kernel, process, device, sampler=None, prior="matched", guidance=1.0, guidance_interval=None, **options
):
    """(size, generator -> noise; noise, labels, randn_like -> latents): all that is found once for all batches."""
    net = guided(net, gnet, guidance, guidance_interval, process)
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


def _check_classes(label_dim, class_idx, sources):
    if class_idx is not None and label_dim == 0:
        warnings.warn(f"--class={class_idx} has no effect: the network is unconditional", stacklevel=3)
        return
    asked = sources or [] if class_idx == "balanced" else [] if class_idx is None else [class_idx]
    unknown = [k for k in asked if not 0 <= k < label_dim]
    if unknown:
        raise ValueError(f"class {unknown[0]} is out of range: the network knows classes 0 to {label_dim - 1}")


def _class_ids(label_dim, seeds, class_idx, sources, generator, device):
    """Class ids int64 [N]. The uniform draw always happens, so that later draws do not depend on the choice."""
    ids = generator.randint(label_dim, size=[len(seeds)], device=device)
    if class_idx == "balanced":
        cycle = torch.as_tensor(sources or range(label_dim), device=device)
        return cycle[torch.as_tensor(seeds, device=device, dtype=torch.int64) % len(cycle)]
    return ids if class_idx is None else torch.full_like(ids, class_idx)


def _open(net, device, encoder=None, kernel=None):
    """A loaded network with its encoder and noise; what is given wins over what the snapshot says."""
    if not isinstance(net, (str, Path)):
        return net, encoder, kernel
    snapshot = persistence.load_snapshot(net, device)
    process = snapshot.process if hasattr(snapshot.process, "unit_noise") else None
    return snapshot.net, snapshot.encoder if encoder is None else encoder, process if kernel is None else kernel


def _write(outdir, batch, subdirs):
    records = []
    for i, seed in enumerate(batch.seeds):
        name = f"{seed - seed % 1000:06d}/{seed:06d}.png" if subdirs else f"{seed:06d}.png"
        with atomic_write(outdir / name) as file:
            file.write(png_bytes(batch.images[i].cpu()))
        records.append([name, None if batch.class_ids is None else int(batch.class_ids[i])])
    return records


def _write_labels(outdir, records, label_dim):
    """dataset.json for all images of all processes; images of earlier calls in the same folder keep their labels."""
    gathered = [records] * dist.get_world_size()
    if dist.get_world_size() > 1:
        torch.distributed.all_gather_object(gathered, records)
    if dist.get_rank() != 0:
        return
    path = outdir / "dataset.json"
    labels = {}
    if path.is_file():
        try:
            labels = {n: k for n, k in json.loads(path.read_text())["labels"] or [] if (outdir / n).is_file()}
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path} was not readable and is replaced", stacklevel=2)
    labels.update({name: label for part in gathered for name, label in part})
    content = {"labels": sorted(labels.items()), "num_classes": label_dim} if label_dim else {"labels": None}
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def batches(
    given: Sampling, seeds: Sequence[int], device: str | torch.device = "cpu", **output: Any
) -> Iterator[EasyDict]:
    """The batches of `generate_images` that a command's options mean; output: its outdir and subdirs.

    Opens the snapshots, rounds their weights, makes guide and process. Raises ValueError for what does not fit together.
    """
    sampler = choices.choose(samplers.SOLVERS, "solver", given.solver or "heun")
    net, encoder, kernel = _open(given.net, device)
    use_vae(encoder, given.vae)
    trained = processes.aug_dim(kernel)
    if given.aug_dim not in (None, trained):
        raise ValueError(
            f"--aug-dim={given.aug_dim:g} contradicts the snapshot, trained with D={trained:g}: leave it out"
        )
    net, gnet = quantize_weights(net, given.quantize_bits, given.quantize_policy), given.gnet
    if gnet in NULL_GUIDES:
        gnet = NullLabels(net, NULL_GUIDES[gnet])
    elif gnet is not None:
        gnet = quantize_weights(_open(gnet, device)[0], given.quantize_bits, given.quantize_policy)
    if given.plain:
        process, sampler = None, samplers.noisy_heun(given.inject_noise)
    elif given.process in (None, "edm") and not given.process_options:
        process = processes.EDM(sigma_max=given.sigma_max)
    else:
        process = make_process(given.process or "edm", given.process_options, trained=kernel)
    same = ("class_idx", "sources", "max_batch_size", "guidance", "guidance_interval", "prior")
    options = {name: getattr(given, name) for name in same} | given.solver_options() | output
    options |= dict(gnet=gnet, encoder=encoder, kernel=kernel, process=process, sampler=sampler)
    return generate_images(net, seeds, device=device, **options)


def run(given: Sampling, seeds: Sequence[int], outdir: str, subdirs: bool, grid: bool, device: str | None) -> None:
    """What generate_images.py does: generate, write images, labels and the grid."""
    device = dist.init(device)
    made = batches(given, seeds, device, outdir=outdir, subdirs=subdirs)
    dist.print0(f"Generating {len(seeds)} images to {outdir} ...")
    shown = {}
    total = sum(map(len, dist.split_batches(seeds, given.max_batch_size)))
    with tqdm(total=total, unit="img", disable=dist.get_rank() != 0) as bar:
        for batch in made:
            bar.update(len(batch.seeds))
            for i in range(len(batch.seeds)):
                row = shown.setdefault(None if batch.class_ids is None else int(batch.class_ids[i]), [])
                if grid and len(row) < GRID_COLUMNS:
                    row.append(batch.images[i].cpu())
    if grid and dist.get_rank() == 0:
        keys = sorted(shown, key=lambda k: -1 if k is None else k)
        # Beside the folder, not in it: the folder is a data set.
        save_grid(f"{str(outdir).rstrip('/')}-grid.png", [shown[k] for k in keys], None if keys == [None] else keys)
    dist.shutdown()
