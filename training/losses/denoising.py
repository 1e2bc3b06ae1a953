"""What is learned from the noise: a denoising loss is a noise-level density, a weighting and a kernel.

Every loss has two phases. `draw` makes all random choices (noise level, augmentation, noise, label dropout, stable
targets) and depends on no learned parameter; `evaluate` is a deterministic function of a network and those draws. So one
set of draws can be scored by several networks, selected from, split into micro-batches or repeated.
"""

import numbers

import torch

from torch_utils import persistence
from torch_utils.random import default_generator
from training.processes import GaussianKernel


class Draws(dict):
    """Named tensors with a common first axis N (or None): what one loss evaluation needs besides the network.

    Entries are attributes too. `draws[idx]` with a tensor, slice, list or number selects examples; with a string it is
    the dict entry. Denoising losses use images [N, ...] (clean, augmented), sigma [N, 1, ...], noise [N, ...]
    (already times sigma), labels [N, K] or None, augment_labels [N, A] or None, targets [N, ...] or None; a loss of
    your own may add any others.
    """

    def __getattr__(self, name):
        try:
            return dict.__getitem__(self, name)
        except KeyError as err:
            raise AttributeError(name) from err

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, numbers.Integral):  # one example still has its axis
            key = [int(key)]
        return Draws({name: None if value is None else value[key] for name, value in self.items()})

    def __len__(self):
        return next((len(value) for value in self.values() if value is not None), 0)

    def __iter__(self):
        return iter(self.keys())

    @staticmethod
    def cat(parts):
        """One Draws from a list of them, in order."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        return Draws(
            {k: None if v is None else torch.cat([dict.__getitem__(p, k) for p in parts]) for k, v in parts[0].items()}
        )


class Loss(torch.nn.Module):
    """Base of all losses. A subclass gives `draw` and `evaluate`; parameters it registers are trained with the network.

    lr_scale: learning rate of the loss's own parameters as a multiple of the network's. The noise that a loss trains for
    is its `process` (a learned one is saved with the network), else its `kernel`.
    """

    lr_scale = 1.0

    def draw(self, images, labels=None, generator=None):
        """All random choices for images [N, ...] and labels [N, K] or None -> Draws of length N."""
        raise NotImplementedError

    def evaluate(self, net, draws):
        """The unreduced loss [N, ...] or [N] of `net` on `draws`."""
        raise NotImplementedError

    def forward(self, net, images, labels=None):
        return self.evaluate(net, self.draw(images, labels))


class DenoisingLoss(Loss):
    """lambda(sigma) exp(-u) |D(y + n; sigma) - y|^2 + u, with n from a kernel of scale sigma and u the net's log-variance.

    EDM eq. 2-5 (u = 0), EDM2 eq. 14-21, PFGM++ (ICML 2023) sec. 3.2 for kernels other than the Gaussian. Subclasses give
    the noise-level density (`sample_sigma`) and the weight lambda (`weight`).
    """

    def __init__(
        self,
        sigma_data=0.5,  # standard deviation of the data the weight is made for
        kernel=None,  # unit noise; None: Gaussian
        augment=None,  # callable images, generator -> (images, augment_labels); None: none
        label_dropout=0.0,  # probability of replacing a label by zeros (for classifier-free guidance)
        uncertainty=True,  # use the network's log-variance u(sigma), EDM2 eq. 21; False: u = 0
        stable_targets=None,  # callable draws, generator -> targets (see StableTargets); None: the images themselves
    ):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout} must lie in [0, 1]")
        self.sigma_data = sigma_data
        self.kernel = GaussianKernel() if kernel is None else kernel
        self.augment = augment
        self.label_dropout = label_dropout
        self.uncertainty = uncertainty
        self.stable_targets = stable_targets

    def sample_sigma(self, shape, generator, device):
        """Noise levels of the given shape, > 0."""
        raise NotImplementedError

    def weight(self, sigma):
        """lambda(sigma); default EDM's (sigma^2 + sd^2) / (sigma sd)^2 (EDM table 1)."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def draw(self, images, labels=None, generator=None):
        generator = default_generator(images.device) if generator is None else generator
        n = images.shape[0]
        sigma = self.sample_sigma([n] + [1] * (images.ndim - 1), generator, images.device)  # [N, 1, ...]
        augment_labels = None
        if self.augment is not None:
            images, augment_labels = self.augment(images, generator)
        noise = self.kernel.unit_noise(images.shape, generator=generator).to(images.device) * sigma
        if self.label_dropout and labels is not None:
            keep = torch.rand([n, 1], generator=generator, device=images.device) >= self.label_dropout
            labels = labels * keep
        draws = Draws(
            images=images, sigma=sigma, noise=noise, labels=labels, augment_labels=augment_labels, targets=None
        )
        if self.stable_targets is not None:
            draws["targets"] = self.stable_targets(draws, generator)
        return draws

    def evaluate(self, net, draws):
        extra = {} if draws.augment_labels is None else dict(augment_labels=draws.augment_labels)
        noisy = draws.images + draws.noise
        target = draws.images if draws.targets is None else draws.targets
        if not self.uncertainty:
            denoised = net(noisy, draws.sigma, draws.labels, **extra)
            return self.weight(draws.sigma) * (denoised - target) ** 2
        denoised, logvar = net(noisy, draws.sigma, draws.labels, return_logvar=True, **extra)
        return self.weight(draws.sigma) / logvar.exp() * (denoised - target) ** 2 + logvar


