"""Images from a network: seeds in, batches of uint8 pixels out, and files with their labels beside them."""

import functools
import inspect
import json
import math
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from dnnlib import EasyDict, atomic_write
from torch_utils import distributed as dist
from torch_utils import persistence
from torch_utils.random import StackedRandomGenerator
from training import processes, quantize, samplers
from training.encoders import StandardRGBEncoder
from training.guidance import GuidedDenoiser, NullLabels
from training.images import png_bytes, save_grid
from training.process_sampling import choose, heun_in_sigma
from training.processes.options import require_gaussian

GRID_COLUMNS = 16
NULL_GUIDES = {"null": "zero", "null-last": "last"}  # --gnet for classifier-free guidance: which label means none


def class_labels(label_dim, seeds, class_idx, generator, device, sources=None):
    """Class ids int64 [N] and one-hot labels [N, label_dim] for seeds [N]; (None, None) without labels.

    class_idx: None (uniform per seed), an id, or "balanced" (seed modulo the number of sources, over `sources` if given).
    The uniform draw always happens, so later draws do not depend on the choice. Raises ValueError for an id out of range.
    """
    if label_dim == 0:
        if class_idx is not None:
            warnings.warn(f"--class={class_idx} has no effect: the network is unconditional", stacklevel=2)
        return None, None
    ids = generator.randint(label_dim, size=[len(seeds)], device=device)
    if class_idx == "balanced":
        cycle = torch.as_tensor(sources or range(label_dim), device=device)
        ids = cycle[torch.as_tensor(seeds, device=device, dtype=torch.int64) % len(cycle)]
    elif class_idx is not None:
        ids = torch.full_like(ids, class_idx)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < label_dim:
        raise ValueError(f"class {int(ids.max())} is out of range: the network knows classes 0 to {label_dim - 1}")
    return ids, torch.eye(label_dim, device=device)[ids]


