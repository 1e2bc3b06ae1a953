"""A small autoencoder of one's own, in the form and units of Stable Diffusion's: what makes latents of small images.

diffusers' AutoencoderKL (Kingma & Welling 2014 with a convolutional net; Rombach et al. 2022), trained on squared error and
a little KL. Afterwards its latents are brought to the mean and standard deviation of Stability's, which EDM2's
encoder takes for granted: an affine map that goes into its first and last 1x1 convolutions, so that pictures do not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from dnnlib.util import atomic_write, write_text
from torch_utils.diffusers_folder import CONFIG, WEIGHTS
from torch_utils.random import seeded_generator
from training.encoders import StabilityVAEEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENTS = 4  # channels


def build(widths: Sequence[int], seed: int = 0) -> AutoencoderKL:
    """Random weights; every width after the first halves the sides. Raises ValueError without the package."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as err:
        raise ValueError("an autoencoder needs the diffusers package: pip install diffusers") from err
    torch.manual_seed(seed)
    blocks = dict(down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"])
    return AutoencoderKL(
        block_out_channels=list(widths),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENTS,
        **{name: kind * len(widths) for name, kind in blocks.items()},
    )


def train(
    vae: AutoencoderKL,
    images: torch.Tensor,  # uint8 [N,3,H,W]
    epochs: int = 10,
    batch: int = 64,
    lr: float = 2e-3,
    kl: float = 1e-3,  # weight of the KL per latent value, beside the squared error per pixel in [0, 1]
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Train, then `to_stability_units`; {squared error, KL} of the last epoch, per pixel and per latent value."""
    device = next(vae.parameters()).device
    count = len(images) // batch * batch
    if not count:
        raise ValueError(f"{len(images)} images are fewer than one batch of {batch}: lower --batch")
    optimizer = torch.optim.Adam(vae.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count // batch)
    for epoch in progress(range(epochs)):
        generator, sums = seeded_generator("cpu", seed, epoch), torch.zeros(2)
        for index in torch.randperm(len(images), generator=generator)[:count].split(batch):
            x = images[index].to(device).float() / 255
            posterior = vae.encode(x)["latent_dist"]
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise)["sample"]
            error, divergence = (decoded - x).square().mean(), posterior.kl().mean() / noise[0].numel()
            optimizer.zero_grad()
            (error + kl * divergence).backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([error, divergence]).detach().cpu() * batch / count
    to_stability_units(vae.eval().requires_grad_(False), images[:2048].to(device), batch)
    return dict(zip(("error", "kl"), sums.tolist(), strict=True))


@torch.no_grad()
def to_stability_units(vae: AutoencoderKL, images: torch.Tensor, batch: int = 64) -> None:
    """Let the latents of uint8 images [N,3,H,W] have the mean and deviation that EDM2's encoder expects; pictures stay."""
    posteriors = [vae.encode(part.float() / 255)["latent_dist"] for part in images.split(batch)]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))  # [N,4,h,w]
    have = mean.mean((0, 2, 3)), (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()  # [4]
    wanted = StabilityVAEEncoder()
    scale = 0.5 / wanted.scale.to(mean) / have[1]
    shift = -wanted.bias.to(mean) / wanted.scale.to(mean) - scale * have[0]
    last, first = vae.quant_conv, vae.post_quant_conv
    last.weight[:LATENTS] *= scale[:, None, None, None]
    last.bias[:LATENTS] = last.bias[:LATENTS] * scale + shift
    last.bias[LATENTS:] += 2 * scale.log()  # of the log-variances
    first.weight /= scale[:, None, None]
    first.bias -= first.weight[:, :, 0, 0] @ shift


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey or RGB uint8 pixels [N,C,H,W] -> [N,3,H,W]. Raises ValueError for others."""
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(f"an autoencoder takes grey or RGB images, not {images.dtype} {list(images.shape[1:])}")
    return images.expand(-1, 3, -1, -1)


def save(vae: AutoencoderKL, folder: str | Path) -> None:
    """As `save_pretrained` does, but every file appears whole; the configuration last."""
    tensors = {name: value.contiguous().cpu() for name, value in vae.state_dict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(folder) / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    config = dict(vae.config) | {"_class_name": type(vae).__name__}
    write_text(Path(folder) / CONFIG, json.dumps(config, indent=2) + "\n")
