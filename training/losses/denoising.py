"""What is learned from the noise: a denoising loss is a noise-level density, a weighting and a kernel.

Every loss has two phases. `draw` makes all random choices (noise level, augmentation, noise, label dropout, stable
targets) and depends on no learned parameter; `evaluate` is a deterministic function of a network and those draws. So one
set of draws can be scored by several networks, selected from, split into micro-batches or repeated.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dnnlib import EasyDict
from torch_utils import persistence, random
from torch_utils.random import Generator
from training.processes import GaussianKernel
from training.processes.states import expand


class Draws(EasyDict):
    """Named tensors with a common first axis N (or None): what one loss evaluation needs besides the network.

    `draws[idx]` with a tensor, slice, list or number selects examples; with a string it is the dict entry. Denoising
    losses use images [N, ...] (clean, augmented), sigma [N] and weight [N], noise [N, ...] (already times sigma), labels
    [N, K] or None, augment_labels [N, A] or None, targets [N, ...] or None; a loss of your own may add any others.
    """

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, numbers.Integral):  # one example still has its axis
            key = [int(key)]
        return Draws({name: value if value is None else value[key] for name, value in self.items()})

    def __len__(self):
        return next((len(value) for value in self.values() if value is not None), 0)

    @staticmethod
    def cat(parts: Iterable[Draws]) -> Draws:
        """One Draws from several, in order."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        return Draws({k: None if v is None else torch.cat([p[k] for p in parts]) for k, v in parts[0].items()})


class Loss(torch.nn.Module):
    """Base of all losses. A subclass gives `draw` and `evaluate`; parameters it registers are trained with the network.

    lr_scale: learning rate of the loss's own parameters as a multiple of the network's. The noise that a loss trains for
    is its `process` (a learned one is saved with the network), else its `kernel`.
    """

    lr_scale = 1.0

    @property
    def separable(self) -> bool:
        """Whether `draw` may take many blocks at once, with a BlockGenerator, and gives each what it gives it alone.

        For that it draws by torch_utils.random, one row of numbers per example, and no example touches another.
        """
        return False

    def draw(self, images: Tensor, labels: Tensor | None = None, generator: Generator | None = None) -> Draws:
        """All random choices for images [N, ...] and labels [N, K] or None -> Draws of length N."""
        raise NotImplementedError

    def evaluate(self, net: Callable, draws: Draws) -> Tensor:
        """The unreduced loss of `net` on `draws`: [N], or of the images' shape."""
        raise NotImplementedError

    def at(self, nimg: int) -> None:
        """Told before every step how many images were trained on, for what changes within a run."""

    def forward(self, net: Callable, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.evaluate(net, self.draw(images, labels))


class DenoisingLoss(Loss):
    """lambda(sigma) exp(-u) |D(y + n; sigma) - y|^2 + u, with n from a kernel of scale sigma and u the net's log-variance.

    EDM eq. 2-5 (u = 0), EDM2 eq. 14-21, PFGM++ (ICML 2023) sec. 3.2 for kernels other than the Gaussian. Subclasses give
    the noise-level density (`sample_sigma`) and the weight lambda (`weight`), or both at once (`draw_levels`).
    """

    head = True  # the default of `uncertainty`

    def __init__(
        self,
        sigma_data: float = 0.5,  # standard deviation of the data the weight is made for
        kernel: object = None,  # unit noise; None: Gaussian
        augment: Callable | None = None,  # images, generator -> (images, augment_labels)
        label_dropout: float = 0.0,  # probability of replacing a label by zeros (for classifier-free guidance)
        uncertainty: bool | None = None,  # use the network's log-variance u(sigma), EDM2 eq. 21, or u = 0
        stable_targets: Callable | None = None,  # draws, generator -> targets; None: the images themselves
        variables: int = 0,  # of a joint denoiser's state, whose noise besides sigma n is drawn, too; 0: none is
    ):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout} must lie in [0, 1]")
        self.sigma_data = sigma_data
        self.kernel = GaussianKernel() if kernel is None else kernel
        self.augment = augment
        self.label_dropout = label_dropout
        self.uncertainty = self.head if uncertainty is None else uncertainty
        self.stable_targets, self.variables = stable_targets, variables

    @property
    def separable(self) -> bool:
        ours = all(type(part).__module__.startswith("training.") for part in (self, self.kernel))
        return ours and self.augment is None and self.stable_targets is None

    def sample_sigma(self, n: int, generator: Generator, device: torch.device) -> Tensor:
        """Noise levels [N] > 0."""
        raise NotImplementedError

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma); default EDM's (sigma^2 + sd^2) / (sigma sd)^2 (EDM table 1)."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def draw_levels(self, n: int, generator: Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Noise levels and their weights, [N] each."""
        sigma = self.sample_sigma(n, generator, device)
        return sigma, self.weight(sigma)

    def draw(self, images: Tensor, labels: Tensor | None = None, generator: Generator | None = None) -> Draws:
        generator = random.default_generator(images.device) if generator is None else generator
        sigma, weight = self.draw_levels(len(images), generator, images.device)
        augment_labels = None
        if self.augment is not None:
            images, augment_labels = self.augment(images, generator)
        noise, scale = (
            self.kernel.unit_noise(images.shape, generator=generator).to(images.device),
            expand(sigma, images),
        )
        ours = type(self.kernel).__module__.startswith("training.")  # fresh at every call: no second copy is needed
        noise = noise.mul_(scale) if ours else noise * scale
        if self.label_dropout and labels is not None:
            keep = random.rand([len(images), 1], generator, images.device) >= self.label_dropout
            labels = labels * keep
        draws = Draws(images=images, sigma=sigma, weight=weight, noise=noise, labels=labels)
        draws.update(augment_labels=augment_labels, targets=None)
        if self.variables:
            shape = [len(images), self.variables, *images.shape[1:]]
            draws["aux_noise"] = random.randn(shape, generator, images.device)
        if self.stable_targets is not None:
            draws["targets"] = self.stable_targets(draws, generator)
        return draws

    def error(self, net: Callable, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """(D(y + n; sigma) - target [N, ...], log-variance [N, 1, ...] or None)."""
        extra = network_options(draws, net) | ({"return_logvar": True} if self.uncertainty else {})
        out = net(draws.images + draws.noise, draws.sigma, draws.labels, **extra)
        denoised, logvar = out if self.uncertainty else (out, None)
        return denoised - (draws.images if draws.targets is None else draws.targets), logvar

    def evaluate(self, net: Callable, draws: Draws) -> Tensor:
        error, logvar = self.error(net, draws)
        weight = expand(draws.weight, error)
        return weight * error**2 if logvar is None else weight / logvar.exp() * error**2 + logvar


def network_options(draws: Draws, net: object) -> dict:
    """Keywords of the network besides its three arguments; noise of the auxiliaries only for one that sees as many."""
    options = {name: draws[name] for name in ("augment_labels", "aux_noise") if draws.get(name) is not None}
    if "aux_noise" in options and getattr(net, "variables", None) != options["aux_noise"].shape[1]:
        del options["aux_noise"]
    return options


class EDM2Loss(DenoisingLoss):
    """EDM2's loss with learned uncertainty (EDM2 eq. 14-21): ln sigma ~ N(P_mean, P_std^2), EDM's weight."""

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5, **kwargs: Any):
        super().__init__(sigma_data, **kwargs)
        self.P_mean = P_mean
        self.P_std = P_std

    def sample_sigma(self, n: int, generator: Generator, device: torch.device) -> Tensor:
        return (random.randn([n], generator, device) * self.P_std + self.P_mean).exp()