def generate_images(
    net,  # denoiser, or path of a snapshot
    seeds=range(16, 24),  # one image each
    outdir=None,  # write images and dataset.json here; None: yield only
    gnet=None,  # guiding denoiser or path; None: no guidance
    encoder=None,  # None: the snapshot's own, else pixels
    kernel=None,  # noise of the prior; None: what the snapshot was trained with, else Gaussian
    class_idx=None,  # class id, "balanced", or None: uniform per seed
    sources=None,  # ids that "balanced" cycles through; None: all
    subdirs=False,  # a folder for every 1000 seeds
    max_batch_size=32,
    sampler=None,  # without process: callable like samplers.heun, the default; with one: a solver of training/samplers.py
    process=None,  # EDM or a linear process that the sampler runs through; None: heun in noise levels, as EDM2
    prior="matched",  # of the process: as the data are at that time, or "stationary"
    device="cpu",
    progress=False,  # tqdm on rank 0
    **sampler_kwargs,  # num_steps, sigma_min, sigma_max, rho, guidance, S_churn; of solvers: grid, t_min, denoise, ...
):
    """Iterator of batches with images uint8 [N, C, H, W], labels [N, K] one-hot or None, class_ids, noise, seeds, batch_idx.

    Every process of a group gets the same number of batches, some possibly empty (images None). Noise, labels and the
    sampler's draws of a seed do not depend on batch size or process count. With `outdir`, files named by seed
    (SSSSSS.png) are written as in EDM2, and dataset.json with the labels at the end. With a process, noise is the state
    [N, V, C, H, W] that its solver starts from. Raises ValueError for classes out of range, a guide that does not fit, or
    a process for a network that was not trained with Gaussian noise.
    """
    net, encoder, kernel = _open(net, encoder, kernel, device)
    if gnet is not None:
        gnet = _open(gnet, encoder, kernel, device)[0]
        if (gnet.img_channels, gnet.img_resolution) != (net.img_channels, net.img_resolution):
            raise ValueError("--gnet makes images of another shape than --net: take a guide trained on the same data")
    encoder = StandardRGBEncoder() if encoder is None else encoder
    encoder.init(torch.device(device))
    sampler_kwargs = _known_levels(
        net, samplers.heun if sampler is None or process is not None else sampler, sampler_kwargs
    )
    if process is None:
        run = functools.partial(sampler or samplers.heun, net)
    else:
        require_gaussian(kernel, process)
        guided = (
            net if sampler_kwargs.get("guidance", 1) == 1 else GuidedDenoiser(net, gnet, sampler_kwargs["guidance"])
        )
        sampler_kwargs.pop("guidance", None)
        run = functools.partial(sampler or heun_in_sigma, guided, process)
    if sampler_kwargs.get("S_churn") and math.isfinite(processes.aug_dim(kernel)):
        warnings.warn("churn adds Gaussian noise, which is not derived for finite D of PFGM++", stacklevel=2)
    asked = sources or [] if class_idx == "balanced" else [] if class_idx is None else [class_idx]
    unknown = [k for k in asked if net.label_dim and not 0 <= k < net.label_dim]
    if unknown:
        raise ValueError(f"class {unknown[0]} is out of range: the network knows classes 0 to {net.label_dim - 1}")
    batches = dist.split_batches(seeds, max_batch_size)
    total = sum(map(len, batches))
    bar = tqdm(total=total, unit="img", disable=not (progress and dist.get_rank() == 0))
    records = []
    with bar:
        for batch_idx, batch_seeds in enumerate(batches):
            batch = EasyDict(
                images=None, labels=None, class_ids=None, noise=None, seeds=batch_seeds, batch_idx=batch_idx
            )
            if batch_seeds:
                generator = StackedRandomGenerator(device, batch_seeds)
                size = [len(batch_seeds), net.img_channels, net.img_resolution, net.img_resolution]
                if process is not None:
                    batch.noise = samplers.start_state(
                        net, process, size, generator, prior=prior, device=device, **sampler_kwargs
                    )
                elif kernel is None:
                    batch.noise = generator.randn(size, device=device)
                else:
                    batch.noise = kernel.unit_noise(size, generator).to(device)
                batch.class_ids, batch.labels = class_labels(
                    net.label_dim, batch_seeds, class_idx, generator, device, sources
                )
                with torch.no_grad():
                    guide = () if process is not None else (gnet,)
                    latents = run(batch.noise, batch.labels, *guide, randn_like=generator.randn_like, **sampler_kwargs)
                    batch.images = encoder.decode(latents)
                if outdir is not None:
                    records.extend(_write(Path(outdir), batch, subdirs))
            bar.update(len(batch_seeds))
            yield batch
    if outdir is not None:
        _write_labels(Path(outdir), records, net.label_dim)


def _open(net, encoder, kernel, device):
    """A loaded network with its encoder and noise; what is given wins over what the snapshot says."""
    if isinstance(net, torch.nn.Module) or not isinstance(net, (str, Path)):
        return net, encoder, kernel
    snapshot = persistence.load_snapshot(net, device)
    process = snapshot.process if hasattr(snapshot.process, "unit_noise") else None
    return snapshot.net, snapshot.encoder if encoder is None else encoder, process if kernel is None else kernel


def _known_levels(net, sampler, options):
    """The options with noise levels narrowed to what the network was made for, as in EDM's sampler."""
    known = inspect.signature(sampler).parameters
    options = dict(options)
    for name, narrow, default in (("sigma_min", max, 0.0), ("sigma_max", min, math.inf)):
        if name in known:
            wanted = options.get(name, known[name].default)
            if narrow(wanted, getattr(net, name, default)) != wanted:
                options[name] = getattr(net, name)
    return options


