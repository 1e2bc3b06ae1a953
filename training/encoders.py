"""Between pixels and what the network sees: RGB scaling, VAE latents (EDM2), dequantising transforms for likelihoods.

Four spaces: uint8 pixels -> raw latents (what the data set stores) -> final latents (what the network sees), and back.
Snapshot headers describe encoders by class and arguments (`torch_utils.persistence`).

`log_abs_det(z)` is `log |det dz/dy|` in nats `[N]`, for final latents z and y = grey level / 256 in [0, 1), so that
`bits/dim = -(log p(z) + log_abs_det(z)) / (d ln 2) + 8` with d values per image.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import torch

from dnnlib.download import unreachable
from dnnlib.util import reason
from torch_utils import random
from torch_utils.devices import send
from torch_utils.persistence import persistent
from torch_utils.random import Generator

# Random draws: `generator` is None, a torch.Generator, or an object with randn_like (one generator per sample).


def _draw_like(x, generator, draw):
    """draw: random.randn, or random.rand."""
    if isinstance(generator, (torch.Generator, random.BlockGenerator, type(None))):
        return draw(x.shape, generator, x.device, x.dtype)
    noise = generator.randn_like(x)  # a normal's own quantile is uniform
    return noise if draw is random.randn else torch.special.ndtr(noise.double()).to(x.dtype)


class Encoder:
    """Interface; subclasses are `@persistent`."""

    log_scale = None  # log dz/dy of encoders that scale all values alike
    stored = None  # type of what data sets store for it: "uint8" pixels or "float32" arrays; None: either

    def init(self, device: str | torch.device) -> None:
        """Load what decoding needs onto `device`; called by the methods themselves where they need it."""

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, C, H, W] -> raw latents; by default the pixels themselves."""
        return _check_pixels(x)

    def encode_latents(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        """Raw latents -> final latents, float32."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        """uint8 pixels -> final latents."""
        return self.encode_latents(self.encode_pixels(x), generator)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Final latents -> uint8 pixels [N, C, H, W]."""
        raise NotImplementedError

    def decoded_shape(self, shape: Sequence[int]) -> list[int]:
        """[C, H, W] of the images that latents of shape `shape` = [C, H, W] are decoded to."""
        return list(shape)

    def log_abs_det(self, x: torch.Tensor) -> torch.Tensor:
        """log |det dz/dy| at final latents x: float64 [N], nats (see the module's convention)."""
        if self.log_scale is None:
            raise ValueError(f"{type(self).__name__} has no bits/dim: its map from pixels to latents is not invertible")
        log_det = math.prod(x.shape[1:]) * self.log_scale
        return torch.full([x.shape[0]], log_det, dtype=torch.float64, device=x.device)

    def __repr__(self):
        arguments = getattr(self, "init_kwargs", {})  # recorded by @persistent
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"

    def __eq__(self, other):
        return type(self) is type(other) and vars(self).get("init_kwargs") == vars(other).get("init_kwargs")

    __hash__ = None


def _check_pixels(x, low=1, high=4):
    if x.ndim != 4 or x.dtype != torch.uint8 or not low <= x.shape[1] <= high:
        raise ValueError(f"pixels must be uint8 [N,C,H,W] with {low}..{high} channels, got {x.dtype} {list(x.shape)}")
    return x


@persistent
class IdentityEncoder(Encoder):
    """float32 data as it is (2-D points, foreign latents); `decode` returns float32."""

    stored = "float32"

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def encode_latents(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        return x.to(torch.float32)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z.to(torch.float32)


@persistent
class StandardRGBEncoder(Encoder):
    """Grey or colour pixels scaled into [-1, 1]: z = x / 127.5 - 1 (EDM2). 1 to 4 channels."""

    log_scale, stored = math.log(256 / 127.5), "uint8"

    def encode_latents(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        return (x.to(torch.float32) / 127.5).sub_(1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return (z.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)


# Likelihoods: uniform dequantisation y = (x + U) / 256, then an invertible map z = f(y) (MDM, appendix on data).


@persistent
class UniformDequantizer(Encoder):
    """z = y = (x + U) / 256 with U uniform in [0, 1); U keeps 2^-12 from the ends so that float32 decodes exactly."""

    log_scale, stored = 0.0, "uint8"

    def encode_latents(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        if x.dtype != torch.uint8:
            raise ValueError(f"dequantisation needs uint8 images, got {x.dtype}")
        x = x.to(torch.float32)
        noise = _draw_like(x, generator, random.rand).clamp(2**-12, 1 - 2**-12)
        return self._forward((x + noise) / 256)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return (self._inverse(z.to(torch.float32)) * 256).floor().clip(0, 255).to(torch.uint8)

    def _forward(self, y):  # y -> z
        return y

    def _inverse(self, z):  # z -> y
        return z


@persistent
class CenterEncoder(UniformDequantizer):
    """Dequantise, then z = 2 y - 1; log_abs_det = d log 2."""

    log_scale = math.log(2)

    def _forward(self, y):
        return 2 * y - 1

    def _inverse(self, z):
        return (z + 1) / 2


@persistent
class LogitEncoder(UniformDequantizer):
    """Dequantise, then z = logit(s), s = alpha + (1 - 2 alpha) y; log_abs_det = sum log(1 - 2 alpha) - log(s - s^2).

    Latents lie within +-logit(1 - alpha): +-2.944 at alpha = 0.05. Samples decode by the inverse, clipped.
    """

    def __init__(self, alpha: float = 0.05):
        self.alpha = float(alpha)
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha={alpha} must lie strictly between 0 and 0.5")

    def _forward(self, y):
        return torch.logit(self.alpha + (1 - 2 * self.alpha) * y)

    def _inverse(self, z):
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)

    def log_abs_det(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise ValueError("log_abs_det takes the final latents (float), not pixels: it depends on the noise U")
        x = x.double().flatten(1)
        log_sigmoid = torch.nn.functional.logsigmoid
        return (math.log(1 - 2 * self.alpha) - log_sigmoid(x) - log_sigmoid(-x)).sum(1)


@persistent
class StabilityVAEEncoder(Encoder):
    """Stable Diffusion's VAE (EDM2): the data set stores posterior mean and standard deviation, 8 channels, side H/8.

    Pixels enter the VAE as [0, 1] and without the factor 0.18215: raw_mean and raw_std belong to this convention.
    """

    stored = "float32"

    def __init__(
        self,
        vae_name: str = "stabilityai/sd-vae-ft-mse",  # local folder, or name on the Hugging Face hub
        raw_mean: Sequence[float] = (5.81, 3.25, 0.12, -2.15),  # of the raw latents, per channel
        raw_std: Sequence[float] = (4.17, 4.62, 3.71, 3.28),
        final_mean: float | Sequence[float] = 0.0,  # of the final latents: a number or one per channel
        final_std: float | Sequence[float] = 0.5,
        batch_size: int = 8,  # images per VAE call
    ):
        if not isinstance(vae_name, str) or type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"vae_name={vae_name!r} must be a folder or name, batch_size={batch_size!r} a number >= 1")
        self.vae_name, self.batch_size, self.given = vae_name, batch_size, None
        raw_mean, raw_std, final_mean, final_std = (
            torch.as_tensor(v, dtype=torch.float32) for v in (raw_mean, raw_std, final_mean, final_std)
        )
        self.scale = final_std / raw_std  # [C]
        self.bias = final_mean - raw_mean * self.scale  # [C]
        if self.scale.ndim != 1 or self.bias.shape != self.scale.shape:
            raise ValueError("raw_mean and raw_std must be as many numbers each, final_mean and final_std too, or one")
        self._vae, self._there = None, {}

    def init(self, device: str | torch.device) -> None:
        if self._vae is None:
            self._vae = load_stability_vae(self.given or self.vae_name, hub=self.given is not None)
        self._vae.to(torch.device(device))

    def _per_channel(self, x):
        if x.device not in self._there:  # sent once
            self._there[x.device] = tuple(send(v.reshape(1, -1, 1, 1), x.device) for v in (self.scale, self.bias))
        return self._there[x.device]

    @torch.no_grad()
    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:  # uint8 [N,3,H,W] -> float32 [N,8,H/8,W/8]
        self.init(x.device)
        x = _check_pixels(x, low=3, high=3).to(torch.float32) / 255
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"images of {x.shape[3]}x{x.shape[2]}: the VAE needs sides divisible by {factor}")
        posteriors = [self._vae.encode(part)["latent_dist"] for part in x.split(self.batch_size)]
        return torch.cat([torch.cat([p.mean, p.std], dim=1) for p in posteriors])

    def encode_latents(self, x: torch.Tensor, generator: Generator = None) -> torch.Tensor:  # [N,8,h,w] -> [N,4,h,w]
        if x.ndim != 4 or x.shape[1] != 2 * self.scale.numel():
            raise ValueError(
                f"raw latents must have {2 * self.scale.numel()} channels (posterior mean and standard deviation), "
                f"got {list(x.shape)}; run `dataset_tool.py encode` first"
            )
        mean, std = x.to(torch.float32).chunk(2, dim=1)
        scale, bias = self._per_channel(x)
        return (mean + _draw_like(mean, generator, random.randn) * std) * scale + bias

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:  # float [N,4,h,w] -> uint8 [N,3,8h,8w]
        self.init(z.device)
        scale, bias = self._per_channel(z)
        z = (z.to(torch.float32) - bias) / scale
        images = torch.cat([self._vae.decode(part)["sample"] for part in z.split(self.batch_size)])
        return images.clamp(0, 1).mul(255).to(torch.uint8)

    def decoded_shape(self, shape: Sequence[int]) -> list[int]:
        if self._vae is None:
            self.init("cpu")
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return [3, *(factor * side for side in shape[1:])]

    def log_abs_det(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("VAE latents have no bits/dim: decoding is not invertible; train on pixels for likelihoods")

    def __getstate__(self):  # The VAE is no part of the encoder's state.
        return dict(self.__dict__, _vae=None, _there={})


def use_vae(encoder: Encoder, vae: str | None) -> None:
    """Let an encoder take its VAE from where the user says: a folder, or the hub. None: from where it can without network.

    What a file says of its VAE is no reason to ask the network for it. Warns where the encoder has no VAE.
    """
    if vae is not None and not isinstance(encoder, StabilityVAEEncoder):
        warnings.warn(f"--vae={vae} has no effect: the data are no VAE latents", stacklevel=2)
    elif vae is not None:
        encoder.given = vae


def load_stability_vae(vae_name: str = "stabilityai/sd-vae-ft-mse", hub: bool = False) -> torch.nn.Module:
    """diffusers AutoencoderKL in eval mode without gradients: a local folder, else the local cache, else, if `hub`, the hub.

    Only safetensors weights are read. ValueError where diffusers is missing or the weights cannot be found.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as err:
        raise ValueError("VAE latents need the diffusers package: pip install diffusers") from err
    errors = []
    for local_only in [True] if os.path.isdir(vae_name) or not hub else [True, False]:
        if not local_only and (why := _hub_is_away()):  # its client would try for half a minute
            errors.append(OSError(why))
            continue
        try:
            how = dict(
                local_files_only=local_only, use_safetensors=True, low_cpu_mem_usage=False
            )  # needs no accelerate
            return AutoencoderKL.from_pretrained(vae_name, **how).eval().requires_grad_(False)
        except Exception as err:  # The hub's client raises many types, none of them shared.
            errors.append(err)
    places = "a local folder, the local cache or the hub" if hub else "a local folder or the local cache"
    remedy = "download it and give --vae=FOLDER" + ("" if hub else f", or --vae={vae_name} to load it from the hub")
    raise ValueError(
        f"cannot load the VAE {vae_name!r:.200} from {places} ({reason(errors[-1])}): {remedy}"
    ) from errors[-1]


def _hub_is_away():
    """Why the hub cannot be asked, or None."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    why = unreachable(constants.ENDPOINT)
    return why and f"{constants.ENDPOINT}: {why}"


def for_channels(num_channels: int) -> Encoder:
    """The encoder of a data set with so many channels: 1 to 4 pixels (RGB scaling), 8 VAE latents (EDM2)."""
    if num_channels in range(1, 5):
        return StandardRGBEncoder()
    if num_channels == 8:
        return StabilityVAEEncoder()
    raise ValueError(f"no default encoder for {num_channels} channels: use 1..4 (pixels) or 8 (VAE mean and std)")