class EDMLoss(EDM2Loss):
    """EDM's loss (EDM table 1, column "ours"): no uncertainty head."""

    head = False

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5, **kwargs: Any):
        super().__init__(P_mean, P_std, sigma_data, **kwargs)


class VPLoss(DenoisingLoss):
    """The variance-preserving loss as EDM restates it (EDM table 1, column VP): t uniform, weight 1 / sigma^2."""

    head = False
    beta_d, beta_min, epsilon_t = 19.9, 0.1, 1e-5

    def sample_sigma(self, n: int, generator: Generator, device: torch.device) -> Tensor:
        t = 1 + random.rand([n], generator, device) * (self.epsilon_t - 1)
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


class VELoss(DenoisingLoss):
    """The variance-exploding loss as EDM restates it (EDM table 1, column VE): log-uniform sigma, weight 1 / sigma^2."""

    head, weight = False, VPLoss.weight
    sigma_min, sigma_max = 0.02, 100

    def sample_sigma(self, n: int, generator: Generator, device: torch.device) -> Tensor:
        u = random.rand([n], generator, device)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u


class Objective(torch.nn.Module):
    """The one module whose forward(draws) is the loss: optimizer, EMA, checkpoint and gradient reduction see this.

    net: the denoiser (or joint network). loss: a Loss; its own parameters train along, at lr times `loss.lr_scale`.
    """

    def __init__(self, net: torch.nn.Module, loss: Loss):
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, draws: Draws) -> Tensor:
        """The loss [N] or [N, *data_shape]. Raises ValueError for any other shape: broadcasting would train on garbage."""
        losses = self.loss.evaluate(self.net, draws)
        shape, known = list(losses.shape), [[len(draws)]]
        if "images" in draws:
            known.append(list(draws.images.shape))
        if shape not in known and ("images" in draws or shape[:1] != known[0]):
            raise ValueError(
                f"the loss of {len(draws)} examples has shape {shape}: it must be {' or '.join(map(str, known))}. "
                "A network must return the shape of its images; it gets sigma as [N]"
            )
        return losses

    @property
    def noise(self) -> object:
        """The process or kernel that the loss trains for, or None."""
        return getattr(self.loss, "process", None) or getattr(self.loss, "kernel", None)

    def description(self) -> dict:
        """{"net": ..., "process": ...} as snapshots store them. Raises ValueError for what cannot be described."""
        return {"net": persistence.describe(self.net), "process": persistence.describe(self.noise)}

    def param_groups(self) -> list[dict]:
        """Optimizer groups with an `lr_scale` each; the loss's own group only where it has parameters."""
        groups = [dict(params=[p for p in self.net.parameters() if p.requires_grad], lr_scale=1.0)]
        own = [p for p in self.loss.parameters() if p.requires_grad]
        if own:
            groups.append(dict(params=own, lr_scale=self.loss.lr_scale))
        return groups