def check_aug_dim(kernel, aug_dim):
    """Raises ValueError where a given number of augmented dimensions is not the one of the snapshot's noise."""
    trained = processes.aug_dim(kernel)
    if aug_dim is not None and float(aug_dim) != trained:
        raise ValueError(f"--aug-dim={aug_dim:g} contradicts the snapshot, trained with D={trained:g}: leave it out")


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
    gathered = [None] * dist.get_world_size()
    if dist.get_world_size() > 1:
        torch.distributed.all_gather_object(gathered, records)
    else:
        gathered = [records]
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
    content = {"labels": sorted(labels.items()) if label_dim else None}
    if label_dim:
        content["num_classes"] = label_dim
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def run(
    outdir, grid, subdirs, device, net, gnet=None, preset=None, seeds=(), guidance_interval=None,
    aug_dim=None, inject_noise=None, quantize_bits=None, quantize_policy="role",
    process=None, process_options=None, solver=None, **options,
):  # fmt: skip
    """What generate_images.py does: open, check, generate, write images, labels and the grid."""
    if preset is not None:
        from training.presets import generation_preset

        row = generation_preset(preset)
        net, gnet = net or row["net"], gnet or row.get("gnet")
        if options.get("guidance", 1) == 1:
            options["guidance"] = row.get("guidance", 1)
    if net is None:
        raise ValueError("--net is missing: give a snapshot, or a --preset")
    guidance = options.get("guidance", 1)
    if guidance != 1 and gnet is None:
        raise ValueError(
            f"--guidance={guidance} needs a guiding network: give --gnet (null: the network without label)"
        )
    if guidance == 1:
        if gnet is not None and preset is None:
            warnings.warn(f"--gnet={gnet} has no effect without --guidance", stacklevel=2)
        gnet = None
    if options.get("sources") and options.get("class_idx") != "balanced":
        raise ValueError(f"--sources={','.join(map(str, options['sources']))} needs --class=balanced")
    if options.get("sigma_min", 0) >= options.get("sigma_max", math.inf):
        raise ValueError(f"--sigma_min={options['sigma_min']:g} must be below --sigma_max={options['sigma_max']:g}")
    if guidance_interval is not None and (gnet is None or len(guidance_interval) != 2):
        raise ValueError("--guidance-interval=LO,HI needs two noise levels, --gnet and --guidance")
    device = dist.init(device)
    net, encoder, kernel = _open(net, None, None, device)
    check_aug_dim(kernel, aug_dim)
    net = quantize.quantize_weights(net, quantize_bits, quantize_policy)
    if gnet in NULL_GUIDES:
        gnet = NullLabels(net, NULL_GUIDES[gnet])
    elif gnet is not None:
        gnet = quantize.quantize_weights(_open(gnet, None, None, device)[0], quantize_bits, quantize_policy)
    if guidance_interval is not None:
        net, gnet, options = _interval(net, gnet, guidance_interval, options), None, {**options, "guidance": 1}
    guidance = options.pop("guidance", 1)
    process, options = choose(process, process_options, solver, trained=kernel, **options)
    options.update(encoder=encoder, kernel=kernel, process=process, guidance=guidance)
    if process is None:
        options["sampler"] = samplers.noisy_heun(inject_noise)
    elif inject_noise:
        raise ValueError(f"--inject-noise={inject_noise:g} is for EDM's own sampler: leave --process and --solver out")
    dist.print0(f"Generating {len(seeds)} images to {outdir} ...")
    shown = {}
    for batch in generate_images(
        net, seeds, outdir=outdir, gnet=gnet, subdirs=subdirs, device=device, progress=True, **options
    ):
        for i in range(len(batch.seeds)):
            row = shown.setdefault(None if batch.class_ids is None else int(batch.class_ids[i]), [])
            if grid and len(row) < GRID_COLUMNS:
                row.append(batch.images[i].cpu())
    if grid and dist.get_rank() == 0:
        keys = sorted(shown, key=lambda k: -1 if k is None else k)
        # Beside the folder, not in it: the folder is a data set.
        save_grid(f"{str(outdir).rstrip('/')}-grid.png", [shown[k] for k in keys], None if keys == [None] else keys)
    dist.shutdown()


def _interval(net, gnet, interval, options):
    """Interval-limited guidance as one guided denoiser."""
    return GuidedDenoiser(net, gnet, options["guidance"], interval=tuple(interval))