class LogNormalLoss(DenoisingLoss):
    """ln sigma ~ N(P_mean, P_std^2), EDM's weight."""

    def __init__(self, P_mean, P_std, sigma_data=0.5, **kwargs):
        super().__init__(sigma_data=sigma_data, **kwargs)
        if not P_std > 0:
            raise ValueError(f"P_std={P_std} must be positive")
        self.P_mean = P_mean
        self.P_std = P_std

    def sample_sigma(self, shape, generator, device):
        return (torch.randn(shape, generator=generator, device=device) * self.P_std + self.P_mean).exp()


class EDM2Loss(LogNormalLoss):
    """EDM2's loss with learned uncertainty (EDM2 eq. 14-21)."""

    def __init__(self, P_mean=-0.4, P_std=1.0, sigma_data=0.5, **kwargs):
        super().__init__(P_mean, P_std, sigma_data, **kwargs)


class EDMLoss(LogNormalLoss):
    """EDM's loss (EDM table 1, column "ours"): no uncertainty head."""

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5, uncertainty=False, **kwargs):
        super().__init__(P_mean, P_std, sigma_data, uncertainty=uncertainty, **kwargs)


class VPLoss(DenoisingLoss):
    """The variance-preserving loss as EDM restates it (EDM table 1, column VP): t uniform, weight 1 / sigma^2."""

    def __init__(self, beta_d=19.9, beta_min=0.1, epsilon_t=1e-5, uncertainty=False, **kwargs):
        super().__init__(uncertainty=uncertainty, **kwargs)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.epsilon_t = epsilon_t

    def sample_sigma(self, shape, generator, device):
        t = 1 + torch.rand(shape, generator=generator, device=device) * (self.epsilon_t - 1)
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()

    def weight(self, sigma):
        return 1 / sigma**2


class VELoss(DenoisingLoss):
    """The variance-exploding loss as EDM restates it (EDM table 1, column VE): log-uniform sigma, weight 1 / sigma^2."""

    def __init__(self, sigma_min=0.02, sigma_max=100, uncertainty=False, **kwargs):
        super().__init__(uncertainty=uncertainty, **kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def sample_sigma(self, shape, generator, device):
        u = torch.rand(shape, generator=generator, device=device)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def weight(self, sigma):
        return 1 / sigma**2


class Objective(torch.nn.Module):
    """The one module whose forward(draws) is the loss: optimizer, EMA, checkpoint and gradient reduction see this.

    net: the denoiser (or joint network). loss: a Loss; its own parameters train along, at lr times `loss.lr_scale`.
    """

    def __init__(self, net, loss):
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, draws):
        return self.loss.evaluate(self.net, draws)

    @property
    def noise(self) -> object:
        """The process or kernel that the loss trains for, or None."""
        return getattr(self.loss, "process", None) or getattr(self.loss, "kernel", None)

    def description(self) -> dict:
        """{"net": ..., "process": ...} as snapshots store them. Raises ValueError for what cannot be described."""
        return {"net": persistence.describe(self.net), "process": persistence.describe(self.noise)}

    def param_groups(self):
        """Optimizer groups with an `lr_scale` each; the loss's own group only where it has parameters."""
        groups = [dict(params=[p for p in self.net.parameters() if p.requires_grad], lr_scale=1.0)]
        own = [p for p in self.loss.parameters() if p.requires_grad] if isinstance(self.loss, torch.nn.Module) else []
        if own:
            groups.append(dict(params=own, lr_scale=getattr(self.loss, "lr_scale", 1.0)))
        return groups
